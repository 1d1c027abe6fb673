"""One pass over text: the moments of queries, keys and values at every attention.

Nothing of a token is kept but its share of the moments, and one window of exact keys and
values at a time, so the memory does not grow with the text.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import base
from mlx_lm.models import cache as stock

CHUNK = 256  # tokens fed at a time
Path = tuple[int, ...]  # of a cache: (layer,) or (layer, place in a CacheList)


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
    """The moments of one cache: keys and values per KV head, queries per KV head too, over the
    query heads that share it; of queries, and if asked of keys, all second moments E[q qᵀ]."""

    def __init__(self, covariance: bool = False):
        self.keys, self.values = Moments(covariance), Moments()
        self.queries = Moments(covariance=True)

    def add_queries(self, q: mx.array) -> None:
        """q [B, Hq, L, D]."""
        B, _, _, D = q.shape
        self.queries.add(q.reshape(B, np.shape(self.keys.mean)[0], -1, D))


class _Recorder:
    """The cache of one layer during the pass: exact, and every vector goes to the moments.

    It holds all tokens of its window, also where the model's own cache would drop them; the
    mask hides those. ``start`` shifts the positions that RoPE sees: a whole window moved along
    is computed the same, as rotary attention depends on distances only, but its keys are those
    of the later positions.
    """

    def __init__(self, moments: LayerMoments, window: int | None, start: int):
        self.moments = moments
        self.window = window
        self.start = start
        self.kept: tuple[mx.array, mx.array] | None = None

    @property
    def held(self) -> int:
        return 0 if self.kept is None else self.kept[0].shape[2]

    @property
    def offset(self) -> int:
        return self.start + self.held

    # mlx-lm sends a cache with these two to its quantized attention function, and `bits`
    # with it: our way back to the layer.
    @property
    def bits(self) -> LayerMoments:
        return self.moments

    group_size = None

    @property
    def state(self):
        return self.kept

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.moments.keys.add(keys)
        self.moments.values.add(values)
        if self.kept is not None:
            keys = mx.concatenate([self.kept[0], keys], axis=2)
            values = mx.concatenate([self.kept[1], values], axis=2)
        self.kept = keys, values
        return keys, values

    def keys_and_values(self) -> tuple[mx.array, mx.array] | None:
        """For layers that read what another one keeps."""
        return self.kept

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):
        window = window_size or self.window
        if window is not None and self.held + N > window:
            return base.create_causal_mask(N, self.held, window_size=window)
        return stock.create_attention_mask(N, self.held, return_array, None)


@contextmanager
def _attention_recorded() -> Iterator[None]:
    original = base.quantized_scaled_dot_product_attention

    def attention(queries, keys, values, scale, mask, **kwargs):
        moments = kwargs.get("bits")
        if not isinstance(moments, LayerMoments):
            return original(queries, keys, values, scale=scale, mask=mask, **kwargs)
        moments.add_queries(queries)
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=scale, mask=mask, sinks=kwargs.get("sinks")
        )

    setattr(base, "quantized_scaled_dot_product_attention", attention)  # noqa: B010 (for mypy)
    try:
        yield
    finally:
        setattr(base, "quantized_scaled_dot_product_attention", original)  # noqa: B010


@contextmanager
def fast_on_cpu(model: nn.Module) -> Iterator[None]:
    """On CPU, half precision is emulated: there the pass runs some ten times faster in fp32."""
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
    paths: Iterable[Path],
    windows: Iterable[tuple[mx.array, int]],
    covariance: bool = False,
) -> dict[Path, LayerMoments]:
    """Run ``model`` over token windows and gather the moments of some of its caches.

    Args:
        model (nn.Module): A model from ``mlx_lm.load``.
        make_caches: Makes the model's own caches.
        paths: Which of them to record; ``KVCache`` or ``RotatingKVCache``.
        windows: Tokens [n] and the position of the first of them.
        covariance (bool): Of the keys all second moments, not just each channel's.
    """
    moments = {path: LayerMoments(covariance) for path in paths}
    with _attention_recorded(), fast_on_cpu(model):
        for tokens, start in windows:
            caches = [_record(c, (i,), moments, start) for i, c in enumerate(make_caches())]
            for i in range(0, tokens.size, CHUNK):
                mx.eval(model(tokens[None, i : i + CHUNK], cache=caches))
    return moments


def _record(cache, path: Path, moments: dict[Path, LayerMoments], start: int):
    if isinstance(cache, stock.CacheList):
        parts = enumerate(cache.caches)
        return stock.CacheList(*(_record(c, (*path, i), moments, start) for i, c in parts))
    if path not in moments:
        return cache
    return _Recorder(moments[path], getattr(cache, "max_size", None), start)
