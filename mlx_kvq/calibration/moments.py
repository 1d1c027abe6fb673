"""One pass over text: the moments of queries, keys and values at every attention.

Only the moments and one window of exact keys and values are kept, so the memory does not grow with
the text. Keys and queries are turned back to position 0 where their RoPE is known.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..format.spec import Spec
from ..stock import CachePath, map_leaves
from . import sensitivity
from .exact import ExactCache, attended
from .positions import Rope, RopeWatch, spread
from .shards import is_sharded

CHUNK = 256  # tokens fed at a time
# First tokens of a window that no moment counts. Their keys are outliers in most models, and a
# cache keeps them exactly; their queries read no other token.
FIRST = 4
USUAL = Spec("int4", "srft")  # whose newest tokens count as read exactly, whatever the cache


class Moments:
    """Mean and second moments of vectors x [n, H, D], merged batch by batch in float64.

    Chan, Golub, LeVeque (1979): the batches' own means are taken off before squaring, so a
    large mean costs no digits.
    """

    def __init__(self, covariance: bool = False):
        self.n = 0
        self.mean: np.ndarray | float = 0.0
        self.m2: np.ndarray | float = 0.0  # Σ (x − mean)², [H, D] or [H, D, D]
        self.covariance = covariance

    def add(self, x: mx.array) -> None:
        """x [B, H, L, D] in any float dtype."""
        if x.shape[2] == 0:
            return
        x = x.astype(mx.float32).swapaxes(0, 1).flatten(1, 2)  # [H, B * L, D]
        n = x.shape[1]
        mean = x.mean(axis=1, keepdims=True)
        x = x - mean
        m2 = x.swapaxes(-1, -2) @ x if self.covariance else mx.square(x).sum(axis=1)
        mx.eval(mean, m2)
        batch_mean = np.array(mean, dtype=np.float64)[:, 0]
        step = batch_mean - self.mean
        square = step[:, :, None] * step[:, None] if self.covariance else step**2
        total = self.n + n
        self.m2 = self.m2 + np.array(m2, dtype=np.float64) + square * (self.n * n / total)
        self.mean = self.mean + step * (n / total)
        self.n = total

    @property
    def variance(self) -> np.ndarray:
        """E[(x − mean)²], [H, D], or the covariance [H, D, D]."""
        return np.asarray(self.m2) / max(self.n, 1)

    @property
    def square(self) -> np.ndarray:
        """E[x²], [H, D], or E[x xᵀ] [H, D, D]."""
        mean = np.asarray(self.mean)
        outer = mean[:, :, None] * mean[:, None] if self.covariance else mean**2
        return self.variance + outer


class LayerMoments:
    """The moments of one cache, per KV head. Queries are averaged over the query heads of a KV
    head; ``reads`` are queries times the square root of their weight (``sensitivity``). Keys and
    queries are as before ``rope``; where that is None, as they came."""

    def __init__(self) -> None:
        self.keys, self.values = Moments(covariance=True), Moments()
        self.queries, self.reads = Moments(covariance=True), Moments(covariance=True)
        self.rope: Rope | None = None
        self._skip = 0  # first tokens of the chunk that do not count

    def add(self, keys: mx.array, values: mx.array, offset: int, rope: Rope | None) -> None:
        """keys and values [B, Hkv, L, D], the first of them at ``offset``, turned by ``rope``."""
        self.rope, self._skip = rope, max(0, FIRST - offset)
        self.keys.add(self._at_zero(keys))
        self.values.add(values[:, :, self._skip :])

    def add_queries(self, q: mx.array, weight: mx.array) -> None:
        """q [B, Hq, L, D], at the positions of the keys that were added last, and their weights
        [B, Hq, L].

        Raises:
            ValueError: If a model attends to a cache before it gives it keys.
        """
        if not self.keys.n:
            raise ValueError(
                "This model reads a cache before it gives it keys, so it cannot be calibrated: use "
                "a spec with calibrate=off."
            )
        if self._skip < q.shape[2]:
            q = self._at_zero(q)
            of_heads = q.shape[0], np.shape(self.keys.mean)[0], -1, q.shape[-1]
            self.queries.add(q.reshape(of_heads))
            q = q * mx.sqrt(weight[:, :, self._skip :, None])
            self.reads.add(q.reshape(of_heads))

    def _at_zero(self, x: mx.array) -> mx.array:
        """All of x [B, H, L, D] that counts, turned back."""
        x = x if self.rope is None else self.rope.undo(x)
        return x[:, :, self._skip :]

    def key_moments(self, lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """E[k] [Hkv, D] and the covariance [Hkv, D, D] over contexts of these lengths."""
        mean, covariance = np.asarray(self.keys.mean), self.keys.variance
        if self.rope is None:
            return mean, covariance
        mean, square = spread(mean, self.keys.square, self.rope, lengths)
        return mean, square - mean[:, :, None] * mean[:, None]

    def query_square(self, lengths: list[int]) -> np.ndarray:
        """E[q qᵀ] [Hkv, D, D] over contexts of these lengths: the mean of that of all queries
        alike and that of queries by their weights, which is as large."""
        square, read = self.queries.square, self.reads.square
        size, of_read = (np.einsum("hdd->h", M)[:, None, None] for M in (square, read))
        some = of_read > 0  # short texts read nothing that is rounded
        square = np.where(some, (square + read * size / np.where(some, of_read, 1)) / 2, square)
        if self.rope is None:
            return square
        return spread(np.zeros(square.shape[:2]), square, self.rope, lengths)[1]


class _Recorder(ExactCache):
    """The cache of one layer during the pass; every vector goes to the moments."""

    def __init__(self, moments: LayerMoments, window: int | None, ropes: RopeWatch):
        super().__init__(window)
        self.moments, self.ropes = moments, ropes

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.moments.add(keys, values, self.offset, self.ropes.call_that_made(keys))
        return super().update_and_fetch(keys, values)

    def attention(self, queries, keys, values, **options) -> mx.array:
        out, weight = sensitivity.attend(
            queries,
            keys,
            values,
            rounded=slice(FIRST, None),
            near=USUAL.recent_in(self.window),
            **options,
        )
        self.moments.add_queries(queries, weight)
        return out


@contextmanager
def fast_on_cpu(model: nn.Module) -> Iterator[None]:
    """The model in fp32 on CPU, which emulates half precision: some ten times faster."""
    if mx.default_device().type != mx.DeviceType.cpu:
        yield
        return
    own = model.parameters()
    model.set_dtype(mx.float32)
    try:
        yield
    finally:
        model.update(own)


def collect(
    model: nn.Module,
    make_caches: Callable[[], list],
    paths: Iterable[CachePath],
    windows: Iterable[mx.array],
    on_read: Callable[[int], object] = lambda tokens: None,
) -> dict[CachePath, LayerMoments]:
    """Run ``model`` over windows of tokens, [n] each, and gather the moments of its own caches at
    ``paths``. ``on_read`` is told how many tokens each chunk had."""
    moments = {path: LayerMoments() for path in paths}
    ropes = RopeWatch()

    def recorder(path: CachePath, cache):
        window = getattr(cache, "max_size", None)
        return _Recorder(moments[path], window, ropes) if path in moments else cache

    with attended(), ropes.watching(), fast_on_cpu(model):
        for tokens in windows:
            caches = map_leaves(recorder, make_caches())
            for i in range(0, tokens.size, CHUNK):
                chunk = tokens[None, i : i + CHUNK]
                logits = model(chunk, cache=caches)
                # The moments evaluate what they need; logits are a fifth to a half of the work.
                # What one rank does not evaluate it does not send, and others wait for it.
                if is_sharded(model):
                    mx.eval(logits)
                on_read(chunk.size)
    return moments
