"""Calibration: μ, σ (and λ) of a model's keys and values from one pass over text.

``docs/mathematics.md`` derives them. The command ``mlx_kvq calibrate`` writes the result to a
file that ``enable(model, spec, calibration=…)`` takes.
"""

from collections.abc import Iterable, Iterator
from importlib.resources import files
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from .. import __version__, arguments
from ..format import rotation
from ..format.spec import Spec
from ..format.transform import Calibration
from ..host import language_model
from ..stock import longest_context, packable
from .moments import FIRST, LayerMoments, collect
from .positions import contexts
from .set import CalibrationSet, LayerCalibration

TOKENS = 32768  # of text, at most
LENGTH = 1024  # tokens of a window
# Tokens of the longest context that a calibration is for, at least and at most, where the model's
# own limit says no other (docs/calibration.md).
LEAST_POSITIONS, MOST_POSITIONS = 8192, 32768
FLOOR = 1e-6  # of the mean power; a channel below it counts as this strong


def sample_text() -> str:
    """The built-in text: English, code and several languages, about 2000 tokens."""
    return files(__package__).joinpath("sample.txt").read_text(encoding="utf-8")


def calibrate(
    model: nn.Module,
    tokenizer,
    texts: str | Iterable[str] | None = None,
    *,
    tokens: int = TOKENS,
    length: int = LENGTH,
    positions: int | None = None,
    spec: Spec | str | None = None,
    progress: bool = True,
) -> CalibrationSet:
    """Find μ and σ, and if asked λ, of every layer of a model that mlx_kvq can pack.

    Args:
        model (nn.Module): A model from ``mlx_lm.load``.
        tokenizer: Its tokenizer; anything with ``encode``.
        texts (str or iterable of str, optional): Text like the model's later input. ``None`` is
            the built-in sample text.
        tokens (int): Tokens used at most.
        length (int): Tokens in a window, at least 5; the first 4 of each are not counted.
        positions (int, optional): Tokens of the longest context that is read later; by default as
            many as the model takes, but 8,192 to 32,768 (:func:`default_positions`). Keys are
            taken after RoPE, so their mean and spread depend on where they are: what the windows
            say is carried over to contexts of this length, its half, and so on down to 512.
        spec (Spec or str, optional): Also find λ of the keys for this spec's rotation and seed;
            the calibration then serves no other. About 2 % less KL (scripts/studies).
        progress (bool): Show a progress bar.

    Raises:
        ValueError: If nothing of the model can be packed or the texts are empty.
    """
    model = language_model(model)
    arguments.model(model)
    arguments.integer("tokens", tokens)
    arguments.integer("length", length, FIRST + 1)
    arguments.integer("positions", positions, optional=True)
    spec = Spec.parse(spec) if spec is not None else None
    text = "given"
    if texts is None:
        texts, text = sample_text(), "built-in sample"
    texts = [texts] if isinstance(texts, str) else texts
    windows = list(_windows(tokenizer, texts, tokens, length))
    if not windows:
        raise ValueError("The calibration text is empty.")
    if max(w.size for w in windows) <= FIRST:
        raise ValueError(f"The calibration text is too short: it has no more than {FIRST} tokens.")
    return calibrate_tokens(
        model, windows, text=text, positions=positions, spec=spec, progress=progress
    )


