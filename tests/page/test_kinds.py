"""Layers by kind and by place."""

import pytest

from lora_one.page.kinds import by_kind, kinds, places

LLAMA = [f"model.layers.{i}.{name}" for i in range(3) for name in ("self_attn.q_proj", "mlp.up_proj")]
T5 = [
    "encoder.block.0.layer.0.SelfAttention.q",
    "decoder.block.0.layer.0.SelfAttention.q",
    "decoder.block.0.layer.1.EncDecAttention.q",
]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (LLAMA, ["q_proj", "up_proj"]),
        (T5, ["encoder.block.layer.SelfAttention.q", "decoder.block.layer.SelfAttention.q", "EncDecAttention.q"]),
        (["0", "2"], ["layer"]),
        (["up", "block.up"], ["up", "block.up"]),
        ([], []),
    ],
)
def test_a_kind_is_the_shortest_end_that_is_its_own(names, expected):
    assert kinds(names) == expected


def test_the_place_of_a_layer_is_its_number_or_its_turn():
    assert [place.turn for place in places(LLAMA).values()] == [0, 0, 1, 1, 2, 2]
    assert [place.turn for place in places(["layers.4.up", "layers.9.up"]).values()] == [4, 9]
    experts = [f"layers.{i}.experts.{j}.up" for i in (0, 1) for j in (0, 1)]
    assert [place.turn for place in places(experts).values()] == [0, 1, 2, 3]


def test_numbers_by_kind_leave_out_what_is_not_known():
    numbers = dict(zip(LLAMA, (3.0, 1.0, None, 2.0, 5.0, None), strict=True))
    assert by_kind(numbers) == {"q_proj": [(0, 3.0), (2, 5.0)], "up_proj": [(0, 1.0), (1, 2.0)]}
