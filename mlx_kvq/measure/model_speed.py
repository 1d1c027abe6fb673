"""End to end: prefill and greedy decoding of one model with different caches."""

import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import KVCache, can_trim_prompt_cache, trim_prompt_cache

from ..calibration.automatic import random_tokens, vocabulary
from ..calibration.fit import calibrate_tokens
from ..files import failure
from ..format.spec import Spec
from ..model.loading import load
from ..stock import own_caches
from .baselines import KV_BITS, KV_GROUP, PLAIN, Contender, own, packed, padded
from .contenders import CHUNK
from .shapes import random_model
from .timing import memory_limit, speedups, spread

BASES = ("fp16", "bf16", "kv4")
PREFILLING, DECODING = 30.0, 3.0  # seconds that one cache's prefills, and a chain, should take


def entries(args) -> dict[str, Contender]:
    """The models and caches to compare, by name; ``args`` of ``mlx_kvq benchmark``. A line on
    stderr says which one is not possible."""
    models: dict[mx.Dtype, Any] = {}
    found: dict[str, Contender] = {}
    for name in args.kv_cache:
        dtype = PLAIN.get(name, getattr(mx, args.dtype))
        if dtype not in models:
            models[dtype] = _model(args, dtype)
        try:
            found[name] = _contender(name, *models[dtype])
        except ValueError as error:
            print(f"{name}: left out: {error}", file=sys.stderr)
    return found


def measure(args, made: dict[str, Contender] | None = None) -> Iterator[list[dict]]:
    """The rows of one batch size and context, after the other; ``made`` from :func:`entries`."""
    label = args.shape or Path(args.model).name
    if args.weight_bits:
        label += f", {args.weight_bits}-bit"
    if made is None:
        made = entries(args)
    guess = _Guess()
    for B, T in itertools.product(args.batch_size, sorted(args.contexts)):
        if (expected := guess.bytes(B, T)) > memory_limit():
            left = f"batch {B}, {T} tokens left out: it would take about {expected / 1e9:.0f} GB"
            print(left, file=sys.stderr)
            continue
        mx.reset_peak_memory()
        _Peak.highest = 0
        rows = _compare(label, made, B, T, args)
        guess.learn(B, T, _Peak().highest, sum(r.get("cache_bytes", 0) for r in rows))
        yield rows
        mx.clear_cache()


class _Guess:
    """Memory of the next item, from the one before: caches grow with the context, intermediate
    arrays with a chunk of it."""

    def __init__(self) -> None:
        self.weights = mx.get_active_memory()
        self.token = self.chunk = 0.0

    def learn(self, B: int, T: int, peak: int, caches: int) -> None:
        self.token = caches / (B * T)
        self.chunk = max(0, peak - self.weights - caches) / (B * min(T, CHUNK))

    def bytes(self, B: int, T: int) -> float:
        return self.weights + B * (T * self.token + min(T, CHUNK) * self.chunk)


def _model(args, dtype: mx.Dtype):
    if args.shape:
        return random_model(args.shape, dtype, args.weight_bits), None
    model, tokenizer = load(args.model)
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model, tokenizer


def _contender(name: str, model, tokenizer) -> Contender:
    if name in PLAIN:
        return own(model)
    if name in KV_BITS:
        for cache in own_caches(model):
            if type(cache) is not KVCache:
                raise ValueError(f"mlx-lm cannot quantize a {type(cache).__name__}")
        # mlx-lm quantizes these after each step, and does not batch them.
        return Contender(name, lambda: own_caches(model), merges=False, model=model)
    spec = Spec.parse(name)
    assert spec is not None  # fp16 is one of PLAIN
    calibration = None
    if tokenizer is None and spec.calibrate != "off":
        # Of random weights: not to be kept, as an automatic one would.
        calibration = calibrate_tokens(model, [random_tokens(model)], progress=False)
    return packed(model, spec, calibration, tokenizer)


class _Peak:
    """Peak memory above the memory in use when this was made."""

    highest = 0  # of all that came before, as MLX has one counter

    def __init__(self) -> None:
        mx.synchronize()
        _Peak.highest = max(_Peak.highest, mx.get_peak_memory())
        mx.reset_peak_memory()
        self.before = mx.get_active_memory()

    @property
    def above(self) -> int:
        mx.synchronize()
        return mx.get_peak_memory() - self.before


