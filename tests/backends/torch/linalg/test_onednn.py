"""oneDNN's product is the product, and is used only where it may be."""

import pytest
import torch

from lora_one.backends.torch.linalg import onednn
from lora_one.backends.torch.linalg.onednn import product_of_rows
from tests.backends.torch.models import LAYOUTS


@pytest.mark.skipif(onednn._ONEDNN is None, reason="this PyTorch has no oneDNN operator")
def test_a_product_of_rows(onednn_calls):
    a, b = torch.randn(50, 7).mT, torch.randn(50, 9).mT
    torch.testing.assert_close(product_of_rows(a, b), a @ b.mT)
    torch.testing.assert_close(product_of_rows(a.double(), b.double()), a.double() @ b.double().mT)
    assert product_of_rows(a[:, :0], b[:, :0]).shape == (7, 9)
    assert len(onednn_calls) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_however_the_memory_lies(layout):
    x, dense = LAYOUTS[layout], torch.randn(50, 9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(product_of_rows(x.mT, dense.mT), x.contiguous().mT @ dense)
    torch.testing.assert_close(product_of_rows(dense.mT, x.mT), dense.mT @ x.contiguous())
