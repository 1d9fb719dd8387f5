"""Frozen linear layers compute what the layers they replace compute, and replace only what they may."""

import pytest
import torch
from torch import nn

from lora_one.backends.torch.linalg import onednn
from lora_one.backends.torch.passes.frozen_linear import frozen_linears
from tests.backends.torch.models import LAYOUTS


@pytest.mark.skipif(onednn._ONEDNN is None, reason="this PyTorch has no oneDNN operator")
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradient_are_the_layers_own(onednn_calls, bias):
    torch.manual_seed(0)
    layer = nn.Linear(30, 20, bias=bias).requires_grad_(False)
    x = torch.randn(2, 3, 30, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).pow(2).sum(), x)
    with frozen_linears(layer):
        y = layer(x)
        (got,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(got.pow(2).sum(), x)
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(got, expected)
    gram = 2 * layer.weight.double().mT @ layer.weight.double()
    torch.testing.assert_close(second.double(), 2 * got.detach().double() @ gram, rtol=1e-4, atol=1e-4)
    assert onednn_calls[:2] == [(20, 30), (30, 20)] and "forward" not in vars(layer)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_however_the_memory_lies(layout):
    x, layer = LAYOUTS[layout], nn.Linear(7, 4).requires_grad_(False)
    with frozen_linears(layer):
        y = layer(x)
    torch.testing.assert_close(y, layer(x.contiguous()))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_everything_else_stays_as_it_is(onednn_calls):
    x = torch.randn(3, 8)
    hooked = nn.Linear(8, 8).requires_grad_(False)
    hooked.forward = lambda x: x
    for layer, of in (
        (nn.Linear(8, 8), x),  # it learns
        (Doubled(8, 8).requires_grad_(False), x),
        (hooked, x),
        (nn.Linear(8, 8, dtype=torch.bfloat16).requires_grad_(False), x.bfloat16()),
        (nn.Linear(8, 8, dtype=torch.float64).requires_grad_(False), x.double()),
    ):
        expected = layer(of)
        with frozen_linears(layer):
            assert torch.equal(layer(of), expected)
    with frozen_linears(plain := nn.Linear(8, 8).requires_grad_(False)), torch.autocast("cpu", dtype=torch.bfloat16):
        assert plain(x).dtype == torch.bfloat16
    assert onednn_calls == [] and hooked.forward(x) is x
