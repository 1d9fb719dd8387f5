"""Blocks that compute their activations again: as many as needed, with the same numbers, and the model restored."""

import dataclasses
from collections import Counter

import pytest
import torch
from transformers import DynamicCache

import lora_one
from lora_one.backends.torch import TorchSession
from lora_one.backends.torch.linalg import onednn
from lora_one.backends.torch.passes import recompute as module
from lora_one.backends.torch.passes.recompute import Recompute
from lora_one.errors import ConfigError, ModelError
from tests.backends.torch.models import CASES, llama, mlp

EXACT = lora_one.Config(rank=4, gradient="exact")
CPU = torch.device("cpu")


def count_forwards(model) -> list[int]:
    """The number of forward passes of each block, counted from here on."""
    counts = [0] * len(model.model.layers)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, i=i: counts.__setitem__(i, counts[i] + 1))
    return counts


def start(case, **settings):
    model, _ = lora_one.init(case.model, case.batches, case.loss_fn, dataclasses.replace(EXACT, **settings))
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("gradient", ["exact", "sketch"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "mlp"])
def test_the_start_is_the_same(name, gradient):
    kept = start(CASES[name](), gradient=gradient, recompute=False)
    case = CASES[name]()
    again = start(case, gradient=gradient, recompute=True)
    for key, factor in kept.items():
        assert torch.equal(factor, again[key])
    assert not any("forward" in vars(m) for m in case.model.modules())


def test_true_recomputes_every_block_and_false_none():
    for recompute, forwards in ((True, 2), (False, 1)):
        case = llama()
        counts = count_forwards(case.model)
        start(case, recompute=recompute)
        assert counts == [forwards * len(case.batches)] * 2


