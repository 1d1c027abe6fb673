"""The exact first tokens of a cache: attention rests on them, and their keys are outliers."""

import mlx.core as mx

from .. import ops
from ..format.format import Format


class FirstTokens:
    """The first ``format.first`` tokens of each sequence as they are, rotated and unrounded.

    Args:
        fmt (Format): The cache's.

    Attributes:
        array (mx.array, optional): [B, Hkv, F, Dk + Dv] in the tail's dtype; what is in it for
            tokens that are still to come, nobody reads.
        filling (bool): Whether a sequence may have fewer tokens.
        changed (bool): Whether the array is not yet evaluated with anything that a step reads.
    """

    def __init__(self, fmt: Format):
        self.format = fmt
        self.array: mx.array | None = None
        self.filling = fmt.first > 0
        self.changed = False
        self._seen: ops.First | None = None

    def __getstate__(self) -> dict:
        return vars(self) | {"_seen": None}  # an mx.Dtype is in it, which cannot be copied

    def begins(self, L: int, at: list[int], ends: list[int] | None) -> bool:
        """Whether each sequence begins with L new tokens that have all of them (``ops.pack_start``
        then makes them); the numbers are those of :meth:`read`."""
        return self.filling and ends is None and self.format.first <= L and not any(at)

    def got(self, array: mx.array) -> None:
        """Become these, of all sequences."""
        self.array, self.filling, self.changed = array, False, True

    def read(self, keys: mx.array, values: mx.array, at: list[int], ends: list[int] | None) -> None:
        """Take those of new keys [B, Hkv, L, Dk] and values [B, Hkv, L, Dv] that are among them.

        Args:
            at (list): Position of the first of the L tokens in each sequence, below 0 in padding.
            ends (list, optional): Position at which padding on the right begins.
        """
        L, F = keys.shape[2], self.format.first
        ends = [n + L for n in at] if ends is None else ends
        self.filling = any(min(n + L, end) < F for n, end in zip(at, ends, strict=True))
        wanted = [
            [p - n if 0 <= p - n < L and p < end else -1 for p in range(F)]
            for n, end in zip(at, ends, strict=True)
        ]  # columns of the tokens; -1: not among these
        if (array := self.array) is None:
            lay, (B, H) = self.format.layout, keys.shape[:2]
            array = mx.zeros((B, H, F, lay.k_dim + lay.v_dim), ops.tail_dtype(keys.dtype))
        self.array = array
        if max(map(max, wanted)) < 0:
            return
        self.changed = True
        if len({tuple(columns) for columns in wanted}) == 1:
            there = [p for p in range(F) if wanted[0][p] >= 0]
            first, end = wanted[0][there[0]], wanted[0][there[-1]] + 1
            new = self._rotated(keys[:, :, first:end], values[:, :, first:end], array)
            old = array.astype(new.dtype)
            parts = [old[:, :, : there[0]], new, old[:, :, there[-1] + 1 :]]
            self.array = mx.concatenate([part for part in parts if part.shape[2]], axis=2)
            return
        columns = mx.array(wanted)[:, None, :, None]
        index = mx.maximum(columns, 0)
        keys, values = (mx.take_along_axis(x, index, axis=2) for x in (keys, values))
        new = self._rotated(keys, values, array)
        self.array = mx.where(columns >= 0, new, array.astype(new.dtype))

    def _rotated(self, keys: mx.array, values: mx.array, before: mx.array) -> mx.array:
        """As they are kept; ``before`` is any array of such."""
        return ops.keep_exact(keys, values, self.format, before, keys.shape[2])

    def seen(self, count: int, at: "int | mx.array") -> ops.First | None:
        """What attention is given of them."""
        last = self._seen
        if last is not None and last.array is self.array and last.at is at and last.count == count:
            return last
        self._seen = None if self.array is None else ops.First(self.array, count, at)
        return self._seen

    def of(self, size: int, rows: mx.array, places: mx.array, dtype: mx.Dtype) -> mx.array:
        """The first ``size`` tokens of each sequence; those that are not here come from rows.

        Args:
            rows (mx.array): Of tokens in their order, uint32 [B, Hkv, T, W].
            places (mx.array): int32 [B], where each sequence begins in them.
            dtype (mx.Dtype): Of the model.
        """
        dtype, own = ops.tail_dtype(dtype), self.array
        have = 0 if own is None else min(size, own.shape[2])
        parts = [] if own is None or not have else [own[:, :, :have].astype(dtype)]
        if have < size:
            columns = mx.clip(places[:, None] + mx.arange(have, size), 0, rows.shape[2] - 1)
            some = mx.take_along_axis(rows, columns[:, None, :, None], axis=2)
            pair = ops.dequantize(ops.Packed(mx.contiguous(some), size - have, self.format))
            parts.append(mx.concatenate(list(pair), axis=-1).astype(dtype))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)

    def take(self, batch: "FirstTokens", i: int) -> None:
        """Become those of sequence ``i`` of a batch."""
        self.filling = batch.format.first > 0
        if batch.array is not None:
            self.array = mx.contiguous(batch.array[i : i + 1])

    def select(self, which: list[int]) -> None:
        """Keep these sequences, in this order."""
        if self.array is not None:
            self.array = self.array[which]
        self.filling = self.format.first > 0

    def check(self, rows: mx.array | None, dtype: mx.Dtype) -> None:
        """Raise ValueError unless a file's array fits ``rows``, ``None`` without a token, of a
        model in ``dtype``."""
        fmt, array = self.format, self.array
        if not fmt.first or rows is None:
            fits = array is None
        else:
            wanted = (*rows.shape[:2], fmt.first, fmt.layout.k_dim + fmt.layout.v_dim)
            like = ops.tail_dtype(dtype)
            fits = array is not None and array.shape == wanted and array.dtype in (like, mx.float32)
        if not fits:
            found = "none" if array is None else f"{array.dtype} {array.shape}"
            raise ValueError(
                f"The cache's first tokens, {found}, are not what {fmt.signature!r} describes."
            )
        if array is not None:  # once they were in fp32 beside fp16
            self.array = array.astype(ops.tail_dtype(dtype))
