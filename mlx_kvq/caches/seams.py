"""Where mlx-lm is led to the packed caches: replaced functions, no model file touched.

``SEAMS`` lists them all, and ``VLM_SEAMS`` those of mlx-vlm (``mlx_kvq.caches.vlm``); rapid-mlx has
one (``mlx_kvq.caches.rapid``). ``install``
looks every name up before it changes anything, so that a program whose names moved is refused
whole. The function objects themselves are changed (``trampoline``): whoever imported them, by
whatever name and however early, gets the replacement.

- ``base.quantized_scaled_dot_product_attention``, which ``base.scaled_dot_product_attention``
  looks up at call time for every cache that has ``bits``: packed keys go to our attention,
  anything else to the original.
- ``base.scaled_dot_product_attention``: mlx-lm's refuses attention sinks for a cache that has
  ``bits``, and does not see that a layer which reads the keys of another layer, and has no cache
  of its own, got packed ones.
- ``cache.make_prompt_cache``: for an enabled model it honours ``max_kv_size``, which mlx-lm
  leaves out for a model with its own caches; either half of a wrapper (an image model and its
  language model) finds what the other half was enabled with.
- ``cache.trim_prompt_cache`` and ``cache.can_trim_prompt_cache``, called from ``mlx_lm.generate``,
  where speculative decoding rewinds by the one and asks the other whether it can: a rotating cache
  that is full can give back the tokens of the last chunk, no matter what ``is_trimmable`` says of
  any number.
- ``generate.maybe_quantize_kv_cache``, through which ``kv_bits`` reaches a cache, and which passes
  over packed ones without a word: two ways to quantize the cache are an error.
- ``generate.speculative_generate_step``: packed caches without any of the draft model are an
  error.
- ``generate.generate_step``, ``generate.speculative_generate_step``,
  ``generate.PromptProcessingBatch.prompt`` and ``cache.LRUPromptCache.fetch_nearest_cache``: caches
  learn what of a prompt is to come, and where a cached one can go on (``mlx_kvq.caches.prompts``).
- ``generate.BatchGenerator.insert_segments``: programs that bound caches themselves know mlx-lm's
  growing ones by their class, and hand on packed ones without the bound.
- ``generate.BatchGenerator._make_new_cache``, before mlx-lm 0.32 (``before_032``).
- ``cache.save_prompt_cache`` and ``cache.load_prompt_cache``, which then hash and check files of
  packed caches (``mlx_kvq.caches.prompt_file``); ``mlx_lm.models.cache``'s globals hold our cache
  classes, where the latter looks.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import FunctionType
from typing import Any

from mlx_lm.models import base
from mlx_lm.models import cache as stock

from ..host import VLM, is_list, name_of
from ..stock import factory_of, leaves
from ..stock_names import missing
from . import (
    batch,
    batch_rotating,
    before_032,
    prompt_file,
    prompts,
    rapid,
    rotating,
    single,
    trampoline,
    vlm,
)
from .attention import packed_attention
from .view import PackedView

CLASSES = (
    single.PackedKVCache,
    rotating.PackedRotatingKVCache,
    batch.PackedBatchKVCache,
    batch_rotating.PackedBatchRotatingKVCache,
)


@dataclass(frozen=True)
class Seam:
    """A function of mlx-lm and what takes its place.

    Args:
        module (str): In the program's package.
        name (str): Of a function, or ``Class.method``.
        make: Called with the original, returns the replacement. It is called with the original's
            positional parameters in their order, and may be a generator function.
        program (str): ``mlx_lm`` or ``mlx_vlm``.
    """

    module: str
    name: str
    make: Callable[[Callable], Callable]
    program: str = "mlx_lm"


def install(model: object = None) -> None:
    """Put every seam in place, or none; does nothing to those that are. With a model of mlx-vlm
    those of mlx-vlm as well.

    Raises:
        NotSupportedError: If this mlx-lm, or this mlx-vlm, lacks one.
    """
    found: dict[int, tuple[FunctionType, list[Seam]]] = {}
    for seam in [*SEAMS, *(VLM_SEAMS if name_of(model) == VLM else ())]:
        f = _function(seam)
        found.setdefault(id(f), (f, []))[1].append(seam)
    for cls in CLASSES:
        setattr(stock, cls.__name__, cls)
    if name_of(model) == VLM:
        vlm.leave_prefix_cache(CLASSES)
    for f, seams in found.values():
        trampoline.replace(f, _stacked(seams))
    rapid.install()


def _function(seam: Seam) -> FunctionType:
    """What is to be changed."""
    try:
        found: Any = import_module(f"{seam.program}.{seam.module}")
    except ModuleNotFoundError as error:
        if not f"{seam.program}.{seam.module}".startswith(error.name or "?"):
            raise
        found = None
    for part in seam.name.split("."):
        found = None if found is None else vars(found).get(part)
    function = trampoline.function(found)
    if function is None:
        raise missing(f"{seam.module}.{seam.name}", seam.program)
    return function


def _stacked(seams: list[Seam]) -> Callable[[Callable], Callable]:
    def make(original: Callable) -> Callable:
        for seam in seams:
            original = seam.make(original)
        return original

    return make


def _quantized_attention(original):
    def attention(queries, keys, values, scale, mask, *more, **named):
        if isinstance(keys, PackedView):
            return packed_attention(queries, keys, values, scale, mask)
        return original(queries, keys, values, scale, mask, *more, **named)

    return attention


def _attention(original):
    def attention(queries, keys, values, cache, scale, mask, sinks=None, *more):
        if isinstance(keys, PackedView):
            return packed_attention(queries, keys, values, scale, mask, sinks)
        if sinks is not None and not isinstance(getattr(cache, "bits", 0), int):
            # What records queries for a calibration, and can take sinks.
            record: Callable = base.quantized_scaled_dot_product_attention
            return record(queries, keys, values, scale, mask, bits=cache.bits, sinks=sinks)
        return original(queries, keys, values, cache, scale, mask, sinks, *more)

    return attention


def _make_prompt_cache(original):
    def make_prompt_cache(model, max_kv_size=None, *more, **named):
        if (factory := factory_of(model)) is not None:
            return factory(max_kv_size)
        return original(model, max_kv_size, *more, **named)

    return make_prompt_cache


def _insert_segments(original):
    def insert_segments(self, segments, max_tokens=None, caches=None, *more, **named):
        size = self.max_kv_size
        if size is not None and caches and factory_of(self.model) is not None:
            caches = [
                stock.make_prompt_cache(self.model, size) if c and _can_be_bounded(c) else c
                for c in caches
            ]
        return original(self, segments, max_tokens, caches, *more, **named)

    return insert_segments


def _can_be_bounded(caches: list) -> bool:
    """Whether these hold no token, and packed ones among them would grow without end."""
    every = [c for _, c in leaves(caches)]
    return any(isinstance(c, single.PackedKVCache) for c in every) and all(c.empty() for c in every)


def _save_prompt_cache(original):
    return prompt_file.saving(before_032.saving(original) if before_032.needed() else original)


def _load_prompt_cache(original):
    return prompt_file.loading(before_032.loading(original) if before_032.needed() else original)


def _quantize(original):
    def quantize(prompt_cache, quantized_kv_start, kv_group_size, kv_bits, *more, **named):
        if kv_bits is not None:
            disable = "; mlx_kvq.disable(model) gives a model its own cache back"
            refuse_kv_bits(prompt_cache, f"kv_bits={kv_bits}", disable)
        return original(prompt_cache, quantized_kv_start, kv_group_size, kv_bits, *more, **named)

    return quantize


def _speculating(original, ours):
    def trim(*args, **kwargs):
        # The caller of the changed function, whose frame is this one's.
        caller = sys._getframe(2).f_globals.get("__name__")
        return (ours if caller == "mlx_lm.generate" else original)(*args, **kwargs)

    return trim


def _speculate(original):
    def speculate(prompt, model, draft_model, *more, **named):
        caches = named.get("prompt_cache")
        if (
            caches
            and len(caches) <= len(model.layers)
            and any(isinstance(c, CLASSES) for c in caches)
        ):
            raise ValueError(NO_DRAFT)
        return original(prompt, model, draft_model, *more, **named)

    return speculate


NO_DRAFT = (
    "The prompt cache holds nothing of the draft model: leave out the draft model, or the prompt "
    "cache."
)


def refuse_kv_bits(caches, asked: str, hint: str = "") -> None:
    """Raise a ``ValueError`` if ``asked``, mlx-lm's own quantization, meets a packed cache."""
    for c in caches:
        if is_list(c):
            refuse_kv_bits(c.caches, asked, hint)
        elif isinstance(c, CLASSES):
            raise ValueError(
                f"{asked} is for mlx-lm's own cache, and this one is packed already "
                f"('{c.format.spec}'): leave one of them out{hint}."
            )