class Run:
    """One generation. The prompts of a batch have several lengths, the longest that of
    ``tokens``."""

    def __init__(self, contender: Contender, tokens: mx.array):
        self.contender, self.tokens = contender, tokens
        self.cache: list = []
        self.memory: dict[str, int] = {}

    def warm_up(self, args) -> None:
        """A generation at full length: memory, and how many prefills and steps to time."""
        peak = _Peak()
        seconds = self.prefill()
        cache_bytes = sum(c.nbytes for c in self.cache)
        self.memory = {
            "prefill_peak_bytes": peak.above,
            "held_bytes": mx.get_active_memory() - peak.before,
            "cache_bytes": cache_bytes,
        }
        if seconds * args.prefill_rounds > PREFILLING:  # or was it compiling?
            seconds = min(seconds, self.prefill())
        self.prefills = max(1, min(args.prefill_rounds, int(PREFILLING / seconds)))
        peak = _Peak()
        self.decode(1)  # compiles
        self.steps = max(1, min(args.tokens, int(DECODING / self.decode(1))))
        self.decode(self.steps)
        self.memory["decode_peak_bytes"] = peak.above + cache_bytes

    def prefill(self) -> float:
        """Seconds from the prompt to the first token, in mlx-lm's chunks, with new caches."""
        self.cache = []  # frees the ones before
        mx.synchronize()
        start = time.perf_counter()
        prompt = self.tokens
        B, L = prompt.shape[0], prompt.shape[1] - 1
        self.cache = self.contender.batch(B)
        with padded(self.cache, B, L):
            for first in range(0, L, CHUNK):
                self._model(prompt[:, first : min(first + CHUNK, L)])
                mx.eval([c.state for c in self.cache])
                mx.clear_cache()
        self.y = self._next(prompt[:, L:])
        mx.eval(self.y)
        return time.perf_counter() - start

    def decode(self, steps: int) -> float:
        """Seconds per token of greedy decoding: one is read while the next is computed, as
        mlx-lm does. Goes back to where it was, unless a sliding window has dropped tokens."""
        mx.eval([c.state for c in self.cache])  # going back is no part of decoding
        mx.synchronize()
        start = time.perf_counter()
        y = self.y
        for _ in range(steps):
            following = self._next(y)
            mx.async_eval(following)
            mx.eval(y)
            y = following
        mx.eval(y)
        seconds = (time.perf_counter() - start) / steps
        if can_trim_prompt_cache(self.cache):
            trim_prompt_cache(self.cache, steps)
        else:
            self.y = y
        return seconds

    def _model(self, tokens: mx.array) -> mx.array:
        logits = self.contender.model(tokens, cache=self.cache)
        maybe_quantize_kv_cache(self.cache, 0, KV_GROUP, KV_BITS.get(self.contender.name))
        return logits

    def _next(self, y: mx.array) -> mx.array:
        return self._model(y)[:, -1:].argmax(axis=-1)


def prompts(model: nn.Module, B: int, T: int) -> mx.array:
    """Random tokens [B, T] that the model knows. MLX looks up any number, wherever that is."""
    tokens = mx.random.randint(0, min(1000, vocabulary(model)), (B, T))
    mx.eval(tokens)
    return tokens


def _compare(label: str, entries: dict[str, Contender], B: int, T: int, args) -> list[dict]:
    """Rows of all contenders; one that fails gets a row that says why."""
    tokens = prompts(next(iter(entries.values())).model, B, T)
    runs: dict[str, Run] = {}
    rows = {n: {"model": label, "cache": n, "batch": B, "context": T} for n in entries}
    for name, contender in entries.items():
        run = Run(contender, tokens)
        try:
            run.warm_up(args)
            runs[name] = run
        except Exception as error:  # this contender does not run here
            rows[name]["note"] = failure(error, 120)
    prefill: dict[str, list[float]] = {name: [] for name in runs}
    decode: dict[str, list[float]] = {name: [] for name in runs}
    for r in range(args.prefill_rounds):
        for name, run in runs.items():
            if r < run.prefills:
                prefill[name].append(run.prefill())
    for r in range(args.rounds + 1):
        for name, run in runs.items():
            seconds = run.decode(run.steps)
            if r:  # the first is warm-up
                decode[name].append(seconds)
    for name, run in runs.items():
        t, p = spread(decode[name]), spread(prefill[name])
        size = run.memory["cache_bytes"]
        rows[name] |= {
            "ms": 1e3 * t.median, "ms_low": 1e3 * t.low, "ms_high": 1e3 * t.high,
            "class": ", ".join(sorted({type(c).__name__ for c in run.cache})),
            "tokens_per_s": B / t.median,
            "prefill_s": p.median, "prefill_low": p.low, "prefill_high": p.high,
            **run.memory,
            **speedups("x", decode, name, BASES),
            **speedups("prefill_x", prefill, name, BASES),
            **{f"smaller_than_{b}": runs[b].memory["cache_bytes"] / size
               for b in BASES if b in runs},
        }  # fmt: skip
    return list(rows.values())
