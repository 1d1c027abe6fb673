"""How a model's prediction depends on each layer's keys and values: one backward pass over text.

With ``g`` the gradient of the log-likelihood of tokens that the model draws itself, small errors
``e`` of a key or value cost ½ E[(g · e)²] nats (``docs/mathematics.md``).
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..stock import CachePath, Shapes, map_leaves
from .exact import ExactCache, attended
from .moments import fast_on_cpu


@dataclass(frozen=True)
class Gradients:
    """Of one cache and L tokens.

    Args:
        keys, values (mx.array): Post-RoPE keys [1, Hkv, L, Dk] and values [1, Hkv, L, Dv].
        of_keys, of_values (mx.array): Gradients in nats, likewise, fp32.
    """

    keys: mx.array
    values: mx.array
    of_keys: mx.array
    of_values: mx.array

    def after(self, n: int) -> "Gradients":
        """Without the first ``n`` tokens."""
        return Gradients(*(x[:, :, n:] for x in self._arrays()))

    @classmethod
    def joined(cls, windows: "list[Gradients]") -> "Gradients":
        """Those of one cache and several windows."""
        parts = zip(*(w._arrays() for w in windows), strict=True)
        return cls(*(mx.concatenate(list(x), axis=2) for x in parts))

    def _arrays(self) -> tuple[mx.array, ...]:
        return self.keys, self.values, self.of_keys, self.of_values


class _Nudged(ExactCache):
    """The cache of one layer during the pass. To the keys and values that a query does not read
    exactly it adds arrays of zeros, whose gradients are theirs.

    Args:
        nudges (list): Zeros, [1, Hkv, L, Dk] and [1, Hkv, L, Dv].
        recent (int, optional): Newest tokens, its own included, that a query reads exactly;
            ``None`` where attention is not mlx-lm's shared one, and cannot tell.
        window (int, optional): Tokens that the model's own cache holds.
    """

    def __init__(self, nudges: list[mx.array], recent: int | None, window: int | None):
        super().__init__(window)
        self.nudges, self.recent = nudges, recent
        self.came: tuple[mx.array, ...] = ()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.came = keys, values
        if self.recent is None:
            keys, values = (
                x + nudge.astype(x.dtype) for x, nudge in zip(self.came, self.nudges, strict=True)
            )
        return super().update_and_fetch(keys, values)

    def attention(self, queries, keys, values, **options) -> mx.array:
        if (recent := self.recent) is None:
            return super().attention(queries, keys, values, **options)

        def attend(q, k, v, dk, dv):
            return attention_over(q, k, v, dk, dv, recent, **options)

        # Its matrices of L x L are made again on the way back, not kept.
        return mx.checkpoint(attend)(queries, keys, values, *self.nudges)


def attention_over(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    key_errors: mx.array,
    value_errors: mx.array,
    recent: int,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> mx.array:
    """Attention of q [B, Hq, L, Dk] over keys [B, Hkv, L, Dk] and values [B, Hkv, L, Dv] that are
    exact for the ``recent`` tokens up to a query's own, and have errors, arrays of the same shapes,
    for all others."""
    (B, heads, L, D), H, T = q.shape, keys.shape[1], keys.shape[2]
    q = q.reshape(B, H, heads // H, L, D)
    ages = mx.arange(T - L, T)[:, None] - mx.arange(T)
    is_far = ages >= recent
    k, v, dk, dv = (
        x[:, :, None].astype(values.dtype) for x in (keys, values, key_errors, value_errors)
    )
    scores = q @ k.swapaxes(-1, -2) + mx.where(is_far, q @ dk.swapaxes(-1, -2), 0)
    scores = scores.astype(mx.float32) * scale
    if isinstance(mask, str):
        mask = ages >= 0
    if mask is not None:
        if mask.ndim == 4:  # [B or 1, Hq or 1, L, T]
            mask = mask.reshape(mask.shape[0], -1, heads // H if mask.shape[1] > 1 else 1, L, T)
        is_seen = mask.dtype == mx.bool_
        scores = mx.where(mask, scores, -1e30) if is_seen else scores + mask
    if sinks is not None:
        sink = mx.broadcast_to(sinks.reshape(1, H, -1, 1, 1), (*scores.shape[:-1], 1))
        scores = mx.concatenate([scores, sink.astype(mx.float32)], axis=-1)
    p = mx.softmax(scores, axis=-1)[..., :T].astype(values.dtype)
    out = p @ v + mx.where(is_far, p, 0) @ dv
    return out.reshape(B, heads, L, -1)


@contextmanager
def _in_training(model: nn.Module) -> Iterator[None]:
    """Some modules run kernels without a gradient unless they are in training."""
    were = [(m, m.training) for _, m in model.named_modules()]
    model.train()
    try:
        yield
    finally:
        for module, training in were:
            module._training = training


def gradients(
    model: nn.Module,
    make_caches: Callable[[], list],
    shapes: Shapes,
    tokens: mx.array,
    recent: int | Mapping[CachePath, int] = 0,
    apart: Collection[CachePath] = (),
    seed: int = 0,
) -> dict[CachePath, Gradients]:
    """Of every cache in ``shapes``, over a window ``tokens`` [L].

    Args:
        recent (int, mapping): Newest tokens that each query reads exactly, of every cache: only
            what it reads otherwise counts.
        apart (collection): Caches whose attention is not mlx-lm's shared one: there all counts.
        seed (int): Of the tokens that are drawn.

    Raises:
        ValueError: If the model has no gradient.
    """
    L, key = tokens.size, mx.random.key(seed)
    exact = dict.fromkeys(shapes, recent) if isinstance(recent, int) else recent
    zeros = {
        path: [mx.zeros((1, H, L, D)) for D in (k_dim, v_dim)]
        for path, (H, k_dim, v_dim) in shapes.items()
    }

    def likelihood(nudges: list[list[mx.array]]):
        given = dict(zip(shapes, nudges, strict=True))
        taps: dict[CachePath, _Nudged] = {}

        def tapped(path: CachePath, cache):
            if path not in given:
                return cache
            window = getattr(cache, "max_size", None)
            taps[path] = _Nudged(given[path], None if path in apart else exact[path], window)
            return taps[path]

        logits = model(tokens[None], cache=map_leaves(tapped, make_caches()))
        said = nn.log_softmax(logits[0].astype(mx.float32))
        drawn = mx.random.categorical(mx.stop_gradient(said), key=key)
        total = mx.take_along_axis(said, drawn[:, None], axis=-1).sum()
        return total, [taps[path].came for path in shapes]

    with attended(), fast_on_cpu(model), _in_training(model):
        try:
            (_, came), found = mx.value_and_grad(likelihood)(list(zeros.values()))
            mx.eval(came, found)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"This model has no gradient: {reason}") from error
    return {path: Gradients(*pair, *by) for path, pair, by in zip(shapes, came, found, strict=True)}
