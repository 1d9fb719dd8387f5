"""oneDNN's linear layers are the layers they stand in for, and stand in only where they may."""

import pytest
import torch
from torch import nn

from lora_one.backends.torch.passes import frozen_linear
from lora_one.backends.torch.passes.frozen_linear import frozen_linears, product_of_rows

needs_onednn = pytest.mark.skipif(frozen_linear._ONEDNN is None, reason="this PyTorch has no oneDNN operator")


@pytest.fixture
def calls(monkeypatch):
    """The shapes of what oneDNN multiplies."""
    found = []
    original = frozen_linear._by_onednn
    monkeypatch.setattr(frozen_linear, "_by_onednn", lambda x, w, b: found.append(tuple(w.shape)) or original(x, w, b))
    return found


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradient_are_the_layers_own(calls, bias):
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
    assert calls[:2] == [(20, 30), (30, 20)] and "forward" not in vars(layer)


@needs_onednn
def test_a_product_of_rows(calls):
    a, b = torch.randn(50, 7).mT, torch.randn(50, 9).mT
    torch.testing.assert_close(product_of_rows(a, b), a @ b.mT)
    torch.testing.assert_close(product_of_rows(a.double(), b.double()), a.double() @ b.double().mT)
    assert product_of_rows(a[:, :0], b[:, :0]).shape == (7, 9)
    assert len(calls) == 1


LAYOUTS = {
    "expanded": torch.randn(7, generator=torch.Generator().manual_seed(0)).expand(50, 7),
    "one number": torch.ones(()).expand(50, 7),  # as the gradient of a sum is
    "strided": torch.randn(100, 14, generator=torch.Generator().manual_seed(0))[::2, ::2],
    "transposed": torch.randn(7, 50, generator=torch.Generator().manual_seed(0)).mT,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_however_the_memory_lies(layout):
    x, dense = LAYOUTS[layout], torch.randn(50, 9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(product_of_rows(x.mT, dense.mT), x.contiguous().mT @ dense)
    torch.testing.assert_close(product_of_rows(dense.mT, x.mT), dense.mT @ x.contiguous())
    layer = nn.Linear(7, 4).requires_grad_(False)
    with frozen_linears(layer):
        y = layer(x)
    torch.testing.assert_close(y, layer(x.contiguous()))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_everything_else_stays_as_it_is(calls):
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
    assert calls == [] and hooked.forward(x) is x
