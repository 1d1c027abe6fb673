"""Trial runs of a model on packed caches, to find what it cannot run on."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ..stock import watch


def first_failure(model: nn.Module, caches: list) -> tuple[tuple[int, ...], Exception] | None:
    """The cache after whose update the model raises, if it does on a prompt, a chunk, a token."""
    last: list[tuple[int, ...]] = [()]
    watch(caches, lambda path, keys, values: last.__setitem__(0, path))
    try:
        for tokens in ([0, 0], [0, 0], [0]):
            model(mx.array([tokens]), cache=caches)
    except Exception as error:
        return last[0], error
    return None


def batch_failure(model: nn.Module, make: Callable) -> str:
    """What the model raises on three sequences together, if mlx-lm's server would try that."""
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
