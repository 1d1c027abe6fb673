"""Trial runs of a model on packed caches, which not every model can attend to.

They run on plain operations: next to nothing of them is computed, and the kernels for these shapes
and formats would be compiled for nothing (tests/ops/test_compiled.py).
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from ..stock import CachePath, watch


@ops.reference()
def first_failure(model: nn.Module, caches: list) -> tuple[CachePath, Exception] | None:
    """The error of a prompt, a chunk and a token, if any, and the path of the cache updated last
    before it."""
    last: CachePath = ()

    def seen(path: CachePath, keys, values) -> None:
        nonlocal last
        last = path

    watch(caches, seen)
    try:
        for tokens in ([0, 0], [0, 0], [0]):
            model(mx.array([tokens]), cache=caches)
    except Exception as error:
        return last, error
    return None


@ops.reference()
def batch_failure(model: nn.Module, make: Callable) -> str:
    """Name of the error that three sequences raise together; empty if there is none, or if
    mlx-lm's server would not batch these caches."""
    singles = []
    for length in (3, 1, 2):
        singles.append(make())
        model(mx.array([[0] * length]), cache=singles[-1])
    if not all(hasattr(cache, "merge") for cache in singles[0]):
        return ""
    try:
        batch = [caches[0].merge(list(caches)) for caches in zip(*singles, strict=True)]
        model(mx.array([[0]] * 3), cache=batch)
    except Exception as error:
        return type(error).__name__
    return ""
