"""Calibration for a model that came without one: made once, then kept on disk.

The files lie in ``MLX_KVQ_CACHE``, else ``$XDG_CACHE_HOME/mlx_kvq``, else ``~/.cache/mlx_kvq``,
and are named by a hash of the model's weights.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from weakref import ref

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .calibrate import calibrate, calibrate_tokens
from .calibration import CalibrationSet
from .seams import factory_of
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


Sizes = Mapping[tuple[int, ...], tuple[int, int, int]]  # path of a cache -> (Hkv, Dk, Dv)


def identity(model: nn.Module, sizes: Sizes | None = None) -> str:
    """Hash of a model's weights by names, shapes and a few values of each, and of the caches it
    makes; 24 hex digits.

    The same for a model in fp16, bf16 or fp32 as long as the values are the same, and for either
    half of a wrapper whose other half is enabled.

    Args:
        model (nn.Module): A model from ``mlx_lm.load``.
        sizes (dict, optional): Of its caches, if they are known.
    """
    from .model import packable  # which imports this module

    if (factory := factory_of(model)) is not None:
        model = factory.holders[0] or model  # what enable() was called with
    sizes = packable(model)[1] if sizes is None else sizes
    digest = hashlib.sha256(f"{VERSION}{sizes}".encode())
    weights: list[tuple[str, mx.array]] = sorted(tree_flatten(model.parameters()))  # type: ignore
    picks = []
    for _, w in weights:
        flat = w.flatten()
        where = np.linspace(0, w.size - 1, min(SAMPLES, w.size)).astype(np.uint32)
        picks.append(flat[mx.array(where)].astype(mx.float32))
    mx.eval(picks)
    for (name, w), values in zip(weights, picks, strict=True):
        digest.update(f"{name}{w.shape}".encode() + np.array(values).tobytes())
    for name, module in sorted(model.named_modules()):
        if "lora_a" in module:  # multiplied with the weights, and no parameter
            digest.update(f"{name} {getattr(module, 'scale', None)}".encode())
    return digest.hexdigest()[:24]


class Identity:
    """The identity of a model as it is now, hashed again if arrays were exchanged meanwhile, as
    all of mlx does: 1 ms for 700 parameters. Not seen: an array that is written into."""

    def __init__(self, model: nn.Module, sizes: Sizes):
        self.model, self.sizes = model, sizes
        self._seen: list = []
        self._name = ""

    def __call__(self) -> str:
        held: list = []
        for _, module in self.model.named_modules():
            held.extend(v for v in module.values() if isinstance(v, mx.array))
            if "lora_a" in module:
                held.append(getattr(module, "scale", None))
        if len(held) != len(self._seen) or any(
            (old() if isinstance(old, ref) else old) is not new
            for old, new in zip(self._seen, held, strict=True)
        ):
            self._name = identity(self.model, self.sizes)
            self._seen = [ref(a) if isinstance(a, mx.array) else a for a in held]
        return self._name

    def __getstate__(self) -> dict:
        return {**vars(self), "_seen": []}


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
