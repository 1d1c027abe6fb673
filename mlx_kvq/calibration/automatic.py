"""Calibration for a model that came without one: made once, then kept on disk.

The files lie in ``files.kept_folder()`` and are named by a hash of the model's weights and by how
they are made. ``mlx_kvq cache`` lists and deletes them.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..files import LARGEST_FOLDER, kept_folder, printable, prune
from ..stock import identity, packable
from .fit import calibrate_tokens, sample_text
from .moments import collect
from .set import CalibrationSet
from .shards import all_ranks, is_sharded

VERSION = 4  # of how it is made: what was kept by another one is not used
RANDOM_TOKENS = 512
SAMPLE_TOKENS = 2048
LENGTH = 1024  # of a window
PROBE = (
    128  # tokens read to see how long all take; if need be they are enough (docs/calibration.md)
)
FIRST = 16  # tokens that say whether a model can do without
# Expected squared error of a logit without calibration over that with it, in the worst head: 11,000
# in Qwen2.5-0.5B, whose family is ruined without; 100 in Gemma 3 270M and 40 in SmolLM2-135M, where
# KL is 4 and 1.6 times as much; 2 and 5 in the bundled models.
BEARABLE = 300.0
SECONDS = 60.0  # that reading takes at most; a slower machine reads less, never less than PROBE


def silent(line: str) -> None:
    """Say nothing, and show no progress bar."""


def _loaded(model: nn.Module):
    """Name and tokenizer, attached when the model was loaded; or ``None``."""
    return vars(model).get("_mlx_kvq_loaded")


def tokenizer_of(model: nn.Module, tokenizer=None):
    """The tokenizer given, or the one that the model was loaded with."""
    return getattr(_loaded(model), "tokenizer", None) if tokenizer is None else tokenizer


def automatic(
    model: nn.Module, tokenizer=None, say: Callable[[str], None] = silent
) -> CalibrationSet | None:
    """The calibration kept for this model, or one made now from the built-in text.

    Reading takes about a minute, or what ``PROBE`` tokens take. Ctrl-C ends it early: what they
    gave is used; before that the result is ``None``, for a model that can do without.

    Args:
        model (nn.Module): A model from ``mlx_lm.load``.
        tokenizer (optional): Its tokenizer; by default the one that it was loaded with. Without
            any, random tokens stand in for text.
        say: Told, in one line, when something is made or cannot be kept.

    Raises:
        ValueError: If nothing of the model can be packed.
    """
    tokenizer = tokenizer_of(model, tokenizer)
    name, kept, again = identity(model), None, ""
    # A calibration from text is the first choice, also without a tokenizer.
    for kind in ("sample",) if tokenizer is not None else ("sample", "random"):
        try:
            known = kept_folder() / _file(name, kind)
            kept = CalibrationSet.load(known) if known.exists() else None
            if kept is not None:
                os.utime(known)
                break
        except ValueError as error:
            again = f"calibrating again, the kept calibration cannot be used: {error}"
        except (OSError, RuntimeError):  # a folder that cannot be read: said once, below
            break
    if all_ranks(kept is not None, model) and kept is not None:
        return kept
    if tokenizer is None:
        say(
            again
            or f"no calibration and no tokenizer: calibrating on {RANDOM_TOKENS} random tokens; "
            "pass tokenizer= or calibration= for a better one"
        )
        found, whole = _read(model, random_tokens(model), "random tokens", say)
    else:
        say(again or "no calibration for this model: calibrating on the built-in sample text, once")
        ids = mx.array(tokenizer.encode(sample_text())[:SAMPLE_TOKENS])
        found, whole = _read(model, ids, "built-in sample", say)
    if found is not None and whole:
        if (loaded := _loaded(model)) is not None and printable(loaded.name):
            found = replace(found, metadata={**found.metadata, "model": loaded.name})
        kind = "random" if tokenizer is None else "sample"
        found = _keep(found, _file(name, kind), say)
    return found


def _file(identity: str, kind: str) -> str:
    return f"{identity}-{VERSION}-{kind}.safetensors"


def _read(
    model: nn.Module, ids: mx.array, text: str, say: Callable[[str], None]
) -> tuple[CalibrationSet | None, bool]:
    """A calibration on as many of the tokens as there is time for, and whether it was completed."""
    gain = worst_gain(model, ids[:FIRST])
    start = time.perf_counter()
    try:
        found = calibrate_tokens(model, [ids[:PROBE]], text=text, progress=False)
    except KeyboardInterrupt:
        if gain > BEARABLE:
            say(f"interrupted: this model cannot do without, a logit's error is {gain:,.0f} times")
            raise
        say(f"interrupted: going on uncalibrated, a logit's error is {gain:.1f} times at most")
        return None, False
    each = (time.perf_counter() - start) / min(PROBE, ids.size)
    # All ranks of a distributed run read the same.
    n = ids.size if is_sharded(model) else min(ids.size, int(SECONDS / each))
    if n <= PROBE:
        return found, True
    if n * each > 10:
        part = f"{n} of {ids.size}" if n < ids.size else str(n)
        say(f"reading {part} tokens, about {n * each:.0f} s; Ctrl-C goes on with the first {PROBE}")
    windows = [ids[i : min(n, i + LENGTH)] for i in range(0, n, LENGTH)]
    try:
        return calibrate_tokens(model, windows, text=text, progress=say is not silent), True
    except KeyboardInterrupt:
        say(f"interrupted: going on with what the first {PROBE} tokens gave, which is not kept")
        return found, False


def worst_gain(model: nn.Module, ids: mx.array) -> float:
    """How many times calibrated keys lessen the expected squared error of a logit, in the worst
    head: E[k²] E[q²] over (Σ √(var k · E q²))², the sums over channels."""
    caches, shapes = packable(model)
    gains = [1.0]
    for m in collect(model, caches, shapes, [ids]).values():
        if m.queries.n:
            mean, covariance = m.key_moments([ids.size])
            var, q = (np.einsum("hdd->hd", M) for M in (covariance, m.query_square([ids.size])))
            least = np.square(np.sqrt(var * q).sum(axis=-1))
            errors = (var + mean**2).sum(axis=-1) * q.sum(axis=-1)
            gains.append(float((errors / np.maximum(least, np.finfo(float).tiny)).max()))
    return max(gains)


def _keep(found: CalibrationSet, name: str, say: Callable[[str], None]) -> CalibrationSet:
    """Save into the folder; where that cannot be, one line says so and the command goes on.

    Returns what is kept there: if another process was first its calibration, which the next one
    will have too. How many tokens are read depends on the machine's load.
    """
    folder: Path | str = "~/.cache"
    try:
        folder = kept_folder()
        try:
            return CalibrationSet.load(folder / name)
        except (FileNotFoundError, ValueError):  # none, or that which cannot be used
            found.save(folder / name)
        prune(folder, LARGEST_FOLDER)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        say(f"warning: the calibration is used but could not be kept in '{folder}': {reason}")
    return found


def vocabulary(model: nn.Module) -> int:
    """Tokens that the model has an embedding of. One of positions may have more rows."""
    modules = [
        m
        for name, m in model.named_modules()
        if "Embedding" in type(m).__name__ and "wpe" not in name and "position" not in name
    ]
    rows = [m.weight.shape[0] for m in modules if "weight" in m]  # one of positions may have none
    return max(rows, default=2)


def random_tokens(model: nn.Module) -> mx.array:
    """The same ids in every run, from all the vocabulary."""
    return mx.array(np.random.RandomState(0).randint(0, vocabulary(model), RANDOM_TOKENS))
