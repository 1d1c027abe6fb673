"""Packed caches for a batch, method by method like mlx-lm's BatchKVCache and
BatchRotatingKVCache.

Rows are moved as they are, never unpacked: a batch is merged, extended, filtered and extracted
by copying uint32 words, and so is the exact tail, which ends with the last token of each sequence.
"""

from typing import cast

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import dynamic_roll

from .. import ops
from ..arguments import integer
from ..format.format import Format
from .packed import PackedCache, batch_of
from .single import PackedKVCache
from .view import causal


class PackedBatch(PackedCache):
    """What the growing and the rotating batch share.

    Sequence i has ``left_padding[i]`` rows before its first token; ``offset[i]`` is its number of
    tokens, which models take for the next position. Both are [B]. ``_idx`` is where the next row
    goes. Neither array is ever changed in place: masks remember them.
    """

    def __init__(self, fmt: Format, left_padding: list[int]):
        super().__init__(fmt, len(left_padding))
        self.left_padding = mx.array(left_padding)
        self.offset = -self.left_padding
        self._idx = 0
        # ``offset`` as numbers: where blocks of a prompt begin must be known without waiting for
        # the device.
        self._seen = [-n for n in left_padding]

    def _restored(self) -> None:
        self._seen = _ints(self.offset)

    def _add(self, L: int) -> None:
        """Count L tokens more in each sequence."""
        self._seen = [n + L for n in self._seen]
        self.offset = self.offset + L

    def _positions(self, L: int = 0) -> list[int]:
        if self._lengths is None:
            return [n + L for n in self._seen]
        return [min(n + L, end) for n, end in zip(self._seen, self._lengths, strict=True)]

    def _next_positions(self) -> tuple[list[int], list[int] | None]:
        return self._seen, self._lengths

    def _first(self) -> ops.First | None:
        return self.oldest.seen(self.format.first, self.left_padding)

    def _begins(self) -> mx.array:
        return self._length() - self.offset

    def _counts(self, L: int) -> list[int]:
        """Without padding, on either side. (Where a sequence has ended, only padding attends.)"""
        ends = self._lengths or [n + L for n in self._seen]
        return [
            max(0, min(n + L, end) - max(n, 0)) for n, end in zip(self._seen, ends, strict=True)
        ]

    def _in_place(self, L: int) -> bool:
        # A padded prompt may end in a chunk of one token, where mlx-lm's own cache raises.
        return super()._in_place(L) and self._lengths is None

    def keys_and_values(self) -> tuple:
        self.stored.whole()
        # While chunks are padded, the tail ends with each sequence's last token, and rows do not.
        whole = self._lengths is None and not self._prompted
        return self._fetch(self.tail if whole else None)

    def _prepare_left(self, left_padding) -> None:
        if left_padding is not None:
            if not self.empty():
                raise ValueError(
                    f"Left padding can only be added to an empty {type(self).__name__}."
                )
            self._pad_left(left_padding)

    def _pad_left(self, padding: list[int]) -> mx.array:
        self._seen = [n - p for n, p in zip(self._seen, padding, strict=True)]
        added = mx.array(padding)
        self.left_padding = self.left_padding + added
        self.offset = self.offset - added
        return added

    def _roll_right(self, padding: list[int]) -> None:
        """Turn ``padding`` rows at the right end of each sequence into left padding."""
        added = self._pad_left(padding)
        if not self.empty():
            self.rows = dynamic_roll(self.stored.written(), added[:, None], axis=2)

    def _forget(self, n: int) -> None:
        self._seen = [seen - n for seen in self._seen]
        self.offset = self.offset - n

    def filter(self, batch_indices: list[int]) -> None:
        """Keep just these sequences, in this order."""
        if not self.empty():
            self.rows = self.stored.written()[batch_indices]
        self.newest.select(batch_indices)
        self.oldest.select(batch_indices)
        self.offset = self.offset[batch_indices]
        self.left_padding = self.left_padding[batch_indices]
        self._seen = [self._seen[i] for i in batch_indices]
        if self._lengths is not None:
            self._lengths = [self._lengths[i] for i in batch_indices]
        self._start()

    def _same_format(self, others) -> None:
        """Raise ValueError unless all have rows alike; keep as many first tokens as the one with
        most."""
        for other in others:
            if other.format.of_rows != self.format.of_rows:
                raise ValueError(
                    f"Caches of different formats cannot share a batch: "
                    f"{self.format.signature!r} and {other.format.signature!r}."
                )
            if other.format.first > self.format.first:
                self.adopt(other.format)

    def _append(self, other) -> None:
        """Sequences of ``other`` after ours, both right-justified at the same index."""
        self._same_format([other])
        self._seen = self._seen + other._seen
        self.newest.prompt = self.prompt + other.prompt
        self.newest.exact = self.exact + other.exact
        present = [c.stored.written() for c in (self, other) if not c.empty()]
        if not present:
            self.left_padding = mx.concatenate([self.left_padding, other.left_padding])
            self.offset = mx.concatenate([self.offset, other.offset])
            return
        idx = max(self._idx, other._idx)
        capacity = max(rows.shape[2] for rows in present)
        _, heads, _, words = present[0].shape

        def padded(c):
            rows = c.rows
            if rows is None:
                rows = mx.zeros((c.offset.shape[0], heads, 0, words), mx.uint32)
            left = idx - c._idx
            right = capacity - rows.shape[2] - left
            if right < 0:
                rows = rows[..., :right, :]
                right = 0
            if left or right:
                rows = mx.pad(rows, [(0, 0), (0, 0), (left, right), (0, 0)])
            return rows, c.offset, c.left_padding + left

        self._dtype = other._dtype if self.empty() else self._dtype
        if size := max(self.newest.size, other.newest.size):  # or neither holds a token
            tails = [c._last(c.offset.shape[0], size, heads, self.dtype) for c in (self, other)]
            self.newest.array = mx.concatenate(tails)
        self._join_first([(c, c.offset.shape[0]) for c in (self, other)], heads)
        both = zip(padded(self), padded(other), strict=True)
        self.rows, self.offset, self.left_padding = (mx.concatenate(list(two)) for two in both)
        self._idx = idx
        self._start()

    def _join_first(self, caches: list[tuple[PackedCache, int]], heads: int) -> None:
        """Take over the first tokens of caches with so many sequences each."""
        size = self.format.first
        if size and any(not c.empty() and c._length() for c, _ in caches):
            parts = [c._first_for_batch(B, heads, size, self.dtype) for c, B in caches]
            self.oldest.array, self.oldest.filling = mx.concatenate(parts), True

    def _fill(self, caches: list, ordered: list[mx.array | None]) -> None:
        """Take over the rows of single caches, in the order of their tokens."""
        self._same_format(caches)
        self._made_like(caches[0])
        filled = [r for r in ordered if r is not None]
        if not filled:
            return
        length = max(r.shape[2] for r in filled)
        rows = mx.zeros((len(caches), filled[0].shape[1], length, filled[0].shape[3]), mx.uint32)
        for i, r in enumerate(ordered):
            if r is not None:
                rows[i : i + 1, :, length - r.shape[2] :] = r
        self.rows = rows
        self._dtype = next(c._dtype for c, r in zip(caches, ordered, strict=True) if r is not None)
        if self.format.recent:
            size = max(c.newest.size for c in caches)
            heads, dtype = filled[0].shape[1], self.dtype
            self.newest.array = mx.concatenate([c._last(1, size, heads, dtype) for c in caches])
        self._join_first([(c, 1) for c in caches], filled[0].shape[1])
        self._idx = length
        self._seen = [c.offset for c in caches]
        counts = zip(*(c._for_batch() for c in caches), strict=True)
        self.newest.prompt, self.newest.exact = map(list, counts)
        self.offset = mx.array(self._seen)
        self._start()


