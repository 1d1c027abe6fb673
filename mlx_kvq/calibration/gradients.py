"""How a model's prediction depends on each layer's keys and values: one backward pass over text.

With ``g`` the gradient of the log-likelihood of tokens that the model draws itself, by the outputs
of a layer's attention, errors of its keys or values that move these by ``d`` cost ½ Σ (g · d)²
nats, the sum over queries (``docs/mathematics.md``). ``d`` is computed, so errors that tokens have
in common count as what they are.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial

import mlx.core as mx
import mlx.nn as nn

from ..stock import CachePath, Shapes, map_leaves
from .exact import ExactCache, attended
from .moments import fast_on_cpu

Side = int  # 0: keys, 1: values


class Gradients:
    """Of one cache and L tokens, by the outputs of mlx-lm's shared attention.

    Args:
        keys, values (mx.array): Post-RoPE keys [1, Hkv, L, Dk] and values [1, Hkv, L, Dv].
        reads (list): Each attention over them: what errors of keys and values, of what a query does
            not read exactly, make of its output [1, Hq, L, Dv].
        by (list): Of each, the gradient by its output in nats, likewise, fp32.
    """

    def __init__(
        self,
        keys: mx.array,
        values: mx.array,
        reads: Sequence[Callable[[mx.array, mx.array], mx.array]],
        by: list[mx.array],
    ):
        self.keys, self.values, self.reads, self.by = keys, values, reads, by

    @cached_property
    def _exact(self) -> list[mx.array]:
        return [read(*map(mx.zeros_like, (self.keys, self.values))) for read in self.reads]

    def cost(self, side: Side, error: mx.array) -> mx.array:
        """Nats that these errors of the keys, or of the values, cost in all."""
        errors = [mx.zeros_like(x) for x in (self.keys, self.values)]
        errors[side] = error
        total = mx.array(0.0)
        for read, exact, by in zip(self.reads, self._exact, self.by, strict=True):
            total = total + mx.square(((read(*errors) - exact) * by).sum(axis=(1, 3))).sum() / 2
        return total


class GradientsByToken(Gradients):
    """Where attention is not mlx-lm's shared one: by keys and values themselves, ``by`` [1, Hkv, L,
    Dk] and [1, Hkv, L, Dv]. Errors of different tokens count as independent."""

    def cost(self, side: Side, error: mx.array) -> mx.array:
        return mx.square((error * self.by[side]).sum(axis=-1)).sum() / 2


class _Nudged(ExactCache):
    """The cache of one layer during the pass. To the outputs of its attention it adds arrays of
    zeros, whose gradients are theirs; where attention is not mlx-lm's shared one, to keys and
    values.

    Args:
        nudges (list, optional): Zeros, one array [1, Hq, L, Dv] for each attention over it; or [1,
            Hkv, L, Dk] and [1, Hkv, L, Dv].
        apart (bool): Whether attention is not mlx-lm's shared one.
        taps (dict): All of a pass; a model may name one cache and read the keys of another.
        window (int, optional): Tokens that the model's own cache holds.
    """

    def __init__(
        self,
        nudges: list[mx.array] | None,
        apart: bool,
        taps: "Mapping[CachePath, _Nudged]",
        window: int | None,
    ):
        super().__init__(window)
        self.nudges, self.apart, self.taps = nudges, apart, taps
        self.came: list[mx.array] = []  # keys, values, and the queries of each attention over them
        self.options: list[dict] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.came = [keys, values]
        if self.apart and self.nudges is not None:
            keys, values = (
                x + nudge.astype(x.dtype) for x, nudge in zip(self.came, self.nudges, strict=True)
            )
        return super().update_and_fetch(keys, values)

    def attention(self, queries, keys, values, **options) -> mx.array:
        out = super().attention(queries, keys, values, **options)
        of = next((cache for cache in self.taps.values() if cache.keys is keys), self)
        if of.apart:
            return out
        of.came.append(queries)
        of.options.append(options)
        if of.nudges is None:
            return out
        return out + of.nudges[len(of.options) - 1].astype(out.dtype)


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

    def run(ids: mx.array, nudges: Mapping[CachePath, list[mx.array]]):
        """Logits, and the caches."""
        taps: dict[CachePath, _Nudged] = {}

        def tapped(path: CachePath, cache):
            if path not in shapes:
                return cache
            window = getattr(cache, "max_size", None)
            taps[path] = _Nudged(nudges.get(path), path in apart, taps, window)
            return taps[path]

        return model(ids[None], cache=map_leaves(tapped, make_caches()))[0], taps

    def likelihood(nudges: list[list[mx.array]]):
        logits, taps = run(tokens, dict(zip(shapes, nudges, strict=True)))
        said = nn.log_softmax(logits.astype(mx.float32))
        drawn = mx.random.categorical(mx.stop_gradient(said), key=key)
        total = mx.take_along_axis(said, drawn[:, None], axis=-1).sum()
        options.update({path: taps[path].options for path in shapes})
        return total, [taps[path].came for path in shapes]

    options: dict[CachePath, list[dict]] = {}
    with attended(), fast_on_cpu(model), _in_training(model):
        _, first = run(tokens[:2], {})  # says how many heads ask, and how often
        zeros = [_zeros(first[path], L) for path in shapes]
        try:
            (_, came), found = mx.value_and_grad(likelihood)(zeros)
            mx.eval(came, found)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"This model has no gradient: {reason}") from error
    made: dict[CachePath, Gradients] = {}
    for path, arrays, by in zip(shapes, came, found, strict=True):
        keys, values, *queries = (x.astype(mx.float32) for x in arrays)
        reads = [
            partial(attention_over, q, keys, values, recent=exact[path], **how)
            for q, how in zip(queries, options[path], strict=True)
        ]
        kind = GradientsByToken if path in apart else Gradients
        made[path] = kind(keys, values, reads, by)
    return made


def _zeros(tap: _Nudged, L: int) -> list[mx.array]:
    """The nudges of L tokens for a cache that a few went through."""
    keys, values, *queries = tap.came
    if tap.apart:
        return [mx.zeros((1, x.shape[1], L, x.shape[3])) for x in (keys, values)]
    return [mx.zeros((1, q.shape[1], L, values.shape[3])) for q in queries]
