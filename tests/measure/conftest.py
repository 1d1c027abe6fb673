"""Models that several files here measure, loaded once a file."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from tests.support.float32 import load_float32


@pytest.fixture(scope="module")
def qwen():
    return load_float32("tiny-qwen2-8bit")


@pytest.fixture(scope="module")
def gemma():
    return load_float32("tiny-gemma3-8bit")


@pytest.fixture(autouse=True)
def known_tokens(monkeypatch):
    """Models are given tokens that they have: MLX looks up any number, wherever that is."""
    original = nn.Embedding.__call__

    def looked_up(self, x):
        assert mx.all((x >= 0) & (x < self.weight.shape[0])), x.max()
        return original(self, x)

    monkeypatch.setattr(nn.Embedding, "__call__", looked_up)
