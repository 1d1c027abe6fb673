"""Where rapid-mlx takes tokens off a known prompt's cache.

It rebuilds all but rotating caches as mlx-lm's own, of arrays ``keys`` and ``values``, which a
packed cache has not, and the request ends in an error. Packed ones are copied and trimmed here.
"""

import copy
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from ..stock import leaves
from . import trampoline
from .packed import PackedCache

NAME = "rapid_mlx"


def install() -> None:
    """Change rapid-mlx, where it is running and trims in that way."""
    if NAME not in sys.modules:
        return
    try:
        module = import_module(f"{NAME}.memory_cache")
    except ImportError:
        return
    found = trampoline.function(getattr(module, "_trim_cache_offset", None))
    if found is not None:
        trampoline.replace(found, trimming)


def trimming(trim_cache_offset: Callable) -> Callable:
    """``_trim_cache_offset``: copies of caches without their last tokens, or None."""

    def wrapper(cache, trim_by, *more, **named):
        every: list[Any] = [c for _, c in leaves(c for c in cache if c is not None)]
        if not any(isinstance(c, PackedCache) for c in every):
            return trim_cache_offset(cache, trim_by, *more, **named)
        if trim_by > 0 and not all(c.is_trimmable() and c.offset >= trim_by for c in every):
            return None
        copies = copy.deepcopy(list(cache))
        for _, c in leaves(c for c in copies if c is not None):
            c.trim(max(trim_by, 0))
        return copies

    return wrapper
