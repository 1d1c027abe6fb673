"""Models that several files here measure, loaded once a file."""

import pytest

from tests.support.float32 import load_float32


@pytest.fixture(scope="module")
def qwen():
    return load_float32("tiny-qwen2-8bit")


@pytest.fixture(scope="module")
def gemma():
    return load_float32("tiny-gemma3-8bit")
