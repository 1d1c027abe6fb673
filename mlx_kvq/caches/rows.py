"""The packed rows of a cache: an array, and rows that are still to be written into it."""

import mlx.core as mx

PENDING = 16  # rows that wait to be written


class Rows:
    """The rows of all tokens, uint32 [B, Hkv, capacity, W].

    A decode step writes no row: the newest rows wait in an array of ``PENDING`` that quantize_pack
    moves on, and go to their places together, when it is full or when someone asks for
    :meth:`whole`. Until then attention reads their tokens from the tail. One kernel less for a
    layer and token.

    Args:
        array (mx.array, optional): The array, without the pending rows.
    """

    def __init__(self, array: mx.array | None = None):
        self.array = array
        self.pending: mx.array | None = None
        self.count = 0  # the last so many of pending, for the rows from number place on
        self.place = 0
        self.until = 0  # before this row the next one waits, too

    def whole(self) -> mx.array | None:
        """The array with every row in its place."""
        if (n := self.count) and self.array is not None and self.pending is not None:
            self.count = 0
            self.array[:, :, self.place : self.place + n, :] = self.pending[:, :, -n:]
        return self.array

    def filled(self) -> mx.array:
        """The array, perhaps without the pending rows. Raises RuntimeError if there is none."""
        if self.array is None:
            raise RuntimeError("the cache holds no token")
        return self.array

    def written(self) -> mx.array:
        """The array with every row in its place. Raises RuntimeError if there is none."""
        self.whole()
        return self.filled()

    def write(self, new: mx.array, at: int, L: int) -> None:
        """Write L new rows, or leave one pending: ``new`` is then the newest rows, itself last."""
        if new.shape[2] == L:
            self.written()[:, :, at : at + L, :] = new
            return
        if self.count and at != self.place + self.count:
            self.whole()  # the ring begins anew
        if not self.count:
            self.place, self.until = at, min(self.filled().shape[2], at + new.shape[2] - 1)
        self.pending, self.count = new, self.count + 1
        if self.count == new.shape[2]:
            self.whole()

    def goes_on(self, at: int) -> bool:
        """Whether the row for ``at`` is one more pending one, with room for it and after it."""
        return 0 < self.count == at - self.place and at < self.until

    def is_full(self, tokens: int, L: int) -> bool:
        """Whether L rows after ``tokens`` do not fit."""
        return self.array is None or tokens + L > self.array.shape[2]

    def growth(self, tokens: int, L: int, step: int) -> int | None:
        """Rows by which the array grows for L more, if new ones can be made with them."""
        grows = self.is_full(tokens, L) and self._end(tokens, step) == tokens
        return _rounded(L, step) if grows else None

    def _end(self, tokens: int, step: int) -> int:
        """Where an array grows that holds so many tokens, as in mlx-lm."""
        return tokens if self.array is None or tokens % step else self.array.shape[2]

    def append(self, new: mx.array, tokens: int, L: int, step: int) -> None:
        """Write L rows after ``tokens``, in an array that grows in steps; ``new`` may be a step."""
        if self.is_full(tokens, L):
            rows, end, more = self.whole(), self._end(tokens, step), _rounded(L, step)
            whole = new.shape[2] == more and end == tokens
            grown = new if whole else zeros(new, more)
            if rows is not None:
                grown = mx.concatenate([rows[..., :end, :], grown], axis=2)
            self.array, self.pending = grown, None
            if whole:
                return
        self.write(new, tokens, L)

    def grow_to(self, tokens: int, most: int, like: mx.array, step: int) -> bool:
        """Make room for a token after ``tokens``, up to ``most`` rows; whether it had to grow."""
        rows = self.array
        if rows is not None and (tokens < rows.shape[2] or rows.shape[2] >= most):
            return False
        grown = zeros(like, min(step, most - tokens))
        if rows is not None:
            grown = mx.concatenate([self.written(), grown], axis=2)
        self.array, self.pending = grown, None
        return True

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.array, self.pending) if a is not None)


def _rounded(L: int, step: int) -> int:
    return (step + L - 1) // step * step


def zeros(like: mx.array, tokens: int) -> mx.array:
    return mx.zeros((*like.shape[:2], tokens, like.shape[3]), mx.uint32)
