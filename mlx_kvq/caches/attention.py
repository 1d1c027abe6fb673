"""Attention over a packed cache: what mlx-lm's shared attention function is led to.

What a query reads exactly, and what it reads from packed rows, depends on its position alone:

- A token of a prompt reads its own block exactly, positions ``p - p % BLOCK`` to p, and what is
  before the block from rows. So a prompt gives the same rows however it is cut into chunks, and
  can be read again from any multiple of ``BLOCK``.
- A decoded token reads the newest ``recent`` tokens exactly, its own included.
- The ``first`` first tokens are always read exactly.
- With ``recent=0`` everything else is read from rows.
"""

import itertools

import mlx.core as mx

from .. import ops
from .view import PackedView, StepMask, seen_through

DECODE_QUERIES = 8  # up to this many queries attend straight from the rows
# Tokens of a block of a prompt. Measured (scripts/studies/speed.md): with 256 a prompt's own tokens
# lose 1.1 to 2.4 times as much (KL) and prefill on CUDA is a fifth slower; with more a server reads
# more tokens again where prompts part, on average half a block.
BLOCK = 512
# Tokens of a prompt up to which a GPU's memory has room for what all layers restore at once: one of
# mlx-lm's chunks. For longer ones evaluation begins ahead (``Tuning.ahead``).
SHORT = 2048


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
    L = queries.shape[2]
    if keys.chunk is None and 0 < L <= DECODE_QUERIES:
        if mask is None and keys.ring is None:  # of a decode step, each look costs the host time
            return ops.attend(queries, keys, scale, ops.EVERY, sinks)
        return _decode(queries, keys, scale, mask, sinks)
    if L == 0:
        return mx.zeros((*queries.shape[:3], values.shape[3]), queries.dtype)
    out = _prompt(queries, keys, scale, mask, sinks)
    if L > BLOCK and keys.length > SHORT and (every := ops.ahead()) and next(_prompts) % every == 0:
        mx.async_eval(out)
    return out


_prompts = itertools.count(1)  # layers that chunks of prompts went through


def _decode(q, keys: PackedView, scale: float, mask, sinks) -> mx.array:
    seen = seen_through(mask, keys.length)
    narrow = seen.window is not None and seen.window <= keys.max_size
    in_turn = keys.ring is not None and (narrow or q.shape[2] == 1)
    if in_turn and ops.is_reference(keys.format, q.dtype):
        return _in_token_order(q, keys, scale, seen, sinks)
    return ops.attend(q, keys, scale, seen, sinks)


def _in_token_order(q, keys: PackedView, scale: float, seen: ops.Mask, sinks) -> mx.array:
    """Each query over its own rows of a full ring, in the order of their tokens. So its sums are
    the same to the last bit whether the token comes alone, in the chunk of a draft or in a batch.
    In another order they differ by 1e-6, which turns a code of a later token where it is near a
    boundary, and then logits move by 0.1. (The kernels keep the ring's order and read the rows
    once for all queries.)
    """
    keep, idx = keys.ring or (0, keys.length)
    L, rows, tail = q.shape[2], keys.rows[..., : keys.length, :], keys.tail
    rows, array = ops.in_token_order(rows, seen.array, keys.length, keep, idx)
    found = []
    for i in range(L):
        end = keys.length - L + 1 + i
        first = max(0, end - keys.max_size)
        last = None if tail is None else tail[:, :, : tail.shape[2] - (L - 1 - i)]
        ring = max(0, keep - first), end - first
        own = ops.Packed(rows[..., first:end, :], end - first, keys.format, last, ring)
        own.recent = keys.recent
        own.first = None if keys.first is None else keys.first.after(first)
        starts = None if seen.starts is None else seen.starts - first
        mask = ops.Mask(window=seen.window, starts=starts, array=array if L == 1 else None)
        found.append(ops.attend(q[:, :, i : i + 1], own, scale, mask, sinks))
    return found[0] if L == 1 else mx.concatenate(found, axis=2)


