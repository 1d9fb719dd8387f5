"""Fixtures of several files in this folder."""

import pytest

from lora_one.backends.torch.linalg import onednn


@pytest.fixture
def onednn_calls(monkeypatch):
    """The shapes of the weights that oneDNN multiplies with."""
    shapes = []
    original = onednn._by_onednn
    monkeypatch.setattr(onednn, "_by_onednn", lambda x, w, b: shapes.append(tuple(w.shape)) or original(x, w, b))
    return shapes
