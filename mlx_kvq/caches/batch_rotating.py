"""Packed rotating caches for a batch, like mlx-lm's BatchRotatingKVCache."""

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from .. import ops
from ..arguments import integer
from ..format.format import Format
from .batch import PackedBatch, _ints
from .packed import batch_of
from .rotating import PackedRotatingKVCache
from .view import causal, in_ring_order


@batch_of(PackedRotatingKVCache)
class PackedBatchRotatingKVCache(PackedBatch):
    """The packed ``mlx_lm.models.cache.BatchRotatingKVCache``: the last ``max_size`` tokens.

    Args:
        fmt (Format): From :func:`mlx_kvq.format.format.make_format`.
        max_size (int): Tokens kept of each sequence.
        left_padding (list): For each sequence, the padding before its first token.
    """

    numbers = ("offset", "left_padding", "max_size", "_offset", "_idx", "rotated")

    # Where sequences begin, as numbers and as an array: to make one costs more than a launch.
    _first_places: tuple[tuple[int, ...], mx.array] | None = None

    def __init__(self, fmt: Format, max_size: int, left_padding: list[int]):
        super().__init__(fmt, left_padding)
        self.max_size = max_size
        self._offset = 0  # rows seen, padding included
        self.rotated = False

    def _limit(self) -> int:
        return self.max_size

    def _drop_front(self, n: int) -> None:
        if n > 0:
            self.rows = self.stored.written()[..., n:, :]
            self.left_padding = self.left_padding - n

    def _temporal_order(self) -> None:
        if self.rotated:
            rows = mx.roll(self.stored.written(), -self._idx, 2)
            self.rows, self._idx, self.rotated = rows, rows.shape[2], False

    def _update_concat(self, new: mx.array) -> None:
        if not self.empty():
            self._temporal_order()
            self.rows = self.stored.written()[..., : self._idx, :]
            if self._lengths is not None:
                # Padding of an earlier chunk goes left, so that it evicts no token.
                self._roll_right(self._excess(self._lengths))
            # Up to max_size + L - 1 rows, so that every new token sees max_size of them.
            self._drop_front(self._idx - self.max_size + 1)
            new = mx.concatenate([self.stored.written(), new], axis=2)
        self.rows, self._idx = new, new.shape[2]

    def _update_in_place(self, new: mx.array) -> None:
        if self.stored.grow_to(self._offset, self.max_size, new, self.step):
            self._idx = self._offset
        if (extra := self.stored.filled().shape[2] - self.max_size) > 0:
            self._drop_front(extra)
            self._idx = self.max_size
        if self._idx == self.max_size:
            self.rotated = True
            self._idx = 0
        if self.rotated:
            self.left_padding = self.left_padding - 1
        self.stored.write(new, self._idx, 1)
        self._idx += 1

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple:
        """Append keys [B, Hkv, L, Dk] and values [B, Hkv, L, Dv]; returns views of what is
        kept, in ring order after a single token and in temporal order after several."""
        L = keys.shape[2]
        if L == 0:
            return self._nothing(keys)
        in_place = self._in_place(L)
        if self._next(keys, values, self._idx):
            more = {"tail": self.tail}
            self._idx += 1
            if self.rotated:
                self.left_padding = self.left_padding - 1
        else:
            new, more = self._pack(keys, values)
            if in_place:
                self._update_in_place(new)
            else:
                self._update_concat(new)
        self._offset += L
        self._add(L)
        return self._updated(L, more, self.left_padding, self.offset)

    def _length(self) -> int:
        return min(self._offset, self.stored.filled().shape[2])

    def _ring(self) -> tuple[int, int] | None:
        ordered = self._length() <= self.max_size and not self.rotated
        return None if ordered else (0, self._idx)

    def _first(self) -> ops.First | None:
        if (tokens := self.oldest).array is None:
            return None
        length, count = self._length(), self.format.first
        places = tuple(max(length - n, -count) for n in self._seen)
        if self._first_places is None or self._first_places[0] != places:
            self._first_places = places, mx.array(places, mx.int32)
        return tokens.seen(count, self._first_places[1])

    def _in_order(self) -> mx.array:
        rows = self.stored.written()
        return mx.roll(rows, -self._idx, 2) if self.rotated else rows[:, :, : self._idx]

    def size(self) -> int:
        return min(self._offset, self.max_size)

    def prepare(self, *, left_padding=None, lengths=None, right_padding=None) -> None:
        """Announce the padding of the chunks to come, one number for each sequence."""
        self._prepare_left(left_padding)
        if right_padding is not None and max(right_padding) > 0:
            if lengths is None:
                raise ValueError("Right padding of a rotating batch needs lengths, got none.")
            self._lengths = [seen + n for seen, n in zip(self._seen, lengths, strict=True)]

    def finalize(self) -> None:
        """After right-padded chunks: move the padding to the left."""
        if self._lengths is not None:
            self._roll_right(self._excess(self._lengths))
            self._lengths = None
            self._start()

    def _excess(self, lengths: list[int]) -> list[int]:
        return [max(0, seen - n) for seen, n in zip(self._seen, lengths, strict=True)]

    def is_trimmable(self) -> bool:
        return self._offset < self.max_size

    def trim(self, n: int) -> int:
        integer("n", n, 0)
        n = min(self._offset, n)
        self._offset -= n
        self._idx -= n
        self._forget(n)
        self._drop(n, self._idx)
        return n

    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False):
        starts = self.left_padding
        window_size = window_size or self.max_size
        offset = min(self.max_size - 1, self._offset)
        in_place = self._in_place(N)
        if (dropped := self._idx - self.max_size + int(not in_place)) > 0:
            starts = starts - dropped
        rotated = in_place and (self.rotated or self._idx >= self.max_size)
        if rotated:
            starts = starts - 1
        mask = create_causal_mask(N, offset, window_size, left_padding=starts)
        if rotated:
            # In ring order the padding is no prefix, so this mask is used as it is.
            idx = 0 if self._idx >= self.max_size else self._idx
            return in_ring_order(mx.roll(mask, idx + 1, -1))
        return causal(mask, mx.maximum(starts, 0), window_size)

    def extend(self, other: "PackedBatchRotatingKVCache") -> None:
        """Append the sequences of ``other``."""
        both_hold = not (self.empty() and other.empty())
        if both_hold and (self.rotated != other.rotated or self._idx != other._idx):
            self._temporal_order()
            other._temporal_order()
        self._append(other)
        if both_hold:
            self._offset = max(self._offset, other._offset)

    def extract(self, idx: int) -> PackedRotatingKVCache:
        """A copy of one sequence, as a single cache."""
        cache = PackedRotatingKVCache(self.format, self.max_size)._made_like(self)
        padding = max(0, _ints(self.left_padding)[idx])
        end = self.max_size if self.rotated else self._idx
        if self.empty() or padding >= end:
            return cache
        rows = self.stored.written()[idx : idx + 1]
        if self.rotated:
            rows = mx.roll(rows, -self._idx, 2)
        cache.rows = mx.contiguous(rows[:, :, padding:end])
        cache.offset, cache._idx = self._seen[idx], end - padding
        cache.newest.take(self.newest, idx)
        cache.oldest.take(self.oldest, idx)
        cache._start()
        return cache

    @classmethod
    def merge(cls, caches: list[PackedRotatingKVCache]) -> "PackedBatchRotatingKVCache":
        """A batch of copies of single caches, which must be of one ``max_size``."""
        max_size = caches[0].max_size
        if any(c.max_size != max_size for c in caches):
            raise ValueError(
                f"{cls.__name__} can only merge caches of one max_size, got "
                f"{sorted({c.max_size for c in caches})}."
            )
        length = max(c.size() for c in caches)
        batch = cls(caches[0].format, max_size, [length - c.size() for c in caches])
        batch._fill(
            caches, [c._in_order()[..., -c.size() :, :] if c.size() else None for c in caches]
        )
        batch._offset = length
        return batch
