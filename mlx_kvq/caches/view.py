"""What a packed cache hands to a model: its keys and values, and its mask."""

import mlx.core as mx

from .. import ops
from ..format.format import Format


class PackedView(ops.Packed):
    """What a packed cache's ``update_and_fetch`` returns in place of keys or values.

    Models hand it to ``scaled_dot_product_attention`` unread; ``shape`` and ``dtype`` answer
    for those that size a mask by it.

    Args:
        rows, length, format, tail, ring, first: Of :class:`mlx_kvq.ops.Packed`; with a chunk, the
            tail is that before it.
        dtype (str): Of the model's keys and values, a name.
        dim (int): Head size.
        max_size (int): Tokens that a rotating cache keeps, where rows are a ring.
        chunk (tuple, optional): Of the view of keys: keys and values of a chunk of a prompt, which
            are the last rows; ``None`` while decoding, and for layers that read another layer's
            cache.
        places (tuple): Of a chunk, for each sequence, or once for all: the position of its first
            token in its block, and how many of the tokens before it, in the block, the tail has.
    """

    ndim = 4
    max_size = 0
    chunk: tuple[mx.array, mx.array] | None = None
    places: tuple[tuple[int, int], ...] = ((0, 0),)

    def __init__(
        self,
        rows: mx.array,
        length: int,
        fmt: Format,
        tail: mx.array | None,
        ring: tuple[int, int] | None,
        first: ops.First | None,
        dtype: str,
        dim: int,
    ):
        self.rows, self.length, self.format, self.tail, self.ring = rows, length, fmt, tail, ring
        self.first = first
        self._dtype, self._dim = dtype, dim

    @property
    def shape(self) -> tuple[int, int, int, int]:
        B, H = self.rows.shape[:2]
        return B, H, self.length, self._dim

    @property
    def dtype(self) -> mx.Dtype:
        return getattr(mx, self._dtype)

    def of(self, which: mx.array) -> "PackedView":
        """The view of some sequences of a batch."""
        tail = None if self.tail is None else self.tail[which]
        first = None if self.first is None else self.first.of(which)
        shared = self.ring, first, self._dtype, self._dim
        view = PackedView(self.rows[which], self.length, self.format, tail, *shared)
        view.max_size, view.recent = self.max_size, self.recent
        if self.chunk is not None:
            view.chunk = self.chunk[0][which], self.chunk[1][which]
        return view


class StepMask(mx.array):
    """A mask that knows what it lets a query see. Models make one a step and use it in every layer:
    attention that is given this one takes ``seen``. What a model makes of it is an array like any
    other.

    Args:
        mask (mx.array): Boolean, [L, length] or [B, 1, L, length].
        seen (ops.Mask): The same; without an array, ``mask`` is never computed.
    """

    def __init__(self, mask: mx.array, seen: ops.Mask):
        super().__init__(mask)
        self.seen = seen


def causal(mask: mx.array, starts: mx.array | None, window: int | None) -> StepMask:
    """A causal mask in which sequence b sees positions from ``starts[b]`` on and a query the last
    ``window`` of them."""
    return StepMask(mask, ops.Mask(mask.shape[-2] > 1, window, starts))


def in_ring_order(mask: mx.array) -> StepMask:
    return StepMask(mask, ops.Mask(array=mask))


def seen_through(mask: mx.array | str | None, length: int) -> ops.Mask:
    """What the mask that a model passes lets queries see of ``length`` positions."""
    if isinstance(mask, StepMask) and mask.shape[-1] == length:
        return mask.seen
    return ops.Mask.of(mask)
