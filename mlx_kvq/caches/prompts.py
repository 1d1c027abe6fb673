"""Prompts: which tokens are read as one, and where a cached one can go on.

A cache reads a prompt's tokens and decoded ones differently (``attention``), and sees no more of
either than a number of new tokens. So mlx-lm's loops are wrapped where they know: ``generate_step``
and ``speculative_generate_step`` read all of a prompt but its last token as a prompt,
``PromptProcessingBatch.prompt`` all that it is given.

mlx-lm's server keeps caches of past requests and takes back what a new prompt does not share. What
the tail then lacks is gone, so :func:`fetch` steps back to a multiple of ``BLOCK``, from where the
prompt can be read again exactly as the first time. A conversation that goes on over its own
generated tokens is left as it is.

Other programs look known prompts up with code of their own, trim a cache and hand ``generate_step``
the tokens that follow. It notes which tokens a cache holds, and reads again what is needed.
"""

import functools
import inspect
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as stock

from ..stock import leaves
from . import attention
from .packed import PackedCache

ALL = 1 << 62  # tokens: more than any prompt


def expect(caches: Iterable, tokens: int) -> None:
    """Tell packed caches how many tokens of a prompt are to come."""
    for _, cache in leaves(caches):
        if isinstance(cache, PackedCache):
            cache.reading = tokens


@contextmanager
def expected(caches: list, tokens: int) -> Iterator[None]:
    """:func:`expect` until the block ends."""
    expect(caches, tokens)
    try:
        yield
    finally:
        expect(caches, 0)


def generating(generate_step: Callable) -> Callable:
    """mlx-lm's ``generate_step``, which then reads a prompt as one, and before it what caches that
    were trimmed lack."""
    signature = inspect.signature(generate_step)
    name = next(iter(signature.parameters))

    @functools.wraps(generate_step)
    def wrapper(prompt, model, *args, **kwargs):
        given = signature.bind(prompt, model, *args, **kwargs)
        options = given.arguments
        if options.get("prompt_cache") is None:
            size = options.get("max_kv_size")
            options["prompt_cache"] = stock.make_prompt_cache(model, max_kv_size=size)
        caches, embedded = options["prompt_cache"], options.get("input_embeddings")
        if embedded is None:
            options[name] = prompt = _with_what_is_missing(caches, prompt)
        tokens = len(prompt if embedded is None else embedded)
        # With no token to generate the last one only fills the cache (mlx_lm.cache_prompt).
        last = 0 if options.get("max_tokens") == 0 else 1
        steps = generate_step(*given.args, **given.kwargs)
        with expected(caches, tokens - last), closing(steps):
            yield from steps if embedded is not None else _noting(caches, prompt, steps)

    return wrapper


def _noted(caches: list) -> Any:
    """The cache that notes the tokens of all, if it has noted every one that it holds."""
    cache = next((c for _, c in leaves(caches) if isinstance(c, PackedCache)), None)
    at = getattr(cache, "offset", None)  # an array of a batch
    return cache if cache is not None and at == len(cache.tokens) else None


def _with_what_is_missing(caches: list, prompt: mx.array) -> mx.array:
    """A prompt that goes on over caches, and before it the tokens that must be read again. They are
    taken off the caches."""
    if (cache := _noted(caches)) is None or not (at := cache.offset):
        return prompt
    known = cache.tokens
    begin = resume(caches, at, at + len(prompt))
    if begin == 0:
        every: list[Any] = [c for _, c in leaves(caches)]
        if not all(c.is_trimmable() for c in every):
            return prompt
        for c in every:
            c.trim(at)
    return mx.concatenate([mx.array(known[begin:].tolist(), prompt.dtype), prompt])


def _noting(caches: list, prompt: mx.array, steps: Iterator) -> Iterator:
    """The steps of ``generate_step``, whose tokens are noted."""
    if (cache := _noted(caches)) is None:
        yield from steps
        return
    cache.tokens = before = cache.tokens[:]
    ids: Any = prompt.tolist()
    new = array("q", ids)
    try:
        for step in steps:
            new.append(step[0])
            yield step
    finally:
        if cache.tokens is before:  # nothing was taken back meanwhile
            cache.tokens = (before + new)[: cache.offset]


def drafting(speculative_generate_step: Callable) -> Callable:
    """mlx-lm's ``speculative_generate_step``, likewise."""
    signature = inspect.signature(speculative_generate_step)

    @functools.wraps(speculative_generate_step)
    def wrapper(prompt, model, draft_model, *args, **kwargs):
        given = signature.bind(prompt, model, draft_model, *args, **kwargs)
        options = given.arguments
        if options.get("prompt_cache") is None:
            both = [stock.make_prompt_cache(m) for m in (model, draft_model)]
            if len(both[0]) == len(_layers(model)):  # where mlx-lm parts them
                options["prompt_cache"] = [*both[0], *both[1]]
        with expected(options.get("prompt_cache") or [], len(prompt) - 1):
            yield from speculative_generate_step(*given.args, **given.kwargs)

    return wrapper


def _layers(model: nn.Module) -> list:
    return getattr(model, "layers", [])


def reading(prompt: Callable) -> Callable:
    """``PromptProcessingBatch.prompt``, likewise."""

    @functools.wraps(prompt)
    def wrapper(self, *args, **kwargs):
        with expected(self.prompt_cache, ALL):
            return prompt(self, *args, **kwargs)

    return wrapper


def fetching(fetch_nearest_cache: Callable) -> Callable:
    """``LRUPromptCache.fetch_nearest_cache``, whose caches then go on as if the prompt had been
    read at once."""

    @functools.wraps(fetch_nearest_cache)
    def wrapper(self, model, tokens):
        cache, rest = fetch_nearest_cache(self, model, tokens)
        if cache is None:
            return cache, rest
        at = resume(cache, len(tokens) - len(rest), len(tokens))
        if at == len(tokens) - len(rest):
            return cache, rest
        return (cache, tokens[at:]) if at else (None, tokens)

    return wrapper


def resume(caches: list, at: int, end: int) -> int:
    """Make caches of ``at`` tokens ready for the others of a prompt of ``end``.

    Returns:
        int: From which token on they are to be fed: ``at``, or an earlier one if what the others
        must read exactly is gone. With 0 the caches are of no use.
    """
    every: list[Any] = [cache for _, cache in leaves(caches)]
    packed = [c for c in every if isinstance(c, PackedCache) and c.format.recent]
    if not packed or all(c.goes_on(at, end) for c in packed):
        return at
    if at < end and all(c.has_decoded(at) for c in packed):
        return at  # a conversation
    recent = max(c.reads(end) for c in packed)  # the last token reads as many exactly
    back = min(at, end - recent, *(c.prompt[0] for c in packed))
    back -= back % attention.BLOCK
    if back <= 0 or not all(c.is_trimmable() for c in every):
        return 0
    for c in every:
        c.trim(at - back)
    return back