@pytest.mark.parametrize("gradient", ["exact", "sketch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_a_block_ends_before_its_last_product(monkeypatch, dtype, gradient):
    """The product's input is kept, and nothing needs its output."""
    products = Counter()
    original = onednn.linear

    def count(x, weight, bias):
        products[weight.data_ptr()] += 1
        return original(x, weight, bias)

    monkeypatch.setattr(onednn, "linear", count)
    case = llama(dtype)
    layers = case.model.model.layers[1].mlp
    weights = {name: getattr(layers, name).weight.data_ptr() for name in ("gate_proj", "up_proj", "down_proj")}
    _, report = lora_one.init(
        case.model, case.batches, None, lora_one.Config(rank=4, gradient=gradient, recompute=True)
    )
    counts = {name: products[pointer] / report.passes / len(case.batches) for name, pointer in weights.items()}
    assert counts == {"gate_proj": 3, "up_proj": 3, "down_proj": 2}  # forward, again, and backward


def block_bytes(index: int) -> int:
    """What a block keeps in an exact pass, counted without the code under test."""
    saved = {}
    case = llama()
    block = case.model.model.layers[index]
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(), x
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with TorchSession(case.model, case.batches[:1], None, dataclasses.replace(EXACT, recompute=False)) as session:
        block.register_forward_pre_hook(lambda *_: hooks.__enter__())
        block.register_forward_hook(lambda *_: hooks.__exit__())
        session.exact_pass(lambda *_: None)
    return sum(size for pointer, (size, _) in saved.items() if pointer not in weights)


@pytest.mark.parametrize(("fits", "expected"), [(0, [3, 4]), (1, [2, 4]), (2, [2, 2]), (None, [2, 2])])
def test_auto_keeps_what_fits_in_half_of_the_free_memory(monkeypatch, fits, expected):
    """There are two blocks and two batches. The first block is always kept, since nothing tells its size before."""
    one = block_bytes(1)
    free = None if fits is None else int(2 * one * (fits + 0.5))
    monkeypatch.setattr(module, "_free_memory", lambda device: free)
    case = llama()
    counts = count_forwards(case.model)
    with torch.no_grad():
        case.model(**case.batches[0])  # the counters count
    assert counts == [1, 1]
    start(case)
    assert [c - 1 for c in counts] == expected


def test_what_a_block_keeps_is_counted_to_the_byte(monkeypatch):
    first, second = block_bytes(0), block_bytes(1)
    assert first < second  # the first one's input needs no gradient
    kept = []
    leave = Recompute.__exit__

    def noted(self, *error):
        kept.append((self._last, self._kept))
        leave(self, *error)

    monkeypatch.setattr(Recompute, "__exit__", noted)
    case = llama()
    case.batches.pop()
    start(case)
    assert kept == [(second, first + second)]


class Int8(torch.Tensor):
    """A weight like torchao's: a wrapper around other tensors, without its own storage."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def wide(self):
        return self.values * self.scale

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            x, weight, *bias = args
            return Product.apply(x, weight) + (bias[0] if bias and bias[0] is not None else 0.0)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return type(args[0])(args[0].values, args[0].scale)
        raise NotImplementedError(str(function))


class Flattened(Int8):
    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Flattened(inner["values"], inner["scale"])


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.wide().mT

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.saved_tensors[0].wide(), None


def in_int8(kind):
    """A Llama's MLPs with weights in 8 bits, or (None) the same numbers in float32."""
    case = llama()
    for block in case.model.model.layers:
        for layer in block.mlp.children():
            if isinstance(layer, torch.nn.Linear):
                scale = layer.weight.detach().abs().amax(dim=1, keepdim=True) / 127
                quantised = (kind or Flattened)((layer.weight.detach() / scale).round().to(torch.int8), scale)
                weight = quantised.wide() if kind is None else quantised
                layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return case


@pytest.mark.parametrize("recompute", ["auto", True, False])
@pytest.mark.parametrize("kind", [Int8, Flattened])
def test_weights_without_a_storage_of_their_own(kind, recompute):
    expected = start(in_int8(None), recompute=False)
    got = start(in_int8(kind), recompute=recompute)
    for key, factor in expected.items():
        torch.testing.assert_close(got[key].abs(), factor.abs(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", [Int8, Flattened])
def test_what_a_wrapper_is_made_of_is_counted_once_and_a_blocks_own_not_at_all(kind):
    values, scale = torch.zeros(6, 5, dtype=torch.int8), torch.ones(6, 1)
    block = torch.nn.Linear(5, 6, bias=False)
    block.weight = torch.nn.Parameter(kind(values, scale), requires_grad=False)
    saved = module._Saved(block)
    saved.pack(block.weight)
    assert saved.bytes == 0
    other = kind(values.clone(), scale.clone())
    for _ in range(2):
        saved.pack(other)
    assert saved.bytes == (6 * 5 + 6 * 4 if kind is Flattened else 6 * 5 * 4)  # of what is not known its own claim


def test_a_block_that_is_given_a_cache_is_not_run_twice():
    case = llama()
    counts = count_forwards(case.model)

    def loss_fn(model, batch):
        return model(**batch, past_key_values=DynamicCache()).loss

    start(case._replace(loss_fn=loss_fn), recompute=True)
    assert counts == [len(case.batches)] * 2


def test_checkpointing_that_is_on_already_is_left_alone():
    case = llama()
    case.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    case.model.train()
    counts = count_forwards(case.model)
    start(case, recompute=True)
    assert counts == [2 * len(case.batches)] * 2


def test_free_memory_of_this_machine():
    assert 2**20 < module._free_memory(CPU) < 2**50
    assert module._free_memory(torch.device("meta")) is None


def test_a_model_without_blocks_and_a_setting_that_cannot_be():
    case = mlp()
    with pytest.raises(ModelError, match="blocks that transformers can checkpoint, and the model has none"):
        lora_one.init(case.model, case.batches, case.loss_fn, lora_one.Config(rank=4, recompute=True))
    assert not any("lora" in name for name, _ in case.model.named_modules())
    with pytest.raises(ConfigError, match="recompute must be one of 'auto', True, False, got 'some'"):
        lora_one.Config(recompute="some")
