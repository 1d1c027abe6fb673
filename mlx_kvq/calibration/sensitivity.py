"""Attention of a pass over text, and how much each of its queries minds errors of rounded keys."""

import mlx.core as mx


def attend(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    rounded: slice,
    near: int,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """What ``mx.fast.scaled_dot_product_attention`` returns, and of each query how much errors of
    its logits move its output: Σ_t p_t² |v_t − out|², over the keys that a cache rounds.

    Independent errors δ_t of the logits move the output by Σ_t p_t δ_t (v_t − out).

    Args:
        q (mx.array): [B, Hq, L, D] in any float dtype, the last L tokens of the keys.
        keys, values (mx.array): [B, Hkv, T, D] and [B, Hkv, T, Dv].
        scale (float), mask, sinks: As there.
        rounded (slice): Keys that are, if they are not among a query's ``near`` newest ones.
        near (int): Tokens, the query's own included.

    Returns:
        The output [B, Hq, L, Dv] in the dtype of q, and fp32 [B, Hq, L].
    """
    (B, Hq, L, _), (Hkv, T), dtype = q.shape, keys.shape[1:3], q.dtype
    q, keys, values = (x.astype(mx.float32) for x in (q, keys, values))
    s = (q * scale).reshape(B, Hkv, -1, L, q.shape[-1]) @ keys[:, :, None].swapaxes(-1, -2)
    at, of_query = mx.arange(T), mx.arange(T - L, T)[:, None]
    if mask == "causal":
        s = mx.where(at <= of_query, s, -mx.inf)
    elif isinstance(mask, mx.array):
        if mask.ndim == 4:
            mask = mask.reshape(mask.shape[0], -1, Hq // Hkv if mask.shape[1] == Hq else 1, L, T)
        s = mx.where(mask, s, -mx.inf) if mask.dtype == mx.bool_ else s + mask.astype(mx.float32)
    if sinks is not None:
        sink = mx.broadcast_to(sinks.astype(mx.float32).reshape(Hkv, -1, 1, 1), (*s.shape[:4], 1))
        s = mx.concatenate([s, sink], axis=-1)
    p = mx.softmax(s, axis=-1)[..., :T]
    out = p @ values[:, :, None]
    square = mx.square(mx.where(at[rounded] <= of_query - near, p[..., rounded], 0.0))
    # |v - o|^2 from sums of v, |v|^2 and 1; of vectors around the mean, or these cancel.
    mean = values.mean(axis=2, keepdims=True)
    centred, away = (values - mean)[:, :, rounded], out - mean[:, :, None]
    sizes = mx.square(centred).sum(axis=-1, keepdims=True)
    sums = square @ mx.concatenate([centred, sizes, mx.ones_like(sizes)], axis=-1)[:, :, None]
    D = values.shape[-1]
    of_values, of_sizes, of_one = mx.split(sums, [D, D + 1], axis=-1)
    moved = of_sizes + (away * (away * of_one - 2 * of_values)).sum(axis=-1, keepdims=True)
    shape = B, Hq, L
    return out.reshape(*shape, D).astype(dtype), mx.maximum(moved, 0.0).reshape(shape)
