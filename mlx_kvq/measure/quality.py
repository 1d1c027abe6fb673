"""Figures of quality: how far a model with one cache is from the same model with another.

Tokens of one window share a context, so intervals take windows as the independent samples:
Student's t over the windows' means, two-sided, 95 %.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

LEVEL = 0.95


@dataclass
class Scores:
    """The scores of one cache, one array per window."""

    kl: list[np.ndarray] = field(default_factory=list)  # nats, per token
    same: list[np.ndarray] = field(default_factory=list)  # the baseline's top token, per token
    loss: list[np.ndarray] = field(default_factory=list)  # nats, per token with a next one


def kl(exact: mx.array, got: mx.array) -> mx.array:
    """KL(exact || got) in nats, [...], of log-probabilities fp32 [..., vocabulary]."""
    return (mx.exp(exact) * (exact - got)).sum(axis=-1)


def compare(exact: mx.array, got: mx.array, targets: mx.array) -> tuple[mx.array, ...]:
    """Per token: KL(exact || got), whether the most likely token is the same, and the loss of
    ``got`` in nats. ``exact`` and ``got`` are log-probabilities, fp32 [..., L, V], ``targets`` the
    next tokens, [..., L] or [..., L - 1] at the end of a text."""
    same = exact.argmax(axis=-1) == got.argmax(axis=-1)
    scored = got[..., : targets.shape[-1], :]
    loss = -mx.take_along_axis(scored, targets[..., None], axis=-1).squeeze(-1)
    return kl(exact, got), same, loss


def measure(
    model: nn.Module,
    makers: dict[str, Callable[[], list]],
    windows: mx.array,
    chunk: int,
    advance: Callable[[int], object] = lambda n: None,
    finished: Callable[[str, list], None] = lambda name, caches: None,
    batch: int = 1,
    decode: int = 0,
) -> dict[str, Scores]:
    """Feed windows through the same model with each kind of cache, a chunk at a time.

    The first chunk of a window is context and is not scored: a packed cache attends to it exactly.
    Only one chunk's logits per cache are in memory at a time.

    Args:
        makers (dict): Name -> makes caches; the first one is the baseline.
        windows (mx.array): Tokens [N, T], T > ``chunk``; ``batch`` of them are fed side by side.
        advance: Called with 1 after each chunk of each cache and batch.
        finished: Called with a name and its caches at the end of the last window.
        decode (int): If not 0, all of a window but the last ``decode`` tokens is a prompt, read in
            chunks and not scored; these are fed one at a time.
    """
    scores = {name: Scores() for name in makers}
    N, T = windows.shape
    for first in range(0, N, batch):
        some = windows[first : first + batch]
        caches = {name: make() for name, make in makers.items()}
        plan = pieces(T, chunk, decode)
        readings = {name: read(model, cache, some, plan) for name, cache in caches.items()}
        parts: dict[str, list] = {name: [] for name in makers}
        for start, end, _ in plan:
            exact: mx.array | None = None
            for name, reading in readings.items():
                if (got := next(reading)) is not None:
                    exact = got if exact is None else exact
                    figures = compare(exact, got, some[:, start + 1 : end + 1])
                    mx.eval(exact, figures)
                    parts[name].append([np.array(f) for f in figures])
                advance(1)
        for name, part in parts.items():
            kl, same, loss = (np.concatenate(p, axis=1) for p in zip(*part, strict=True))
            scores[name].kl.extend(kl.astype(np.float64))
            scores[name].same.extend(same)
            scores[name].loss.extend(loss.astype(np.float64))
    for name, cache in caches.items():
        finished(name, cache)
    return scores


Piece = tuple[int, int, int]  # from, to, every how manieth token is scored, the first one at once


def read(
    model: nn.Module, caches: list, windows: mx.array, plan: Sequence[Piece]
) -> Iterator[mx.array | None]:
    """Feed windows [B, T] piece by piece. Yields the log-probabilities after each scored token,
    fp32 [B, n, V], not yet computed, or None after a piece of which none is scored."""
    for start, end, step in plan:
        tokens = windows[:, start:end]
        if step:  # no name holds the logits while others are asked for theirs
            yield _log_probabilities(model(tokens, cache=caches)[:, ::step])
        else:
            model(tokens, cache=caches)
            mx.eval([c.state for c in caches])
            yield None


def _log_probabilities(logits: mx.array) -> mx.array:
    return nn.log_softmax(logits.astype(mx.float32), axis=-1)


def pieces(T: int, chunk: int, decode: int) -> list[Piece]:
    """How a window of T tokens is fed, and whether these tokens are scored, 1 or 0."""
    if not decode:
        return [(i, min(T, i + chunk), int(i > 0)) for i in range(0, T, chunk)]
    ends = [*range(chunk, T - decode, chunk), T - decode]
    prompt = [(a, b, 0) for a, b in zip([0, *ends], ends, strict=False)]
    return prompt + [(i, i + 1, 1) for i in range(T - decode, T)]


def t_quantile(df: int, level: float = LEVEL) -> float:
    """The two-sided quantile of Student's t with ``df`` degrees of freedom."""
    # With t = √df · tan θ the density is proportional to cos(θ)^(df − 1).
    theta = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
    cdf = np.cumsum(np.cos(theta) ** (df - 1))
    return float(np.sqrt(df) * np.tan(np.interp((1 + level) / 2, cdf / cdf[-1], theta)))


