"""What attention is given: packed keys and values, and what a query may see of them."""

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ..format.format import Format
from .check import check_first_parts, check_mask_parts


@dataclass(frozen=True, eq=False)
class First:
    """The first tokens of each sequence as they are; a query that sees one reads it from here,
    unless the tail has it, and not from its row.

    Args:
        array (mx.array): Rotated, [B, Hkv, F, Dk + Dv] in a float dtype (``ops.quantize_pack``).
        count (int): How many of them there are, 0 to F.
        at (int or mx.array): Place of the first one in the order of the rows' tokens, or int32 [B]
            places. Below 0 it has no row any more, nor have those up to place 0; beyond the rows
            are tokens to come. Rows before it are padding, which a mask hides.

    Raises:
        ValueError: If one of them is something else.
    """

    array: mx.array
    count: int
    at: "int | mx.array" = 0
    key: tuple = field(init=False)  # what launches depend on

    def __post_init__(self):
        array, at = self.array, self.at
        check_first_parts(array, self.count, at)
        place = at.shape if isinstance(at, mx.array) else None
        object.__setattr__(self, "key", (array.shape, array.dtype, place))

    @property
    def has_places(self) -> bool:
        """Whether each sequence has a place of its own."""
        return self.key[2] is not None

    @property
    def numbers(self) -> tuple[int, int]:
        """``count``, and ``at`` if it is one number."""
        return self.count, self.at if isinstance(self.at, int) else 0

    def after(self, low: int) -> "First":
        """Of rows without the first ``low`` ones."""
        if not low:
            return self
        at = self.at - low
        # Where none has a row, one number is as good as another: each is a launch of its own.
        return First(self.array, self.count, max(at, -self.count) if isinstance(at, int) else at)

    def of(self, which: mx.array) -> "First":
        """Of some sequences of a batch."""
        at = self.at if isinstance(self.at, int) else self.at[which]
        return First(self.array[which], self.count, at)


@dataclass(eq=False)
class Packed:
    """The packed keys and values of a layer. The whole buffer and a length, never a slice.

    Args:
        rows (mx.array): uint32 [B, Hkv, capacity, W] (``mlx_kvq.format.layout``).
        length (int): Rows that hold tokens, 1 to capacity.
        format (Format): The layer's format.
        tail (mx.array, optional): The newest tokens as they are, rotated, [B, Hkv, R, Dk + Dv] in a
            float dtype (``ops.quantize_pack``), the newest last.
        ring (tuple, optional): ``(keep, idx)`` where rows are not in the order of their tokens,
            which is [:keep], [idx:length], [keep:idx].
        first (First, optional): The first tokens as they are.
        recent (int, optional): Newest tokens that every query reads from the tail. By default as
            many as its own context calls for, ``format.recent_at``.
    """

    rows: mx.array
    length: int
    format: Format
    tail: mx.array | None = None
    ring: tuple[int, int] | None = None
    first: First | None = None
    recent: int | None = None

    @property
    def most_recent(self) -> int:
        """Of the last query."""
        return self.format.recent_at(self.length) if self.recent is None else self.recent


@dataclass(frozen=True, eq=False)
class Mask:
    """What a query may see; made once a step, where the mask is made.

    Args:
        causal (bool): The L queries are the last L tokens, and see none after their own.
        window (int, optional): The query at position p sees positions above p - window.
        starts (mx.array, optional): Integers [B], the first position each sequence sees.
        array (mx.array, optional): Broadcastable to [B, Hq, L, length], boolean (True is seen) or
            a float to add. Not with ``causal``.

    Raises:
        ValueError: If one of them is something else.
    """

    causal: bool = False
    window: int | None = None
    starts: mx.array | None = None
    array: mx.array | None = None
    key: tuple = field(init=False)  # what launches depend on

    def __post_init__(self):
        check_mask_parts(self.causal, self.window, self.starts, self.array)
        key: tuple[Any, ...] = (self.causal, self.window)
        for a in (self.starts, self.array):
            key += (None,) if a is None else (a.shape, a.dtype)
        object.__setattr__(self, "key", key)

    @staticmethod
    def of(mask: "mx.array | str | None") -> "Mask":
        """The mask that mlx-lm's models pass: ``None``, ``"causal"`` or an array."""
        if mask is None:
            return EVERY
        if isinstance(mask, mx.array):
            return Mask(array=mask)
        if mask != "causal":
            raise ValueError(f"A mask is None, 'causal' or an array, got {mask!r}.")
        return CAUSAL


EVERY, CAUSAL = Mask(), Mask(causal=True)
