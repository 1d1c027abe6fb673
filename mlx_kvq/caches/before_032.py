"""What an mlx-lm before 0.32 does otherwise: prompt-cache files, and bounded caches in a batch.

There a cache's state is arrays alone and numbers go into strings. Ours has mlx-lm 0.32's form, and
these write and read its file, of packed caches only; any other file is mlx-lm's.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import cache as stock

from ..stock import factory_of

OURS = "0.mlx_kvq"  # in the metadata of a file with packed caches


def needed() -> bool:
    """Whether this mlx-lm is one."""
    return hasattr(stock._BaseCache, "meta_state")


def bounding(make_new_cache: Callable) -> Callable:
    """``BatchGenerator._make_new_cache``, whose ``max_kv_size`` bounds mlx-lm's own caches only."""

    def wrapper(self):
        if self.max_kv_size is not None and factory_of(self.model) is not None:
            return stock.make_prompt_cache(self.model, self.max_kv_size)
        return make_new_cache(self)

    return wrapper


def saving(original: Callable) -> Callable:
    """``save_prompt_cache``; metadata with ``mlx_kvq`` in it is that of packed caches."""

    def save_prompt_cache(file_name, cache, metadata=None):
        if "mlx_kvq" not in (metadata or {}):
            return original(file_name, cache, metadata or {})
        for c in cache:
            if not type(c).__name__.startswith("Packed"):
                raise ValueError(
                    f"With mlx-lm before 0.32 a prompt-cache file holds packed caches or mlx-lm's, "
                    f"not both; this is a {type(c).__name__} beside packed ones."
                )
        scalars: list[Any] = [""]
        arrays = {}
        states: Any = tree_flatten([c.state for c in cache])
        for at, x in states:
            if isinstance(x, int | float | bool):
                scalars.append((at, "scalar"))
            elif isinstance(x, str):
                scalars.append((at, "string" if x else "empty"))
                x = [ord(char) for char in x or "-"]
            elif x is None:
                scalars.append((at, "none"))
                x = [0]  # mlx before 0.32.1 writes no empty array
            arrays[at] = x if isinstance(x, mx.array) else mx.array(x)
        notes: list[Any] = [metadata, [type(c).__name__ for c in cache], scalars]
        mx.save_safetensors(file_name, arrays, dict(tree_flatten(notes)))

    return save_prompt_cache


def loading(original: Callable) -> Callable:
    """``load_prompt_cache`` of what :func:`saving` wrote."""

    def load_prompt_cache(file_name, return_metadata=False):
        loaded: Any = mx.load(file_name, return_metadata=True)
        arrays, notes = loaded
        if OURS not in notes:
            return original(file_name, return_metadata)
        found: Any = tree_unflatten(list(notes.items()))
        metadata, classes, scalars = found
        for at, kind in scalars[1:]:
            if kind == "scalar":
                arrays[at] = arrays[at].item()
            elif kind == "string":
                arrays[at] = "".join(chr(char) for char in arrays[at].tolist())
            elif kind == "empty":
                arrays[at] = ""
            else:
                arrays[at] = None
        states = tree_unflatten(list(arrays.items()))
        caches = [
            vars(stock)[name].from_state(state, "")
            for name, state in zip(classes, states, strict=True)
        ]
        return (caches, metadata) if return_metadata else caches

    return load_prompt_cache
