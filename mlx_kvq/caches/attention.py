"""Attention over a packed cache: what mlx-lm's shared attention function is led to.

What a query reads exactly, and what it reads from packed rows, depends on its position alone:

- A token of a prompt reads its own block exactly, positions ``p - p % BLOCK`` to p, and what is
  before the block from rows. So a prompt gives the same rows however it is cut into chunks, and
  can be read again from any multiple of ``BLOCK``.
- A decoded token reads the newest ``recent`` tokens exactly, its own included.
- With ``recent=0`` everything is read from rows.
"""

import itertools
import weakref
from collections.abc import Iterator

import mlx.core as mx

from .. import ops
from ..format.format import Format

DECODE_QUERIES = 8  # up to this many queries attend straight from the rows
# Tokens of a block of a prompt. Measured (docs/performance.md): half of it costs prefill on GPUs
# more calls, twice of it costs a server more tokens to read again where prompts part.
BLOCK = 256


class PackedView:
    """What a packed cache's ``update_and_fetch`` returns in place of keys or values.

    Models hand it to ``scaled_dot_product_attention`` unread; ``shape`` and ``dtype`` answer
    for those that size a mask by it.
    """

    ndim = 4

    def __init__(
        self,
        rows: mx.array,
        length: int,
        fmt: Format,
        dtype: str,
        dim: int,
        ring: tuple[int, int, int] | None = None,
        tail: mx.array | None = None,
        chunk: mx.array | None = None,
        places: tuple[tuple[int, int], ...] = ((0, 0),),
    ):
        self.rows = rows
        self.length = length
        self.format = fmt
        self._dtype = dtype  # a name
        self._dim = dim
        # (keep, idx, max_size) of a rotating cache whose rows are not in the order of their
        # tokens, which is [:keep], [idx:], [keep:idx], or more than a query may see.
        self.ring = ring
        # The newest tokens as they are, rotated, [B, Hkv, R, Dk + Dv] (``ops.quantize_pack_tail``);
        # those before the chunk, if there is one.
        self.tail = tail
        # The keys or values of a chunk of a prompt, which are the last rows; ``None`` while
        # decoding, and for layers that read another layer's cache.
        self.chunk = chunk
        # Of a chunk, for each sequence, or once for all: the position of its first token in its
        # block, and how many of the tokens before it, in the block, the tail has.
        self.places = places

    @property
    def shape(self) -> tuple[int, int, int, int]:
        B, H = self.rows.shape[:2]
        return B, H, self.length, self._dim

    @property
    def dtype(self) -> mx.Dtype:
        return getattr(mx, self._dtype)


# id of a cache's mask -> what it was made of. Models make one mask and use it in every layer;
# some change it, and what they then pass is another array.
_padding: dict[int, tuple[weakref.ref, tuple[mx.array | None, int | None]]] = {}


def remember_padding(mask: mx.array, starts: mx.array | None, window: int | None) -> None:
    """Note that ``mask`` is causal, lets row b see positions from ``starts[b]`` on and a query
    the last ``window`` of them. Attention that is given this very mask then needs no mask, and
    it is never computed.
    """
    key = id(mask)
    gone = weakref.ref(mask, lambda _: _padding.pop(key, None))
    _padding[key] = (gone, (starts, window))


def _recall_padding(mask, length: int) -> tuple[mx.array | None, int | None] | None:
    if not isinstance(mask, mx.array) or mask.shape[-1] != length:
        return None
    reference, padding = _padding.get(id(mask), (lambda: None, None))
    return padding if reference() is mask else None


