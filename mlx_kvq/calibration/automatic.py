"""Calibration for a model that came without one: made once, then kept on disk.

The files lie in ``MLX_KVQ_CACHE``, else ``$XDG_CACHE_HOME/mlx_kvq``, else ``~/.cache/mlx_kvq``,
and are named by a hash of the model's weights.
"""

import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..stock import identity
from .fit import calibrate, calibrate_tokens
from .set import CalibrationSet
from .shards import all_ranks

RANDOM_TOKENS = 512
SAMPLE_TOKENS = 2048


def directory() -> Path:
    """Where automatic calibrations are kept."""
    if own := os.environ.get("MLX_KVQ_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "mlx_kvq"


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
    name = identity(model)
    kept = None
    # A calibration from text serves a call without a tokenizer, too.
    for of in dict.fromkeys((kind, "sample")):
        try:
            known = directory() / f"{name}-{of}.safetensors"
            if kept is None and known.exists():
                kept = CalibrationSet.load(known)
        except ValueError as error:
            say(f"calibrating again, the kept calibration cannot be used: {error}")
        except (OSError, RuntimeError):  # a folder that cannot be read: said once, below
            break
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
    _keep(found, f"{name}-{kind}.safetensors", say)
    return found


def _keep(found: CalibrationSet, name: str, say: Callable[[str], None]) -> None:
    """Save into the folder; where that cannot be, one line says so and the command goes on."""
    folder: Path | str = "~/.cache"
    try:
        folder = directory()
        found.save(folder / name)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        say(f"warning: the calibration is used but could not be kept in '{folder}': {reason}")


def random_tokens(model: nn.Module) -> mx.array:
    """The same ids in every run, from all the vocabulary."""
    rows = [m.weight.shape[0] for _, m in model.named_modules() if "Embedding" in type(m).__name__]
    return mx.array(np.random.RandomState(0).randint(0, max(rows, default=2), RANDOM_TOKENS))
