"""The exact tail of a cache: its newest tokens as they are, rotated and unrounded."""

from collections.abc import Callable

import mlx.core as mx

from .. import ops
from ..format.format import Format
from .rows import Rows


class Tail:
    """The newest tokens, and what is known of how each sequence was read.

    Args:
        fmt (Format): The cache's.
        sequences (int): Of the batch.

    Attributes:
        array (mx.array, optional): [B, Hkv, R, Dk + Dv] (``ops.quantize_pack``).
        prompt (list): For each sequence, its first tokens that were read as a prompt.
        exact (list): For each sequence, its newest tokens that ``array`` has as they are.
        recent (int): Tokens that decoding reads here, in a context below ``until`` tokens.
        until (int): Contexts from here on read more (``Format.recent_at``).
        filling (bool): Whether a sequence has fewer of ``exact`` than decoding reads.
    """

    def __init__(self, fmt: Format, sequences: int = 1):
        self.format = fmt
        self.array: mx.array | None = None
        self.prompt = [0] * sequences
        self.exact = [0] * sequences
        self.filling = True
        self.recent = fmt.recent
        self.until = 0

    @property
    def size(self) -> int:
        return 0 if self.array is None else self.array.shape[2]

    def got(self, size: int, new: list[int]) -> None:
        """Note that the array, now of ``size`` tokens, has got ``new`` ones of each sequence."""
        self.exact = [min(size, n + m) for n, m in zip(self.exact, new, strict=True)]
        self.filling = min(self.exact, default=0) < self.recent

    def reach(
        self,
        tokens: int,
        limit: int,
        rows: Callable[[], mx.array],
        first: Callable[[], ops.First | None],
    ) -> None:
        """Hold what decoding reads in a context of ``tokens``.

        Args:
            tokens (int): Of the longest sequence.
            limit (int): Tokens that a rotating cache keeps, 0 of a growing one. The first reads as
                many at any length.
            rows (callable): Gives all rows, in the order of their tokens: where the tail gets
                longer, the tokens that it lacks come from there,
            first (callable): or from the exact first tokens, which it gives.
        """
        fmt = self.format
        self.recent = fmt.recent_at(limit or tokens)
        self.until = next((n for n in fmt.grows if tokens < n and not limit), 1 << 62)
        if self.array is not None and (lacking := self.recent - self.size) > 0:
            older = self.of_rows(rows()[:, :, : -self.size], lacking, first())
            self.array = mx.concatenate([older, self.array], axis=2)
            self.filling = True

    def without_padding(self, L: int, size: int, new: list[int]) -> None:
        """Keep the last ``size`` tokens of each sequence, where the last L hold ``new`` each."""
        tail = self.array
        if tail is None:
            return
        first = tail.shape[2] - L - size
        if first < 0:
            tail, first = mx.pad(tail, [(0, 0), (0, 0), (-first, 0), (0, 0)]), 0
        parts = [tail[i, :, first + n : first + n + size] for i, n in enumerate(new)]
        self.array = mx.stack(parts)

    def drop(
        self, n: int, left: list[int], stored: Rows, length: int, first: ops.First | None
    ) -> None:
        """Take the newest n tokens off.

        Args:
            n (int): More than 0.
            left (list): Tokens that each sequence is left with.
            stored (Rows), length (int): The first ``length`` rows are those of all tokens left, in
                their order: what the tail then lacks comes from there,
            first (ops.First, optional): or from the exact first tokens.
        """
        self.prompt = [min(m, at) for m, at in zip(self.prompt, left, strict=True)]
        self.exact = [max(0, m - n) for m in self.exact]
        self.filling = True
        self.recent, self.until = self.format.recent, 0  # until the next token is there
        if self.array is None:
            return
        size = max(self.size - n, 0)
        tail = self.array[:, :, :size]
        if length == 0:
            self.array = None
        elif (lacking := self.recent - size) <= 0:
            self.array = tail
        else:
            rows = stored.written()[:, :, : max(0, length - size)]
            older = self.of_rows(rows, lacking, first)
            self.array = mx.concatenate([older, tail], axis=2)

    def of_rows(self, rows: mx.array, n: int, first: ops.First | None = None) -> mx.array:
        """The last n of these rows, as a tail, first tokens exactly; zeros come before them where
        there are fewer."""
        B, heads, T, _ = rows.shape
        lay, have = self.format.layout, min(n, T)
        dtype = mx.float32 if self.array is None else self.array.dtype
        tail = mx.zeros((B, heads, n - have, lay.k_dim + lay.v_dim), dtype)
        if have:
            begin = None if first is None else first.after(T - have)
            some = ops.Packed(rows[:, :, T - have :], have, self.format, None, None, begin)
            pair = ops.dequantize(some)
            y = mx.concatenate(list(pair), axis=-1)
            tail = mx.concatenate([tail, y.astype(dtype)], axis=2)
        return tail

    def last(self, B: int, size: int, heads: int, dtype: mx.Dtype) -> mx.array:
        """The last ``size`` tokens, for a batch of a model in ``dtype``; zeros where there are
        fewer, which nothing reads."""
        lay, dtype = self.format.layout, ops.tail_dtype(dtype)
        have = min(size, self.size)
        zeros = mx.zeros((B, heads, size - have, lay.k_dim + lay.v_dim), dtype)
        if self.array is None:
            return zeros
        return mx.concatenate([zeros, self.array[:, :, -have:].astype(dtype)], axis=2)

    def take(self, batch: "Tail", i: int) -> None:
        """Become that of sequence ``i`` of a batch."""
        self.prompt, self.exact = [batch.prompt[i]], [batch.exact[i]]
        if batch.array is not None:
            self.array = mx.contiguous(batch.array[i : i + 1])

    def select(self, which: list[int]) -> None:
        """Keep these sequences, in this order."""
        if self.array is not None:
            self.array = self.array[which]
        self.prompt = [self.prompt[i] for i in which]
        self.exact = [self.exact[i] for i in which]

    def check(self, rows: mx.array | None, dtype: mx.Dtype, positions: list[int]) -> None:
        """Raise ValueError unless a file's numbers fit ``rows``, ``None`` without a token, of a
        model in ``dtype``, and sequences of so many tokens."""
        fmt, tail = self.format, self.array
        if not fmt.recent or rows is None:
            fits = tail is None
        else:
            wanted = (*rows.shape[:2], fmt.layout.k_dim + fmt.layout.v_dim)
            fits = (
                tail is not None
                and tail.ndim == 4
                and (*tail.shape[:2], tail.shape[3]) == wanted
                and tail.shape[2] >= fmt.recent
                and tail.dtype in (dtype, ops.tail_dtype(dtype), mx.float32)
            )
        if not fits:
            found = "none" if tail is None else f"{tail.dtype} {tail.shape}"
            raise ValueError(f"The cache's tail, {found}, is not what {fmt.signature!r} describes.")
        if tail is not None:  # once it was in the keys' dtype, once in fp32 for fp16 ones
            self.array = tail.astype(ops.tail_dtype(dtype))
        for name, most in (("prompt", positions), ("exact", [self.size] * len(positions))):
            counts = getattr(self, name) or [0] * len(positions)
            setattr(self, name, counts)
            if len(counts) != len(most) or any(
                type(n) is not int or not 0 <= n <= m for n, m in zip(counts, most, strict=True)
            ):
                raise ValueError(
                    f"The cache counts {counts} {name} tokens, which it does not hold."
                )