def _prompt(q, keys: PackedView, scale: float, mask, sinks) -> mx.array:
    """A chunk of a prompt; sequences whose blocks begin at different rows are worked on apart."""
    if len(set(keys.places)) == 1:
        return _blocks(q, keys, keys.places[0], scale, mask, sinks)
    groups: dict[tuple[int, int], list[int]] = {}
    for i, place in enumerate(keys.places):
        groups.setdefault(place, []).append(i)
    parts = []
    for place, which in groups.items():
        at, some = mx.array(which), mask
        if isinstance(mask, mx.array) and mask.ndim == 4 and mask.shape[0] > 1:
            some = mask[at]
            if isinstance(mask, StepMask):
                some = StepMask(some, mask.seen)
        parts.append(_blocks(q[at], keys.of(at), place, scale, some, sinks))
    order = mx.argsort(mx.array([i for which in groups.values() for i in which]))
    return mx.concatenate(parts)[order]


def _blocks(q, keys: PackedView, place, scale: float, mask, sinks) -> mx.array:
    (into, known), given, L, chunk = place, q.dtype, q.shape[2], keys.chunk
    dtype, past = _compute_dtype(given), keys.length - L
    sinks = None if sinks is None else sinks.astype(dtype)
    window, causal = None, isinstance(mask, str)
    if isinstance(mask, StepMask) and mask.seen.array is None and mask.shape[-1] == keys.length:
        causal, window = True, mask.seen.window
    # Between the first tokens that a ring keeps and the others some are missing.
    known = min(known, past - (0 if keys.ring is None else keys.ring[0]))
    # A mask that a model made itself may let a token see later ones: the chunk is then one block.
    cuts = [*range(BLOCK - into, L, BLOCK)] if chunk is not None and causal else []
    pieces, first, found = [(q, chunk)], 0, []
    if chunk is not None and cuts:
        parts, *both = (mx.split(x, cuts, axis=2) for x in (q, *chunk))
        pieces = list(zip(parts, zip(*both, strict=True), strict=True))
    for end, (piece, new) in zip([*cuts, L], pieces, strict=True):
        low = 0 if window is None else max(0, past + first - window + 1)
        before = past + (end if new is None else first) - low
        own = min(known, past - low) if first == 0 else 0
        k, v = _restored(keys, low, before, own, dtype, new)
        out = mx.fast.scaled_dot_product_attention(
            piece.astype(dtype),
            k.astype(dtype),
            v.astype(dtype),
            scale=scale,
            mask=_part(mask, L, first, end, low, past + end, dtype),
            sinks=sinks,
        )
        found.append(out.astype(given))
        first = end
    return found[0] if len(found) == 1 else mx.concatenate(found, axis=2)


def _restored(keys: PackedView, low: int, before: int, own: int, dtype: mx.Dtype, new):
    """Keys and values of rows [low, low + before), the last ``own`` from the tail, and new ones."""
    if new is not None and before == 0:
        return new
    rows = keys.rows[:, :, low:] if low else keys.rows
    last = keys.tail[:, :, -own:] if keys.tail is not None and own > 0 else None
    first = None if keys.first is None else keys.first.after(low)
    return ops.restore(ops.Packed(rows, before, keys.format, last, None, first), dtype, new)


def _part(mask, L: int, a: int, end: int, low: int, high: int, dtype):
    """The mask of queries [a, end) of L over keys [low, high)."""
    if not isinstance(mask, mx.array):
        return mask
    keys = slice(low, high) if mask.shape[-1] > 1 else slice(None)
    if mask.ndim > 1 and mask.shape[-2] == L and L > 1:
        mask = mask[..., a:end, keys]
    else:
        mask = mask[..., keys]
    return mask if mask.dtype == mx.bool_ else mask.astype(dtype)


def _compute_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """Half precision is emulated, hence slow, on CPU."""
    return mx.float32 if mx.default_device().type == mx.DeviceType.cpu else dtype