def _ints(a: mx.array) -> list[int]:
    return cast(list[int], a.tolist())


@batch_of(PackedKVCache)
class PackedBatchKVCache(PackedBatch):
    """The packed ``mlx_lm.models.cache.BatchKVCache``.

    Args:
        fmt (Format): From :func:`mlx_kvq.format.format.make_format`.
        left_padding (list): For each sequence, the padding before its first token.
    """

    numbers = ("offset", "left_padding", "_idx")

    _right_padding: list[int] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple:
        """Append keys [B, Hkv, L, Dk] and values [B, Hkv, L, Dv]; returns views of all."""
        prev, L = self._idx, keys.shape[2]
        if L == 0:
            return self._nothing(keys)
        if self._next(keys, values, prev):
            more = {"tail": self.tail}
        else:
            rows, more = self._pack(keys, values, prev)
            self.stored.append(rows, prev, L, self.step)
        self._idx += L
        self._add(L)
        return self._updated(L, more, self.offset)

    def _length(self) -> int:
        return self._idx

    def _in_order(self) -> mx.array:
        return self.stored.written()[:, :, : self._idx]

    def size(self) -> int:
        return self._idx

    def prepare(self, *, left_padding=None, lengths=None, right_padding=None) -> None:
        """Announce the padding of the chunks to come, one number for each sequence."""
        self._prepare_left(left_padding)
        if right_padding is not None and max(right_padding) > 0:
            self._right_padding = list(right_padding)
            if lengths is not None:
                self._lengths = [seen + n for seen, n in zip(self._seen, lengths, strict=True)]

    def finalize(self) -> None:
        """After right-padded chunks: move the padding to the left."""
        if self._right_padding is not None:
            self._roll_right(self._right_padding)
            if self.tail is not None and self._lengths is None:
                rows = self.stored.written()[:, :, : self._idx]
                recent = self.format.recent_at(self._idx)
                self.newest.array = self.newest.of_rows(rows, recent, self._first())
                self.newest.exact = [0] * len(self.exact)
            self._right_padding = self._lengths = None
            self._start()

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        integer("n", n, 0)
        n = min(self._idx, n)
        self._idx -= n
        self._forget(n)
        self._drop(n, self._idx)
        return n

    def make_mask(self, N: int, return_array: bool = False, **kwargs) -> mx.array:
        mask = create_causal_mask(N, offset=self._idx, left_padding=self.left_padding, **kwargs)
        if kwargs.keys() - {"window_size"}:
            return mask
        return causal(mask, self.left_padding, kwargs.get("window_size"))

    def filter(self, batch_indices: list[int]) -> None:
        """Keep just these sequences, in this order; drops padding that all of them have."""
        super().filter(batch_indices)
        if self._right_padding is not None:
            self._right_padding = [self._right_padding[i] for i in batch_indices]
        if self.empty():
            return  # the padding that was announced is still to come
        least = min(_ints(self.left_padding))
        if least > 0:
            self.rows = self.stored.written()[..., least:, :]
            self._idx -= least
            self.left_padding = self.left_padding - least
        if self._idx == 0:  # none of these has a token
            self.newest.array = self.oldest.array = None

    def extend(self, other: "PackedBatchKVCache") -> None:
        """Append the sequences of ``other``."""
        self._append(other)

    def extract(self, idx: int) -> PackedKVCache:
        """A copy of one sequence, as a single cache."""
        cache = PackedKVCache(self.format)._made_like(self)
        padding = _ints(self.left_padding)[idx]
        if not self.empty() and padding < self._idx:
            rows = self.stored.written()[idx : idx + 1, :, padding : self._idx]
            cache.rows, cache.offset = mx.contiguous(rows), rows.shape[2]
            cache.newest.take(self.newest, idx)
            cache.oldest.take(self.oldest, idx)
            cache._start()
        return cache

    @classmethod
    def merge(cls, caches: list[PackedKVCache]) -> "PackedBatchKVCache":
        """A batch of copies of single caches."""
        length = max(c.size() for c in caches)
        batch = cls(caches[0].format, [length - c.size() for c in caches])
        batch._fill(caches, [c._in_order() if c.size() else None for c in caches])
        return batch