@dataclass(frozen=True)
class Estimate:
    """A mean over windows with its 95 % interval; the ends are NaN for a single window."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> "Estimate":
        x = np.asarray(values, dtype=np.float64)
        half = np.nan
        if len(x) > 1:
            half = t_quantile(len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
        return cls(float(x.mean()), float(x.mean() - half), float(x.mean() + half))

    @classmethod
    def on_log_scale(cls, values: Sequence[float] | np.ndarray) -> "Estimate":
        """Of a positive quantity that spans decades: the interval of the logarithms, around the
        mean. Its ends are the mean over and times the same factor, so it never reaches 0."""
        x = np.asarray(values, dtype=np.float64)
        mean, factor = float(x.mean()), np.nan
        if len(x) > 1 and (x > 0).all():
            log = np.log(x)
            factor = float(np.exp(t_quantile(len(x) - 1) * log.std(ddof=1) / np.sqrt(len(x))))
        return cls(mean, mean / factor, mean * factor)

    def map(self, function: Callable) -> "Estimate":
        """The estimate of an increasing function of this quantity."""
        return Estimate(*(float(function(v)) for v in (self.mean, self.low, self.high)))


@dataclass
class Result:
    """The figures of one cache."""

    name: str
    bytes_per_token: float  # in all layers, where a token is kept
    kl: Estimate  # from the baseline, nats per token
    kl_p99: float  # 99th percentile over all tokens
    top1: float  # part of the tokens with the baseline's most likely next token
    perplexity: Estimate  # exp of the mean loss
    change: Estimate  # perplexity over the baseline's, minus 1, paired by window
    recall: int | None = None  # prompts answered exactly,
    prompts: int = 0  # of so many
    note: str = ""
    windows: dict[str, list[float]] = field(default_factory=dict)  # mean KL and loss of each


def summarize(name: str, scores: Scores, baseline: Scores, bytes_per_token: float) -> Result:
    """The figures of ``scores``; the change of perplexity is paired with ``baseline`` by window."""
    loss = np.array([x.mean() for x in scores.loss])
    difference = loss - np.array([x.mean() for x in baseline.loss])
    kl = [float(x.mean()) for x in scores.kl]
    return Result(
        name,
        bytes_per_token,
        Estimate.on_log_scale(kl),
        float(np.quantile(np.concatenate(scores.kl), 0.99)),
        float(np.concatenate(scores.same).mean()),
        Estimate.of(loss).map(np.exp),
        Estimate.of(difference).map(np.expm1),
        windows={"kl": kl, "loss": loss.tolist()},
    )