def packed_attention(
    queries: mx.array,
    keys: PackedView,
    values: PackedView,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention of queries [B, Hq, L, Dk] over packed keys and values -> [B, Hq, L, Dv].

    Decoded tokens attend straight from the rows, a chunk of a prompt block by block: on the
    block's own keys and values as they are, and on those before it restored from rows.
    """
    if queries.shape[2] == 0:
        return mx.zeros((*queries.shape[:3], values.shape[3]), queries.dtype)
    if keys.chunk is None and queries.shape[2] <= DECODE_QUERIES:
        return _decode(queries, keys, scale, mask, sinks)
    out = _prompt(queries, keys, values, scale, mask, sinks)
    if (every := ops.ahead()) and next(_prompts) % every == 0:
        mx.async_eval(out)
    return out


_prompts = itertools.count(1)  # layers that chunks of prompts went through


def _decode(q, keys: PackedView, scale, mask, sinks) -> mx.array:
    starts = window = ring = None
    if mask is not None and (padding := _recall_padding(mask, keys.length)):
        starts, window = padding
        mask = "causal" if q.shape[2] > 1 else None
    if keys.ring is not None:
        ring = keys.ring[:2]
        if (
            q.shape[2] == 1 or (window is not None and window <= keys.ring[2])
        ) and ops.is_reference(keys.format, q.dtype):
            return _in_token_order(q, keys, scale, mask, sinks, starts, window)
    return ops.attend(
        q, keys.rows, keys.length, keys.format, scale, mask, sinks, starts, window, keys.tail, ring
    )


def _in_token_order(q, keys: PackedView, scale, mask, sinks, starts, window) -> mx.array:
    """Each query over its own rows of a full ring, in the order of their tokens. So its sums are
    the same to the last bit whether the token comes alone, in the chunk of a draft or in a batch.
    In another order they differ by 1e-6, which turns a code of a later token where it is near a
    boundary, and then logits move by 0.1. (The kernels keep the ring's order and read the rows
    once for all queries.)
    """
    keep, idx, size = keys.ring  # type: ignore[misc]
    L, rows, tail = q.shape[2], keys.rows[..., : keys.length, :], keys.tail
    rows, mask = ops.in_token_order(rows, mask, keys.length, keep, idx)
    found = []
    for i in range(L):
        end = keys.length - L + 1 + i
        first = max(0, end - size)
        part = rows[..., first:end, :]
        seen = None if starts is None else starts - first
        last = None if tail is None else tail[:, :, : tail.shape[2] - (L - 1 - i)]
        ordered = max(0, keep - first), end - first
        found.append(
            ops.attend(
                q[:, :, i : i + 1], part, end - first, keys.format, scale,
                mask if L == 1 else None, sinks, seen, window, last, ordered,
            )
        )  # fmt: skip
    return found[0] if L == 1 else mx.concatenate(found, axis=2)


def _prompt(q, keys: PackedView, values: PackedView, scale, mask, sinks) -> mx.array:
    """A chunk of a prompt; sequences whose blocks begin at different rows are worked on apart."""
    padding = _recall_padding(mask, keys.length)
    # A mask that a model made itself may let a token see later ones: the chunk is then one block.
    causal = isinstance(mask, str) or padding is not None
    window = None if padding is None else padding[1]
    groups: dict[tuple[int, int], list[int]] = {}
    for i, place in enumerate(keys.places):
        groups.setdefault(place, []).append(i)
    if len(groups) == 1:
        out = _blocks(q, keys, values, keys.places[0], scale, mask, sinks, causal, window)
    else:
        parts = []
        for place, which in groups.items():
            at = mx.array(which)
            some = mask
            if isinstance(mask, mx.array) and mask.ndim == 4 and mask.shape[0] > 1:
                some = mask[at]
            k, v = _some(keys, at), _some(values, at)
            parts.append(_blocks(q[at], k, v, place, scale, some, sinks, causal, window))
        order = mx.argsort(mx.array([i for which in groups.values() for i in which]))
        out = mx.concatenate(parts)[order]
    return out


def _some(view: PackedView, at: mx.array) -> PackedView:
    """The view of some sequences of a batch."""
    tail = None if view.tail is None else view.tail[at]
    return PackedView(
        view.rows[at], view.length, view.format, view._dtype, view._dim, view.ring, tail,
        None if view.chunk is None else view.chunk[at],
    )  # fmt: skip


def _pieces(L: int, into: int) -> Iterator[tuple[int, int]]:
    """A chunk of L tokens, of which the first is ``into`` its block, block by block."""
    first, end = 0, min(L, BLOCK - into)
    while first < L:
        yield first, end
        first, end = end, min(L, end + BLOCK)


def _blocks(q, keys: PackedView, values: PackedView, place, scale, mask, sinks, causal, window):
    (into, known), fmt, given = place, keys.format, q.dtype
    dtype, L, past = _compute_dtype(given), q.shape[2], keys.length - q.shape[2]
    sinks = None if sinks is None else sinks.astype(dtype)
    exact = keys.chunk is not None
    # Between the first tokens that a ring keeps and the others some are missing.
    known = min(known, past - (0 if keys.ring is None else keys.ring[0]))
    found = []
    for a, end in _pieces(L, into) if exact and causal else [(0, L)]:
        new = None
        if keys.chunk is not None and values.chunk is not None:
            new = keys.chunk[:, :, a:end], values.chunk[:, :, a:end]
        low = 0 if window is None else max(0, past + a - window + 1)
        own = min(known, past - low) if a == 0 else 0
        before = past + a - low if exact else past + end - low
        if new is not None and before == 0:
            k, v = new
        else:
            rows = keys.rows[:, :, low:] if low else keys.rows
            last = keys.tail[:, :, -own:] if keys.tail is not None and own > 0 else None
            k, v = ops.restore(rows, before, fmt, dtype, last, new)
        out = mx.fast.scaled_dot_product_attention(
            q[:, :, a:end].astype(dtype),
            k.astype(dtype),
            v.astype(dtype),
            scale=scale,
            mask=_part(mask, L, a, end, low, past + end, dtype),
            sinks=sinks,
        )
        found.append(out.astype(given))
    return found[0] if len(found) == 1 else mx.concatenate(found, axis=2)


def _part(mask, L: int, a: int, end: int, low: int, high: int, dtype):
    """The mask of queries [a, end) of L over keys [low, high)."""
    if not isinstance(mask, mx.array):
        return mask
    mask = mask[..., low:high] if mask.shape[-1] > 1 else mask
    if mask.ndim > 1 and mask.shape[-2] == L and L > 1:
        mask = mask[..., a:end, :]
    return mask if mask.dtype == mx.bool_ else mask.astype(dtype)


def _compute_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """Half precision is emulated, hence slow, on CPU."""
    return mx.float32 if mx.default_device().type == mx.DeviceType.cpu else dtype