def can_speculate(caches: list) -> bool:
    """``can_trim_prompt_cache`` for speculative decoding over these caches."""
    return all(c.is_trimmable() or isinstance(c, rotating.PackedRotatingKVCache) for c in caches)


def rewind(caches: list, n: int) -> int:
    """``trim_prompt_cache`` for the last ``n`` tokens of what was just fed."""

    def rewinds(c) -> bool:
        return c.is_trimmable() or (
            isinstance(c, rotating.PackedRotatingKVCache) and c.can_rewind(n)
        )

    if not caches or not all(rewinds(c) for c in caches):
        return 0
    return [c.trim(n) if c.is_trimmable() else c.rewind(n) for c in caches][0]


SEAMS = [
    Seam("models.base", "quantized_scaled_dot_product_attention", _quantized_attention),
    Seam("models.base", "scaled_dot_product_attention", _attention),
    Seam("models.cache", "make_prompt_cache", _make_prompt_cache),
    Seam("models.cache", "save_prompt_cache", _save_prompt_cache),
    Seam("models.cache", "load_prompt_cache", _load_prompt_cache),
    Seam("models.cache", "trim_prompt_cache", lambda original: _speculating(original, rewind)),
    Seam(
        "models.cache",
        "can_trim_prompt_cache",
        lambda original: _speculating(original, can_speculate),
    ),
    Seam("generate", "maybe_quantize_kv_cache", _quantize),
    Seam("generate", "speculative_generate_step", _speculate),
    Seam("generate", "speculative_generate_step", prompts.drafting),
    Seam("generate", "generate_step", prompts.generating),
    Seam("generate", "PromptProcessingBatch.prompt", prompts.reading),
    Seam("models.cache", "LRUPromptCache.fetch_nearest_cache", prompts.fetching),
    Seam("generate", "BatchGenerator.insert_segments", _insert_segments),
]
if before_032.needed():
    SEAMS.append(Seam("generate", "BatchGenerator._make_new_cache", before_032.bounding))

VLM_SEAMS = [
    Seam("models.base", "scaled_dot_product_attention", vlm.attention, VLM),
    Seam("models.cache", "make_prompt_cache", _make_prompt_cache, VLM),
    Seam("generate.common", "maybe_quantize_kv_cache", _quantize, VLM),
    Seam("generate.common", "PromptCacheState.find_prefix_length", vlm.finding, VLM),
    Seam("generate.ar", "generate_step", vlm.generating, VLM),
    Seam("generate.ar", "PromptProcessingBatch.prompt_step", vlm.reading, VLM),
    Seam("generate.ar", "PromptProcessingBatch.generate", vlm.finishing, VLM),
    Seam("speculative.utils", "make_speculative_prompt_cache", vlm.drafting, VLM),
]
