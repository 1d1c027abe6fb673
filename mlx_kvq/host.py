"""The program that a model comes from, mlx-lm or mlx-vlm, and the cache classes it makes.

mlx-vlm has its own copies of mlx-lm's cache classes and of its attention function. They look and
behave alike and are other classes. It is asked for only where it has been imported already.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache

LM, VLM = "mlx_lm", "mlx_vlm"
# What an mlx-vlm language model keeps from one call to the next: positions of the last prompt.
STATE = ("_position_ids", "_rope_deltas")


def name_of(model: object) -> str:
    """The program that a model comes from."""
    return VLM if type(model).__module__.startswith(f"{VLM}.") else LM


def cache_module(model: object) -> Any:
    """The module whose cache classes a model's ``make_cache`` uses."""
    return sys.modules[f"{VLM}.models.cache"] if name_of(model) == VLM else mlx_lm_cache


def classes(name: str) -> tuple[type, ...]:
    """The cache classes of this name, of every program that has been imported."""
    found = [getattr(mlx_lm_cache, name)]
    if (theirs := sys.modules.get(f"{VLM}.models.cache")) is not None:
        found.append(getattr(theirs, name, found[0]))
    return tuple(found)


def is_growing(cache: object) -> bool:
    return type(cache) in classes("KVCache")


def is_rotating(cache: object) -> bool:
    return type(cache) in classes("RotatingKVCache")


def bounded(cache: Any, max_size: int, keep: int) -> Any:
    """A rotating cache of the same program in place of a growing one."""
    return sys.modules[type(cache).__module__].RotatingKVCache(max_size, keep)


def is_list(cache: Any) -> bool:
    return isinstance(cache, classes("CacheList"))


def language_model(model: Any) -> Any:
    """What reads tokens and has the caches: in mlx-vlm the ``language_model`` of a model that also
    sees or hears, elsewhere the model itself."""
    inner = getattr(model, "language_model", None)
    return inner if name_of(model) == VLM and isinstance(inner, nn.Module) else model


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Trial runs in here leave no positions behind in an mlx-vlm language model."""
    before = {name: getattr(model, name) for name in STATE if hasattr(model, name)}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(model, name, value)
