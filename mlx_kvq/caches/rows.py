"""The packed rows of a cache: an array, and tokens that are still to be packed into it."""

import mlx.core as mx

from .. import ops
from ..format.format import Format

WAITING = 64  # tokens that are packed together, at most


class Rows:
    """The rows of all tokens, uint32 [B, Hkv, capacity, W].

    A decode step makes no row: attention reads the newest tokens from the tail. Up to ``WAITING``
    of them are packed and written together, from a tail that has them, when there are as many or
    when someone asks for :meth:`whole`. One kernel less for a layer and token.

    Args:
        fmt (Format): The cache's.
        array (mx.array, optional): The array, without the rows of waiting tokens.
    """

    def __init__(self, fmt: Format, array: mx.array | None = None):
        self.format = fmt
        self.array = array
        self.waiting: mx.array | None = None  # the tail whose last tokens wait
        self.count = 0  # as many, for the rows from number place on
        self.place = 0
        self.until = 0  # before this row the next one waits, too

    def whole(self) -> mx.array | None:
        """The array with every row in its place."""
        if (n := self.count) and self.array is not None and self.waiting is not None:
            rows = ops.pack_rotated(self.waiting[:, :, -n:], self.format)
            self.array[:, :, self.place : self.place + n, :] = rows
            self.count, self.waiting = 0, None
        return self.array

    def filled(self) -> mx.array:
        """The array, perhaps without the rows of waiting tokens. Raises RuntimeError if there is
        none."""
        if self.array is None:
            raise RuntimeError("the cache holds no token")
        return self.array

    def written(self) -> mx.array:
        """The array with every row in its place. Raises RuntimeError if there is none."""
        self.whole()
        return self.filled()

    def write(self, new: mx.array, at: int, L: int) -> None:
        """Write L new rows. ``new`` may be a tail instead: its newest token then waits."""
        if new.dtype == mx.uint32:
            self.written()[:, :, at : at + L, :] = new
            return
        if self.count and at != self.place + self.count:
            self.whole()  # the ring begins anew
        most = min(self.format.recent, WAITING)
        if not self.count:
            self.place, self.until = at, min(self.filled().shape[2], at + most - 1)
        self.waiting, self.count = new, self.count + 1
        if self.count == most:
            self.whole()

    def goes_on(self, at: int) -> bool:
        """Whether the token for row ``at`` waits with others, with room for it and after it."""
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
        """As :meth:`write`, after ``tokens`` rows, in an array that grows in steps; new rows may be
        a step."""
        if self.is_full(tokens, L):
            rows, end, more = self.whole(), self._end(tokens, step), _rounded(L, step)
            whole = new.dtype == mx.uint32 and new.shape[2] == more and end == tokens
            grown = new if whole else self._zeros(new, more)
            if rows is not None:
                grown = mx.concatenate([rows[..., :end, :], grown], axis=2)
            self.array = grown
            if whole:
                return
        self.write(new, tokens, L)

    def grow_to(self, tokens: int, most: int, like: mx.array, step: int) -> bool:
        """Make room for a token after ``tokens``, up to ``most`` rows; whether it had to grow."""
        rows = self.array
        if rows is not None and (tokens < rows.shape[2] or rows.shape[2] >= most):
            return False
        grown = self._zeros(like, min(step, most - tokens))
        if rows is not None:
            grown = mx.concatenate([self.written(), grown], axis=2)
        self.array = grown
        return True

    def _zeros(self, like: mx.array, tokens: int) -> mx.array:
        return mx.zeros((*like.shape[:2], tokens, self.format.layout.words), mx.uint32)


def _rounded(L: int, step: int) -> int:
    return (step + L - 1) // step * step