def calibrate_tokens(
    model: nn.Module,
    windows: list[mx.array],
    *,
    text: str = "given",
    positions: int | None = None,
    spec: Spec | None = None,
    progress: bool = True,
) -> CalibrationSet:
    """:func:`calibrate` with windows of tokens, [n] each, in place of text; ``text`` is their name
    in the metadata."""
    arguments.model(model)
    if all(w.size <= FIRST for w in windows):
        raise ValueError(
            f"windows are arrays [n] of tokens, at least one of them of more than {FIRST}, got "
            f"{[w.size for w in windows] or 'none'}."
        )
    positions = default_positions(model) if positions is None else positions
    caches, shapes = packable(model)
    tokens = sum(w.size for w in windows)
    with tqdm(
        total=tokens, desc="calibrating", unit="token", disable=not progress, leave=False
    ) as bar:
        moments = collect(model, caches, shapes, windows, bar.update)
    # A layer without queries does not use mlx-lm's shared attention; it is not packed either.
    layers = {
        path: layer_calibration(m, positions, spec) for path, m in moments.items() if m.queries.n
    }
    if not layers:
        raise ValueError("No layer of this model can be calibrated: none has a cache to pack.")
    made = {
        "by": f"mlx_kvq {__version__}",
        "text": text,
        "tokens": tokens,
        "length": max(w.size for w in windows),
        "positions": positions,
    }
    if spec is not None:
        made["lambda"] = lambda_of(spec)
    return CalibrationSet(layers, made)


def default_positions(model: nn.Module) -> int:
    """Tokens of the longest context that a calibration of ``model`` is for if none is asked for:
    its ``max_position_embeddings``, but 8,192 at least, also where it does not say, and 32,768 at
    most.

    At 32K a calibration for 8K lost 1.5 times as much on Gemma 3 270M as one for 32K, and all of
    one token (docs/calibration.md).
    """
    return min(MOST_POSITIONS, max(LEAST_POSITIONS, longest_context(model) or 0))


def _windows(tokenizer, texts: Iterable[str], tokens: int, length: int) -> Iterator[mx.array]:
    """At most ``tokens`` tokens of the texts, in windows of at most ``length``."""
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"Calibration texts are strings, got {type(text).__name__}.")
        ids = list(tokenizer.encode(text))[:tokens]
        tokens -= len(ids)
        for i in range(0, len(ids), length):
            yield mx.array(ids[i : i + length])
        if tokens <= 0:
            return


def layer_calibration(
    m: LayerMoments, positions: int, spec: Spec | None = None
) -> LayerCalibration:
    """μ and σ of one layer from its moments, for contexts of up to ``positions`` tokens, and λ of
    its keys for the rotation of ``spec``."""
    lengths = contexts(positions)
    mu, k = m.key_moments(lengths)
    q = m.query_square(lengths)
    sigma = balanced_scale(_diagonal(k), _diagonal(q))
    lam = None
    if spec is not None:
        outer = sigma[:, :, None] * sigma[:, None]
        lam = _fp32(balanced_scale(_rotated(q * outer, spec), _rotated(k / outer, spec)))
    return LayerCalibration(
        Calibration(mu=_fp32(mu), sigma=_fp32(sigma), lam=lam, metric=_fp32(q)),
        Calibration(mu=_fp32(m.values.mean)),
    )


def lambda_of(spec: Spec) -> str:
    """The rotation that a λ belongs to."""
    return f"{spec.rotation}, seed {spec.seed}"


def _diagonal(M: np.ndarray) -> np.ndarray:
    return np.einsum("hdd->hd", M)


def _rotated(M: np.ndarray, spec: Spec) -> np.ndarray:
    """E[(R x)²] per channel, [H, D], from E[x xᵀ] of the keys' domain."""
    R = rotation.matrix(spec.rotation, spec.seed, rotation.KEYS, M.shape[-1])
    if R is None:
        return _diagonal(M)
    turn = np.array(R, dtype=np.float64)
    return _diagonal(turn @ M @ turn.T)


def balanced_scale(x2: np.ndarray, q2: np.ndarray) -> np.ndarray:
    """σ = (E[x²] / E[q²])^¼ per channel, with a geometric mean of 1 per head, [H, D].

    A common factor of a head's σ changes nothing but the size of the stored scales.
    """
    x2, q2 = (np.maximum(a, FLOOR * a.mean(axis=-1, keepdims=True)) for a in (x2, q2))
    tiny = np.finfo(np.float32).tiny
    log = (np.log(np.maximum(x2, tiny)) - np.log(np.maximum(q2, tiny))) / 4
    return np.exp(log - log.mean(axis=-1, keepdims=True))


def _fp32(a: Any) -> mx.array:
    return mx.array(np.asarray(a, dtype=np.float32))
