"""Where mlx-lm is led to the packed caches: replaced functions, no model file touched.

- ``base.quantized_scaled_dot_product_attention``, which ``base.scaled_dot_product_attention``
  looks up at call time for every cache that has ``bits``: packed keys go to our attention,
  anything else to the original.
- ``base.scaled_dot_product_attention``, wherever it was imported: mlx-lm's refuses attention
  sinks for a cache that has ``bits``, and does not see that a layer which reads the keys of
  another layer, and has no cache of its own, got packed ones.
- ``make_prompt_cache``, in ``mlx_lm.models.cache`` and wherever it was imported: for an enabled
  model it honours ``max_kv_size``, which mlx-lm leaves out for a model with its own caches.
- ``trim_prompt_cache`` and ``can_trim_prompt_cache`` in ``mlx_lm.generate``, where speculative
  decoding rewinds by the one and asks the other whether it can: a rotating cache that is full can
  give back the tokens of the last chunk, no matter what ``is_trimmable`` says of any number.
- ``maybe_quantize_kv_cache`` there, through which ``kv_bits`` reaches a cache, and which passes
  over packed ones without a word: two ways to quantize the cache are an error.
- ``save_prompt_cache`` and ``load_prompt_cache``, which then hash and check files of packed
  caches (``mlx_kvq.prompt_cache``); ``mlx_lm.models.cache``'s globals hold our cache classes,
  where the latter looks.
"""

import functools
import sys
from collections.abc import Callable
from importlib import import_module

from mlx_lm.models import base
from mlx_lm.models import cache as stock

from . import batch, cache
from .attention import PackedView, packed_attention

CLASSES = (
    cache.PackedKVCache,
    cache.PackedRotatingKVCache,
    batch.PackedBatchKVCache,
    batch.PackedBatchRotatingKVCache,
)


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

    _replace(original_attention, attention)

    original_shared = base.scaled_dot_product_attention

    @functools.wraps(original_shared)
    def shared(queries, keys, values, cache, scale, mask, sinks=None):
        if isinstance(keys, PackedView):
            return packed_attention(queries, keys, values, scale, mask, sinks)
        if sinks is not None and not isinstance(getattr(cache, "bits", 0), int):
            # What records queries for a calibration, and can take sinks.
            record: Callable = base.quantized_scaled_dot_product_attention
            return record(queries, keys, values, scale, mask, bits=cache.bits, sinks=sinks)
        return original_shared(queries, keys, values, cache, scale, mask, sinks)

    _replace(original_shared, shared)

    original_make = stock.make_prompt_cache

    @functools.wraps(original_make)
    def make_prompt_cache(model, max_kv_size=None):
        factory = vars(model).get("make_cache")
        if isinstance(factory, CacheFactory):
            return factory(max_kv_size)
        return original_make(model, max_kv_size)

    make_prompt_cache._mlx_kvq = True  # type: ignore[attr-defined]
    _replace(original_make, make_prompt_cache)
    for cls in CLASSES:
        setattr(stock, cls.__name__, cls)
    from . import prompt_cache  # which needs what needs this module

    _replace(stock.save_prompt_cache, prompt_cache.saving(stock.save_prompt_cache))
    _replace(stock.load_prompt_cache, prompt_cache.loading(stock.load_prompt_cache))
    # The package's attribute of that name is the function generate.
    generate = vars(import_module("mlx_lm.generate"))
    generate["trim_prompt_cache"], generate["can_trim_prompt_cache"] = rewind, can_speculate
    from . import prompts

    _replace(generate["generate_step"], prompts.generating(generate["generate_step"]))
    _replace(
        generate["speculative_generate_step"],
        prompts.drafting(generate["speculative_generate_step"]),
    )
    for owner, name, wrap in (
        (generate["PromptProcessingBatch"], "prompt", prompts.reading),
        (stock.LRUPromptCache, "fetch_nearest_cache", prompts.fetching),
    ):
        setattr(owner, name, wrap(getattr(owner, name)))
    original_quantize = generate["maybe_quantize_kv_cache"]

    @functools.wraps(original_quantize)
    def quantize(prompt_cache, quantized_kv_start, kv_group_size, kv_bits):
        if kv_bits is not None:
            disable = "; mlx_kvq.disable(model) gives a model its own cache back"
            refuse_kv_bits(prompt_cache, f"kv_bits={kv_bits}", disable)
        return original_quantize(prompt_cache, quantized_kv_start, kv_group_size, kv_bits)

    _replace(original_quantize, quantize)


def refuse_kv_bits(caches, asked: str, hint: str = "") -> None:
    """Raise a ``ValueError`` if ``asked``, mlx-lm's own quantization, meets a packed cache."""
    for c in caches:
        if isinstance(c, stock.CacheList):
            refuse_kv_bits(c.caches, asked, hint)
        elif isinstance(c, CLASSES):
            raise ValueError(
                f"{asked} is for mlx-lm's own cache, and this one is packed already "
                f"('{c.format.spec}'): leave one of them out{hint}."
            )


def can_speculate(caches: list) -> bool:
    """``can_trim_prompt_cache`` for speculative decoding over these caches."""
    return all(c.is_trimmable() or isinstance(c, cache.PackedRotatingKVCache) for c in caches)


def rewind(caches: list, n: int) -> int:
    """``trim_prompt_cache`` for the last ``n`` tokens of what was just fed."""

    def rewinds(c) -> bool:
        return c.is_trimmable() or (isinstance(c, cache.PackedRotatingKVCache) and c.can_rewind(n))

    if not caches or not all(rewinds(c) for c in caches):
        return 0
    return [c.trim(n) if c.is_trimmable() else c.rewind(n) for c in caches][0]


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
