"""Attention over a packed cache: what mlx-lm's shared attention function is led to."""

import itertools
import weakref

import mlx.core as mx

from . import fused, ops, reference
from .format import Format

DECODE_QUERIES = 8  # up to this many queries attend straight from the rows
RESTORED = 4  # vectors that come out of the rotation in the time that one of a query takes


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
        chunk: mx.array | None = None,
        new: mx.array | bool = False,
        ring: tuple[int, int, int] | None = None,
        tail: mx.array | None = None,
    ):
        self.rows = rows
        self.length = length
        self.format = fmt
        self._dtype = dtype  # a name
        self._dim = dim
        # The keys or values of a chunk of a prompt, which reads itself as it is; its tokens are
        # the last ones. ``new``: it is the first chunk, and there is nothing else to read; in a
        # batch that may be so for some sequences, boolean [B].
        self.chunk = chunk
        self.new = new
        # (keep, idx, max_size) of a rotating cache whose rows are not in the order of their
        # tokens, which is [:keep], [idx:], [keep:idx], or more than a query may see.
        self.ring = ring
        # The newest tokens as they are, rotated, [B, Hkv, R, Dk + Dv] (``ops.quantize_pack_tail``);
        # those before the chunk, if there is one.
        self.tail = tail

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

    Up to ``DECODE_QUERIES`` queries attend straight from the rows. A chunk of a prompt attends on
    its own keys and values as they are, and unpacks what was before it, one layer at a time
    (:func:`_prefill`).
    """
    if keys.new is False and queries.shape[2] <= DECODE_QUERIES:
        return _decode(queries, keys, scale, mask, sinks)
    out = _chunk(queries, keys, values, scale, mask, sinks)
    if (
        queries.shape[2] > DECODE_QUERIES
        and (every := fused.ahead())
        and next(_prompts) % every == 0
    ):
        mx.async_eval(out)
    return out


_prompts = itertools.count(1)  # layers that chunks of prompts went through


def _chunk(queries, keys: PackedView, values: PackedView, scale, mask, sinks) -> mx.array:
    if keys.new is False:
        return _prefill(queries, keys, values, scale, mask, sinks)
    own = _own_part(mask, queries.shape[2])
    exact = _exact(queries, keys.chunk, values.chunk, scale, own, sinks)
    if keys.new is True:
        return exact
    if queries.shape[2] > DECODE_QUERIES:
        packed = _prefill(queries, keys, values, scale, mask, sinks)
    else:
        packed = _decode(queries, keys, scale, mask, sinks)
    return mx.where(keys.new[:, None, None, None], exact, packed)


def _own_part(mask, L: int):
    """The mask among the L tokens of a chunk: they are the last, but for one token in a ring."""
    if not isinstance(mask, mx.array) or mask.shape[-1] == L:
        return mask
    return None if L == 1 else mask[..., -L:]


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
    rows, mask = reference.in_token_order(rows, mask, keys.length, keep, idx)
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


def _exact(q, k, v, scale, mask, sinks) -> mx.array:
    dtype = _compute_dtype(q.dtype)
    out = mx.fast.scaled_dot_product_attention(
        q.astype(dtype),
        k.astype(dtype),
        v.astype(dtype),
        scale=scale,
        mask=_mask_as(mask, dtype),
        sinks=None if sinks is None else sinks.astype(dtype),
    )
    return out.astype(q.dtype)


def _prefill(q, keys: PackedView, values: PackedView, scale, mask, sinks) -> mx.array:
    """Either keys and values come out of the rotation, or queries and outputs go through it: what
    are fewer vectors, but with sinks the centre that was taken off the keys counts."""
    fmt, dtype = keys.format, _compute_dtype(q.dtype)
    B, Hq, L, _ = q.shape
    Hkv = keys.rows.shape[1]
    chunk, past = None, keys.length
    if keys.chunk is not None and values.chunk is not None and fmt.recent:
        chunk, past = (keys.chunk, values.chunk), past - L
    tail = within(keys.tail, past if keys.ring is None else past - keys.ring[0])
    restores = keys.length * Hkv <= RESTORED * L * Hq or sinks is not None
    if chunk is not None and past <= 0:  # a window of one token
        k, v = (x.astype(dtype) for x in chunk)
    elif restores:
        k, v = ops.restore(keys.rows, past, fmt, dtype, tail, chunk)
    else:
        if chunk is not None:  # in the rotated domain
            n = 0 if tail is None else tail.shape[2]
            tail = ops.quantize_pack_tail(*chunk, fmt, tail, n + L)[1]
        k, v = ops.dequantize(keys.rows, keys.length, fmt, dtype, tail)
    q, given = q.astype(dtype), q.dtype
    out = mx.fast.scaled_dot_product_attention(
        q if restores else ops.rotate_queries(q, fmt, Hkv),
        k,
        v,
        scale=scale,
        mask=_mask_as(mask, dtype),
        sinks=None if sinks is None else sinks.astype(dtype),
    )
    return (out if restores else ops.rotate_outputs(out, fmt, Hkv)).astype(given)


def within(tail: mx.array | None, tokens: int) -> mx.array | None:
    """The tail of no more than the last ``tokens``: before them a ring has others."""
    return tail[:, :, -tokens:] if tail is not None and tokens > 0 else None


def _compute_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """Half precision is emulated, hence slow, on CPU."""
    return mx.float32 if mx.default_device().type == mx.DeviceType.cpu else dtype


def _mask_as(mask, dtype):
    if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
        return mask.astype(dtype)
    return mask
