"""A packed cache that holds a window, method by method like mlx-lm's RotatingKVCache."""

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from .. import ops
from ..arguments import integer
from ..format.format import Format
from .first import FirstTokens
from .packed import Merge, PackedCache
from .view import causal, in_ring_order


class PackedRotatingKVCache(PackedCache):
    """The packed ``mlx_lm.models.cache.RotatingKVCache``: the last ``max_size`` tokens.

    Args:
        fmt (Format): From :func:`mlx_kvq.format.format.make_format`.
        max_size (int): Tokens kept.
        keep (int): Of these, the first tokens of the sequence that are never dropped.
    """

    numbers = ("offset", "keep", "max_size", "_idx")

    def __init__(self, fmt: Format, max_size: int, keep: int = 0):
        super().__init__(fmt)
        self.offset = 0
        integer("max_size", max_size)
        integer("keep", keep, 0)
        self.keep = min(keep, max_size - 1)  # a new token needs a place
        self.max_size = max_size
        self._idx = 0

    def _trim(self, trim_size: int, append: mx.array | None = None) -> mx.array:
        rows = self.stored.written()
        parts = [rows]
        if trim_size > 0:
            parts = [rows[..., : self.keep, :], rows[..., trim_size + self.keep :, :]]
        if append is not None:
            parts.append(append)
        return mx.concatenate(parts, axis=2)

    def _in_order(self) -> mx.array:
        """Rows in the order of their tokens, without an unused end."""
        v, idx = self.stored.written(), self._idx
        if idx == v.shape[2]:
            return v
        if idx < self.offset:
            parts = [v[..., : self.keep, :], v[..., idx:, :], v[..., self.keep : idx, :]]
            return mx.concatenate(parts, axis=2)
        return v[..., :idx, :]

    def _update_concat(self, new: mx.array) -> None:
        if not self.empty():
            rows = self._in_order()
            self.rows, self._idx = rows, rows.shape[2]
            # Up to max_size + L - 1 rows, so that every new token sees max_size of them.
            rows = self._trim(self._idx - self.max_size + 1, new)
        else:
            rows = new
        self.offset += new.shape[2]
        self.rows, self._idx = rows, rows.shape[2]

    def _update_in_place(self, new: mx.array) -> None:
        if self.stored.grow_to(self.offset, self.max_size, new, self.step):
            self._idx = self.offset
        trim_size = self.stored.filled().shape[2] - self.max_size
        if trim_size > 0:
            self.rows = self._trim(trim_size)
            self._idx = self.max_size
        if self._idx == self.max_size:
            self._idx = self.keep
        self.stored.write(new, self._idx, 1)
        self.offset += 1
        self._idx += 1

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple:
        """Append keys [B, Hkv, L, Dk] and values [B, Hkv, L, Dv]; returns views of what is
        kept, in ring order after a single token and in temporal order after several."""
        L = keys.shape[2]
        if L == 0:
            return self._nothing(keys)
        if self._next(keys, values, self._idx):
            self.offset += 1
            self._idx += 1
            return self._fetch(self.tail)
        in_place = self._in_place(L)
        new, more = self._pack(keys, values)
        if in_place:
            self._update_in_place(new)
        else:
            self._update_concat(new)
        return self._updated(L, more)

    def _positions(self, L: int = 0) -> list[int]:
        return [self.offset + L]

    def _next_positions(self) -> tuple[list[int], None]:
        return [self.offset], None

    def _first(self) -> ops.First | None:
        count, gone = self.format.first, self.offset - self._length()
        if gone and self.keep:
            return self.oldest.seen(min(count, self.keep), 0)
        return self.oldest.seen(count, -min(gone, count))

    def _begins(self) -> mx.array:
        return mx.array([0 if self.keep else self._length() - self.offset], mx.int32)

    def _first_for_batch(self, B: int, heads: int, size: int, dtype: mx.Dtype) -> mx.array:
        if self.empty() or not self.keep or self.offset == (length := self._length()):
            return super()._first_for_batch(B, heads, size, dtype)
        # A batch does not know that some are missing after the first ones: all come from rows.
        places = mx.array([length - self.offset], mx.int32)
        return FirstTokens(self.format).of(size, self._in_order(), places, dtype)

    def _length(self) -> int:
        return min(self.offset, self.stored.filled().shape[2])

    def _limit(self) -> int:
        return self.max_size

    def _ring(self) -> tuple[int, int] | None:
        length = self._length()
        keep = self.keep if self.offset > length else 0  # is there one missing after the first ones
        ordered = length <= self.max_size and self._idx == length and keep == 0
        return None if ordered else (keep, self._idx)

    def _last(self, B: int, size: int, heads: int, dtype: mx.Dtype) -> mx.array:
        tail = super()._last(B, size, heads, dtype)
        if self.tail is None or not self.keep or self.offset == self._length():
            return tail
        if (after := self._after_first()) >= min(size, self.max_size):
            return tail
        # A batch does not know that some are missing after the first ones: these come from rows.
        first = self.newest.of_rows(self._in_order()[:, :, : self.keep], size - after)
        return mx.concatenate([first.astype(tail.dtype), tail[:, :, size - after :]], axis=2)

    def _after_first(self) -> int:
        """Tokens that the newest one follows without a gap, itself included."""
        length = self._length()
        return length - self.keep if self.offset > length else length

    def _for_batch(self) -> tuple[int, int]:
        prompt, exact = super()._for_batch()
        return prompt, min(exact, 0 if self.empty() else self._after_first())

    def size(self) -> int:
        return min(self.offset, self.max_size)

    def is_trimmable(self) -> bool:
        return self.offset < self.max_size

    def trim(self, n: int) -> int:
        integer("n", n, 0)
        n = min(self.offset, n)
        self.offset -= n
        self._idx -= n
        self._drop(n, self._idx if self.offset else 0)
        return n

    def can_rewind(self, n: int) -> bool:
        """Whether the last ``n`` tokens can be taken back although the cache is full: what a
        chunk of several tokens will drop is kept until the next update."""
        if self.empty() or self._idx != self.stored.filled().shape[2]:
            return False
        left = self._idx - n
        return left >= min(self.offset - n, self.max_size)

    def rewind(self, n: int) -> int:
        """Take back the last ``n`` tokens; only after :meth:`can_rewind`."""
        self._idx -= n
        self.offset -= n
        self.rows = self.stored.written()[..., : self._idx, :]
        self._drop(n, self._idx)
        return n

    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False):
        if not self._in_place(N):
            window_size = window_size or self.max_size
            offset = min(self.max_size - 1, self.offset)
            if offset + N > window_size or return_array:
                mask = create_causal_mask(N, offset, window_size=window_size)
                return causal(mask, None, window_size)
            return "causal"
        if window_size is None:
            return None
        # The window may be smaller than what is kept.
        if self.offset >= window_size and self.max_size > window_size:
            idx = 0 if self._idx >= self.max_size else self._idx
            mask_size = min(self.offset + 1, self.max_size)
            mask = mx.arange(mask_size) >= (mask_size - window_size)
            return in_ring_order(mx.roll(mask, idx + 1))
        return None

    merge = Merge()  # as in mlx-lm, ``keep`` ends there
