"""Calibration for a model that came without one: made once, then kept on disk.

The files lie in ``MLX_KVQ_CACHE``, else ``$XDG_CACHE_HOME/mlx_kvq``, else ``~/.cache/mlx_kvq``,
and are named by a hash of the model's weights.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .calibrate import calibrate, calibrate_tokens
from .calibration import CalibrationSet
from .shards import all_ranks

SAMPLES = 16  # values of a tensor that go into the hash
VERSION = 2  # of what is done here; another one does not read our files
RANDOM_TOKENS = 512
SAMPLE_TOKENS = 2048


def directory() -> Path:
    """Where automatic calibrations are kept."""
    if own := os.environ.get("MLX_KVQ_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "mlx_kvq"


def identity(model: nn.Module) -> str:
    """Hash of a model's weights by names, shapes and a few values of each, and of the caches it
    makes; 24 hex digits.

    The same for a model in fp16, bf16 or fp32 as long as the values are the same.
    """
    from .model import packable  # which imports this module

    digest = hashlib.sha256(f"{VERSION}{packable(model)[1]}".encode())
    weights: list[tuple[str, mx.array]] = sorted(tree_flatten(model.parameters()))  # type: ignore
    picks = []
    for _, w in weights:
        flat = w.flatten()
        where = np.linspace(0, w.size - 1, min(SAMPLES, w.size)).astype(np.uint32)
        picks.append(flat[mx.array(where)].astype(mx.float32))
    mx.eval(picks)
    for (name, w), values in zip(weights, picks, strict=True):
        digest.update(f"{name}{w.shape}".encode() + np.array(values).tobytes())
    return digest.hexdigest()[:24]


def silent(line: str) -> None:
    """Say nothing, and show no progress bar."""


def automatic(
    model: nn.Module, tokenizer=None, say: Callable[[str], None] = silent
) -> CalibrationSet:
    """The calibration kept for this model, or one made now from the built-in text.

    Args:
        model (nn.Module): A model from ``mlx_lm.load``.
        tokenizer (optional): Its tokenizer. Without one, random tokens stand in for text.
        say: Told, in one line, when something is made or cannot be kept.

    Raises:
        ValueError: If nothing of the model can be packed.
    """
    kind = "random" if tokenizer is None else "sample"
    folder, name = directory(), identity(model)
    path = folder / f"{name}-{kind}.safetensors"
    kept = None
    # A calibration from text serves a call without a tokenizer, too.
    for known in (path, folder / f"{name}-sample.safetensors"):
        if kept is None and known.exists():
            try:
                kept = CalibrationSet.load(known)
            except (ValueError, OSError) as error:
                say(f"calibrating again, the kept calibration cannot be used: {error}")
    if all_ranks(kept is not None, model) and kept is not None:
        return kept
    bar = say is not silent
    if tokenizer is None:
        say(
            f"no calibration and no tokenizer: calibrating on {RANDOM_TOKENS} random tokens; pass "
            "tokenizer= or calibration= for a better one"
        )
        found = calibrate_tokens(model, [random_tokens(model)], text="random tokens", progress=bar)
    else:
        say("no calibration for this model: calibrating on the built-in sample text, once")
        found = calibrate(model, tokenizer, tokens=SAMPLE_TOKENS, progress=bar)
    try:
        found.save(path)
    except OSError as error:
        say(f"the calibration is used but could not be kept in '{folder}': {error.strerror}")
    return found


def random_tokens(model: nn.Module) -> mx.array:
    """The same ids in every run, from all the vocabulary."""
    rows = [m.weight.shape[0] for _, m in model.named_modules() if "Embedding" in type(m).__name__]
    return mx.array(np.random.RandomState(0).randint(0, max(rows, default=2), RANDOM_TOKENS))
