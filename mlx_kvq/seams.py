"""Where mlx-lm is led to the packed caches: three replaced functions, no model file touched.

- ``base.quantized_scaled_dot_product_attention``, which ``base.scaled_dot_product_attention``
  looks up at call time for every cache that has ``bits``: packed keys go to our attention,
  anything else to the original.
- ``make_prompt_cache``, in ``mlx_lm.models.cache`` and wherever it was imported: for an enabled
  model it honours ``max_kv_size``, which mlx-lm leaves out for a model with its own caches.
- ``mlx_lm.models.cache``'s globals hold our cache classes, where ``load_prompt_cache`` looks.
"""

import functools
import sys
from collections.abc import Callable

from mlx_lm.models import base
from mlx_lm.models import cache as stock

from . import cache as packed
from .attention import PackedView, packed_attention


def install() -> None:
    """Put the functions in place; a second call does nothing."""
    if getattr(stock.make_prompt_cache, "_mlx_kvq", False):
        return
    original_attention = base.quantized_scaled_dot_product_attention

    @functools.wraps(original_attention)
    def attention(queries, keys, values, scale, mask, **kwargs):
        if isinstance(keys, PackedView):
            return packed_attention(queries, keys, values, scale, mask)
        return original_attention(queries, keys, values, scale=scale, mask=mask, **kwargs)

    setattr(base, "quantized_scaled_dot_product_attention", attention)  # noqa: B010 (for mypy)

    original_make = stock.make_prompt_cache

    @functools.wraps(original_make)
    def make_prompt_cache(model, max_kv_size=None):
        factory = vars(model).get("make_cache")
        if isinstance(factory, CacheFactory):
            return factory(max_kv_size)
        return original_make(model, max_kv_size)

    make_prompt_cache._mlx_kvq = True  # type: ignore[attr-defined]
    _replace(original_make, make_prompt_cache)
    for cls in packed.CLASSES:
        setattr(stock, cls.__name__, cls)


class CacheFactory:
    """``model.make_cache`` of an enabled model.

    Args:
        make: Called with ``max_kv_size`` (int or None); returns the list of caches.
    """

    def __init__(self, make: Callable[[int | None], list]):
        self._make = make

    def __call__(self, max_kv_size: int | None = None) -> list:
        return self._make(max_kv_size)


def _replace(old, new) -> None:
    """Rebind a function of mlx-lm in every module that has imported it."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "mlx_lm":
            for key, value in list(vars(module).items()):
                if value is old:
                    setattr(module, key, new)
