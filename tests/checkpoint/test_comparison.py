"""Two adapter folders compared: the angles against scipy's, and the settings that differ."""

import json

import numpy as np
import pytest
from scipy.linalg import subspace_angles

from lora_one.checkpoint.adapter import Adapter, LoraLayer
from lora_one.checkpoint.comparison import compare, directions
from lora_one.checkpoint.inspection import inspect_adapter
from lora_one.checkpoint.peft import write_peft
from lora_one.core.factors import Factors

ATTENTION = "model.layers.0.self_attn.q_proj"
MLP = "model.layers.0.mlp.up_proj"


def factors(seed: int, out: int, inputs: int, rank: int) -> Factors:
    draw = np.random.default_rng(seed)
    return Factors(draw.standard_normal((rank, inputs)), draw.standard_normal((out, rank)))


def save(folder, pairs, scaling=2.0):
    folder.mkdir()
    write_peft(folder, Adapter({name: LoraLayer([pair], scaling, "F64") for name, pair in pairs.items()}))
    return inspect_adapter(folder)


def test_the_angles_are_those_of_scipy(tmp_path):
    one, other = factors(1, 12, 20, 3), factors(2, 12, 20, 4)
    told = []
    comparison = compare(
        save(tmp_path / "a", {ATTENTION: one, MLP: factors(3, 8, 6, 2)}),
        save(tmp_path / "b", {ATTENTION: other}),
        lambda done, total: told.append((done, total)),
    )
    [layer] = comparison.layers  # MLP is in one of them alone
    assert (layer.name, told) == (ATTENTION, [(1, 1)])
    reads, writes = subspace_angles(one.lora_A.T, other.lora_A.T)[::-1], subspace_angles(one.lora_B, other.lora_B)[::-1]
    np.testing.assert_allclose(layer.angles_in, np.degrees(reads), rtol=1e-9)
    np.testing.assert_allclose(layer.angles_out, np.degrees(writes), rtol=1e-9)
    assert layer.shared_in == pytest.approx(np.mean(np.cos(reads) ** 2), rel=1e-12)
    assert layer.shared_out == pytest.approx(np.mean(np.cos(writes) ** 2), rel=1e-12)
    assert (layer.by_chance_in, layer.by_chance_out) == (4 / 20, 4 / 12)


def test_an_adapter_and_itself_in_other_coordinates(tmp_path):
    """B M and M^-1 A are the same update, whatever M is."""
    pair, change = factors(1, 12, 20, 3), np.random.default_rng(4).standard_normal((3, 3))
    same = Factors(np.linalg.solve(change, pair.lora_A), pair.lora_B @ change)
    comparison = compare(save(tmp_path / "a", {MLP: pair}), save(tmp_path / "b", {MLP: same}))
    [layer] = comparison.layers
    assert layer.shared_in == pytest.approx(1.0, abs=1e-12)
    assert layer.shared_out == pytest.approx(1.0, abs=1e-12)
    assert max(layer.angles_in + layer.angles_out) < 1e-5  # the arc cosine of 1 - eps is 1e-8
    assert comparison.differences == {}


def test_random_spaces_share_what_the_page_says_they_do():
    shared = []
    for seed in range(200):
        (a, _), (b, _) = (directions(factors(seed + shift, 6, 30, rank)) for shift, rank in ((0, 3), (1000, 5)))
        shared.append(np.sum((a.T @ b) ** 2) / 3)
    assert np.mean(shared) == pytest.approx(5 / 30, abs=4 * np.std(shared) / 200**0.5)


def test_layers_that_cannot_be_compared_are_left_out(tmp_path):
    zero = Factors(factors(1, 12, 20, 3).lora_A, np.zeros((12, 3)))  # as LoRA starts
    first = save(tmp_path / "a", {ATTENTION: zero, MLP: factors(2, 8, 6, 2)})
    second = save(tmp_path / "b", {ATTENTION: factors(3, 12, 20, 3), MLP: factors(2, 8, 7, 2)})
    assert compare(first, second).layers == []


def test_the_settings_that_differ(tmp_path):
    first = save(tmp_path / "a", {MLP: factors(1, 8, 6, 2)})
    second = save(tmp_path / "b", {MLP: factors(1, 8, 6, 4)}, scaling=3.0)
    differences = compare(first, second).differences
    assert differences["adapter.r"] == (2, 4)
    assert differences["adapter.lora_alpha"] == (4.0, 12.0)
    assert set(differences) == {"adapter.r", "adapter.lora_alpha"}
    assert json.loads(json.dumps(compare(first, second).to_dict()))["differences"]["adapter.r"] == [2, 4]
