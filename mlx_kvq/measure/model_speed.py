"""End to end: prefill and greedy decoding of one model with different caches."""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from ..calibration.automatic import random_tokens
from ..calibration.fit import calibrate_tokens
from ..model.enable import disable, enable
from ..model.loading import load
from .contenders import PLAIN, paddings
from .shapes import random_model
from .timing import memory_limit, speedup, spread

BASES = ("fp16", "bf16", "kv4")
CHUNK = 2048  # of a prompt, mlx-lm's default
PREFILLING, DECODING = 30.0, 3.0  # seconds that one cache's prefills, and a chain, should take


@dataclass
class Entry:
    """A model with one kind of cache.

    Args:
        make: Makes empty caches.
        kv_bits: Of mlx-lm's quantized cache, which replaces them once they hold tokens.
    """

    model: Any
    make: Callable[[], list]
    kv_bits: int | None = None


def entries(args) -> dict[str, Entry]:
    """The models and caches to compare, by name; one that is not possible is left out, with a line
    on stderr.

    Args:
        args: Of ``mlx_kvq benchmark``.
    """
    models: dict[str, Any] = {}
    found: dict[str, Entry] = {}
    for name in args.kv_cache:
        dtype = str(PLAIN[name]).rpartition(".")[2] if name in PLAIN else args.dtype
        if dtype not in models:
            models[dtype] = _model(args, getattr(mx, dtype))
        try:
            found[name] = _entry(name, *models[dtype])
        except ValueError as error:
            print(f"{name}: left out: {error}", file=sys.stderr)
    return found


def measure(args, made: dict[str, Entry] | None = None) -> Iterator[list[dict]]:
    """The rows of one batch size and context, after the other.

    Args:
        args: Of ``mlx_kvq benchmark``.
        made (dict, optional): From :func:`entries`, to use them again.
    """
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
    """Memory that an item will take, from the one before: caches grow with the context, what
    computes them with a chunk of it."""

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


def _entry(name: str, model, tokenizer) -> Entry:
    if name in PLAIN:
        return Entry(model, lambda: make_prompt_cache(model))
    if name in ("kv4", "kv8"):
        for cache in make_prompt_cache(model):
            if not hasattr(cache, "to_quantized") or hasattr(cache, "max_size"):
                raise ValueError(f"mlx-lm cannot quantize a {type(cache).__name__}")
        return Entry(model, lambda: make_prompt_cache(model), int(name[2:]))
    calibration = None
    if tokenizer is None and "calibrate=off" not in name:
        # Of random weights: not to be kept, as an automatic one would.
        calibration = calibrate_tokens(model, [random_tokens(model)], progress=False)
    enable(model, name, calibration=calibration, tokenizer=tokenizer, verbose=False)
    try:
        return Entry(model, model.make_cache)
    finally:
        disable(model)


class _Peak:
    """Peak memory since this was made, above what was in use then."""

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


class _Run:
    """One generation: of a batch in the caches that mlx-lm's ``BatchGenerator`` makes, its
    prompts of several lengths, the longest that of ``tokens``."""

    def __init__(self, entry: Entry, tokens: mx.array):
        self.entry, self.tokens = entry, tokens
        self.cache: list = []

    def _caches(self) -> list:
        B = self.tokens.shape[0]
        caches = self.entry.make()
        # mlx-lm does not batch with kv_bits: those hold the sequences themselves.
        if B == 1 or self.entry.kv_bits is not None:
            return caches
        others = [self.entry.make() for _ in range(B - 1)]
        return [c.merge([c, *(o[i] for o in others)]) for i, c in enumerate(caches)]

    def prefill(self) -> float:
        """Seconds from the prompt to the first token, in mlx-lm's chunks, with new caches."""
        self.cache = []  # frees the ones before
        mx.synchronize()
        start = time.perf_counter()
        self.cache = self._caches()
        prompt = self.tokens
        B, L = prompt.shape[0], prompt.shape[1] - 1
        padding = [0] if self.entry.kv_bits is not None else paddings(B, L)
        if max(padding) > 0:
            for c in self.cache:
                c.prepare(lengths=[L - p for p in padding], right_padding=padding)
        while prompt.shape[1] > 1:
            chunk = prompt[:, : min(CHUNK, prompt.shape[1] - 1)]
            self._model(chunk)
            mx.eval([c.state for c in self.cache])
            prompt = prompt[:, chunk.shape[1] :]
            mx.clear_cache()
        if max(padding) > 0:
            for c in self.cache:
                c.finalize()
            mx.eval([c.state for c in self.cache])
            mx.clear_cache()
        self.y = self._next(prompt)
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
        logits = self.entry.model(tokens, cache=self.cache)
        maybe_quantize_kv_cache(self.cache, 0, 64, self.entry.kv_bits)
        return logits

    def _next(self, y: mx.array) -> mx.array:
        return self._model(y)[:, -1:].argmax(axis=-1)

    @property
    def nbytes(self) -> int:
        return sum(c.nbytes for c in self.cache)


