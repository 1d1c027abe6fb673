"""A cache for passes over text: all as it came, also what the model's own cache would drop."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx_lm.models import base
from mlx_lm.models import cache as stock


class ExactCache:
    """Keys and values of one layer, and its attention inside :func:`attended`. It holds all tokens
    of its text, also where the model's own cache would drop them; the mask hides those.

    Args:
        window (int, optional): Tokens that the model's own cache holds.
    """

    group_size = None

    def __init__(self, window: int | None = None):
        # mlx-lm routes caches with `bits` and `group_size` to its quantized attention function,
        # and passes `bits`: there this cache is found.
        self.bits = self
        self.window = window
        self.offset = 0
        # mlx-lm's pipelines set `keys` to what depends on the message to the next rank.
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.keys is not None and self.values is not None:
            keys = mx.concatenate([self.keys, keys], axis=2)
            values = mx.concatenate([self.values, values], axis=2)
        self.keys, self.values = keys, values
        self.offset = keys.shape[2]
        return keys, values

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None]:
        return self.keys, self.values

    def keys_and_values(self) -> tuple[mx.array | None, mx.array | None]:
        """For layers that read another layer's cache."""
        return self.state

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):
        window = window_size or self.window
        if window is not None and self.offset + N > window:
            return base.create_causal_mask(N, self.offset, window_size=window)
        return stock.create_attention_mask(N, self.offset, return_array, None)

    def attention(self, queries: mx.array, keys: mx.array, values: mx.array, **options) -> mx.array:
        """Attention of queries [B, Hq, L, Dk]; options are ``scale``, ``mask`` and ``sinks``."""
        return mx.fast.scaled_dot_product_attention(queries, keys, values, **options)


@contextmanager
def attended() -> Iterator[None]:
    """Inside, mlx-lm's attention over an :class:`ExactCache` is the cache's own."""
    original = base.quantized_scaled_dot_product_attention

    def attention(queries, keys, values, scale, mask, sinks=None, **named: Any):
        cache = named.get("bits")
        if not isinstance(cache, ExactCache):
            return original(queries, keys, values, scale=scale, mask=mask, **named)
        return cache.attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)

    setattr(base, "quantized_scaled_dot_product_attention", attention)  # noqa: B010 (for mypy)
    try:
        yield
    finally:
        setattr(base, "quantized_scaled_dot_product_attention", original)  # noqa: B010
