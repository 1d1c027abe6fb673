"""A packed cache that grows, method by method like mlx-lm's KVCache."""

import mlx.core as mx
from mlx_lm.models.cache import create_attention_mask

from ..arguments import integer
from ..format.format import Format
from .packed import Merge, PackedCache
from .view import causal


class PackedKVCache(PackedCache):
    """The packed ``mlx_lm.models.cache.KVCache``: grows in steps of 256 tokens.

    Args:
        fmt (Format): From :func:`mlx_kvq.format.format.make_format`.
    """

    numbers = ("offset",)

    def __init__(self, fmt: Format):
        super().__init__(fmt)
        self.offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple:
        """Append keys [B, Hkv, L, Dk] and values [B, Hkv, L, Dv]; returns views of all."""
        prev, L = self.offset, keys.shape[2]
        if L == 0:
            return self._nothing(keys)
        if self._next(keys, values, prev):
            self.offset = prev + 1
            return self._fetch(self.tail)
        rows, more = self._pack(keys, values, prev)
        self.stored.append(rows, prev, L, self.step)
        self.offset += L
        return self._updated(L, more)

    def _positions(self, L: int = 0) -> list[int]:
        return [self.offset + L]

    def _next_positions(self) -> tuple[list[int], None]:
        return [self.offset], None

    def _length(self) -> int:
        return self.offset

    def _in_order(self) -> mx.array:
        return self.stored.written()[..., : self.offset, :]

    def size(self) -> int:
        return self.offset

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        integer("n", n, 0)
        n = min(self.offset, n)
        self.offset -= n
        self._drop(n, self.offset)
        return n

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):
        mask = create_attention_mask(N, self.offset, return_array, window_size)
        if isinstance(mask, mx.array) and N > 1:
            return causal(mask, None, window_size)
        return mask

    merge = Merge()
