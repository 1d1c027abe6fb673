"""Where mlx-vlm is led to the packed caches; ``seams`` puts these in place.

mlx-vlm has the classes and the functions of mlx-lm as its own. Its generator makes caches with the
language model's ``make_cache``, which an enabled model has replaced, and turns them into those of
a batch by their method ``to_batch``. What is left to change:

- ``models.base.scaled_dot_product_attention``: packed keys go to our attention, and so does what
  records queries for a calibration.
- ``models.cache.make_prompt_cache``: as in mlx-lm.
- ``generate.common.maybe_quantize_kv_cache``: two ways to quantize the cache are an error.
- ``generate.ar.generate_step`` and ``PromptProcessingBatch``: caches learn what is a prompt.
- ``generate.common.PromptCacheState.find_prefix_length``: where a kept cache can go on.
- ``speculative.utils.make_speculative_prompt_cache``, and a draft model in ``generate_step``: its
  verification reads and rewinds the arrays of its own caches, so packed ones are an error.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from mlx_lm.models import base

from ..host import language_model
from ..stock import leaves
from .attention import packed_attention
from .packed import PackedCache
from .prompts import ALL, expected, resume
from .view import PackedView

NO_DRAFT = (
    "mlx-vlm's speculative decoding reads the arrays of its own caches: leave out the draft model, "
    "or give the model its own cache back with mlx_kvq.disable(model)."
)


def attention(original: Callable) -> Callable:
    """``scaled_dot_product_attention``."""

    def attend(queries, keys, values, cache, scale, mask, sinks=None, *more):
        if isinstance(keys, PackedView):
            return packed_attention(queries, keys, values, scale, mask, sinks)
        if not isinstance(getattr(cache, "bits", 0), int | float):
            # What records queries for a calibration stands in for mlx-lm's function.
            record: Callable = base.quantized_scaled_dot_product_attention
            return record(queries, keys, values, scale, mask, bits=cache.bits, sinks=sinks)
        return original(queries, keys, values, cache, scale, mask, sinks, *more)

    return attend


def _is_packed(caches: Any) -> bool:
    return any(isinstance(c, PackedCache) for _, c in leaves(caches or []))


def generating(generate_step: Callable) -> Callable:
    """``generate_step``, which then reads all of a prompt but its last token as one."""
    signature = inspect.signature(generate_step)

    @functools.wraps(generate_step)
    def wrapper(input_ids, model, *args, **kwargs):
        given = signature.bind(input_ids, model, *args, **kwargs)
        options = given.arguments
        caches = options.get("prompt_cache")
        if caches is None:
            make = sys.modules["mlx_vlm.models.cache"].make_prompt_cache
            caches = make(language_model(model), max_kv_size=options.get("max_kv_size"))
            options["prompt_cache"] = caches
        if options.get("draft_model") is not None and _is_packed(caches):
            raise ValueError(NO_DRAFT)
        with expected(caches, input_ids.shape[-1] - 1):
            yield from generate_step(*given.args, **given.kwargs)

    return wrapper


def reading(prompt_step: Callable) -> Callable:
    """``PromptProcessingBatch.prompt_step``, whose tokens are all of a prompt."""

    @functools.wraps(prompt_step)
    def wrapper(self, *args, **kwargs):
        with expected(self.prompt_cache, ALL):
            return prompt_step(self, *args, **kwargs)

    return wrapper


def finishing(generate: Callable) -> Callable:
    """``PromptProcessingBatch.generate``, whose last token is read as a decoded one."""

    @functools.wraps(generate)
    def wrapper(self, *args, **kwargs):
        caches = self.prompt_cache
        with expected(caches, self._input_ids.shape[1] - 1):
            return generate(self, *args, **kwargs)

    return wrapper


def finding(find_prefix_length: Callable) -> Callable:
    """``PromptCacheState.find_prefix_length``: tokens of a new prompt that its caches, cut to
    them, go on from as if the prompt had been read at once."""

    @functools.wraps(find_prefix_length)
    def wrapper(self, new_ids):
        at = find_prefix_length(self, new_ids)
        if not at or not _is_packed(self.cache):
            return at
        every: list[Any] = [c for _, c in leaves(self.cache)]
        extra = max(c.offset for c in every) - at
        if extra > 0:
            if not all(c.is_trimmable() for c in every):
                return at  # which mlx-vlm then reads anew
            for c in every:
                c.trim(extra)
        return resume(self.cache, at, len(new_ids))

    return wrapper


def drafting(make_speculative_prompt_cache: Callable) -> Callable:
    """``make_speculative_prompt_cache``, which refuses packed caches."""

    @functools.wraps(make_speculative_prompt_cache)
    def wrapper(*args, **kwargs):
        made = make_speculative_prompt_cache(*args, **kwargs)
        if _is_packed(made):
            raise ValueError(NO_DRAFT)
        return made

    return wrapper


def leave_prefix_cache(kinds: Iterable[type]) -> None:
    """Tell mlx-vlm's automatic prefix caching, which copies arrays of its own caches, to leave
    caches of these classes alone: prompts are then read anew."""
    adapters = import_module("mlx_vlm.apc_adapters")
    for kind in kinds:
        adapters.register_capability(kind, adapters.Capability.UNSUPPORTED)