def _compare(label: str, entries: dict[str, Entry], B: int, T: int, args) -> list[dict]:
    tokens = mx.random.randint(0, 1000, (B, T))
    mx.eval(tokens)
    runs: dict[str, _Run] = {}
    memory: dict[str, dict] = {}
    notes, turns, steps, classes = {}, {}, {}, {}
    for name, entry in entries.items():  # warm-up at full length; memory
        run = _Run(entry, tokens)
        try:
            peak = _Peak()
            seconds = run.prefill()
            memory[name] = {"prefill_peak_bytes": peak.above}
            memory[name]["held_bytes"] = mx.get_active_memory() - peak.before
            memory[name]["cache_bytes"] = run.nbytes
            classes[name] = ", ".join(sorted({type(c).__name__ for c in run.cache}))
            if seconds * args.prefill_rounds > PREFILLING:  # or was it compiling?
                seconds = min(seconds, run.prefill())
            turns[name] = max(1, min(args.prefill_rounds, int(PREFILLING / seconds)))
            peak = _Peak()
            run.decode(1)  # compiles
            steps[name] = max(1, min(args.tokens, int(DECODING / run.decode(1))))
            run.decode(steps[name])
            memory[name]["decode_peak_bytes"] = peak.above + memory[name]["cache_bytes"]
        except Exception as error:  # this contender does not run here
            notes[name] = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            continue
        runs[name] = run
    prefill: dict[str, list[float]] = {name: [] for name in runs}
    decode: dict[str, list[float]] = {name: [] for name in runs}
    for r in range(args.prefill_rounds):
        for name, run in runs.items():
            if r < turns[name]:
                prefill[name].append(run.prefill())
    for r in range(args.rounds + 1):
        for name, run in runs.items():
            seconds = run.decode(steps[name])
            if r:  # the first is warm-up
                decode[name].append(seconds)
    rows = []
    for name in entries:
        row: dict[str, Any] = {"model": label, "cache": name, "batch": B, "context": T}
        if name in notes:
            rows.append({**row, "note": notes[name]})
        if name not in runs:
            continue
        t, p = spread(decode[name]), spread(prefill[name])
        row |= {
            "ms": 1e3 * t.median, "ms_low": 1e3 * t.low, "ms_high": 1e3 * t.high,
            "class": classes[name],
            "tokens_per_s": B / t.median,
            "prefill_s": p.median, "prefill_low": p.low, "prefill_high": p.high,
            **memory[name],
        }  # fmt: skip
        for base in BASES:
            if base in runs:
                x = speedup(decode[base], decode[name])
                row[f"x_{base}"] = [x.median, x.low, x.high]
                x = speedup(prefill[base], prefill[name])
                row[f"prefill_x_{base}"] = [x.median, x.low, x.high]
                row[f"smaller_than_{base}"] = (
                    memory[base]["cache_bytes"] / memory[name]["cache_bytes"]
                )
        rows.append(row)
    return rows
