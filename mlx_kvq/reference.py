"""The reference backend: the three operations in plain ``mx`` ops, on any device.

Everything is computed in fp32, also for half-precision models: half precision is emulated on
CPU (``quantized_matmul`` is about 48x slower there in fp16), and a half-precision rotation
costs accuracy on any device. Long inputs are worked on in blocks: what is in between then fits
the processor's cache, and costs no memory to speak of.

What the choices here were measured by is in ``docs/performance.md``.
"""

import mlx.core as mx

from . import feedback
from .format import Format
from .layout import RowLayout, tail_dtype

_HALF_MAX = 65504.0
_LEAST = 2.0**-24  # fp16's smallest number: groups of smaller channels have a scale of 0
_LEAST_SEARCHED = 7.5 * 2.0**-25  # up to this a searched scale rounds to 0 in fp16
_PACK_BLOCK = 1024  # vectors quantized at a time, 32 times as many on GPUs
_KEY_BLOCK = 4096  # keys whose codes are unpacked at a time


def quantize(y: mx.array, bits: int, group: int, rule: str) -> tuple[mx.array, mx.array]:
    """Quantize along the last axis.

    Args:
        y (mx.array): fp32 [..., D].
        bits (int): 4 or 8.
        group (int): Channels that share a scale.
        rule (str): ``"search"``, ``"absmax"`` or ``"paper"``; at 8 bits clipping never pays, so
            ``"search"`` is ``"absmax"``.

    Returns:
        Codes uint32 [..., D] and scales fp16 [..., D / group]. A group that holds a NaN or an
        infinity gets a NaN scale, so the damage shows as it would in fp16. A finite group whose
        scale would overflow fp16 saturates.
    """
    y = y.reshape(*y.shape[:-1], -1, group)  # [..., G, g]
    damage = (y * 0).sum(axis=-1, keepdims=True)  # 0 or NaN
    step = _step(y, bits, rule)
    codes = mx.where(step > 0, _codes(y, step, bits, rule), 1 << (bits - 1))
    scale = _stored(y, codes, step, bits, rule)
    codes = mx.where(damage == 0, codes, 0).astype(mx.uint32)
    return codes.flatten(-2), (scale + damage).astype(mx.float16).squeeze(-1)


def tried(group: int) -> tuple[float, float]:
    """Fractions of the abs-max scale that are tried for groups of this size. Chosen by the angle
    and stored with the length they are as good as three by squared error (docs/quality.md), and
    the first of them finds the codes of what was quantized before."""
    return (1.0, 0.94) if group <= 32 else (0.96, 0.89) if group <= 64 else (0.93, 0.86)


def _to_half(s: mx.array) -> mx.array:
    return mx.minimum(s, _HALF_MAX).astype(mx.float16).astype(mx.float32)


def _covering(top: mx.array, levels: float) -> mx.array:
    """The fp16 scale of which ``levels`` reach ``top``. Up to a multiple of fp16's smallest number:
    rounded down, the smallest scales would clip the largest channel by a third."""
    scale = mx.ceil(top * (1 / levels / _LEAST)) * _LEAST
    return mx.where(top >= _LEAST, _to_half(scale), 0.0)


def _step(y: mx.array, bits: int, rule: str) -> mx.array:
    """The scale that groups [..., g] are rounded by, fp32 [..., 1]. If it is searched, another one
    is stored (:func:`_stored`), so it need not be a number of fp16."""
    middle = 1 << (bits - 1)
    top = mx.abs(y).max(axis=-1, keepdims=True)
    if rule == "paper":
        return _covering(top, middle - 1)
    if rule == "absmax" or bits == 8:
        return _covering(top, middle - 0.5)
    steps = top * mx.array([c / (middle - 0.5) for c in tried(y.shape[-1])])  # [..., 2]
    steps = mx.where(top > _LEAST_SEARCHED, steps, 0.0)
    # The one whose levels point more in the direction of y.
    x, s = y[..., None, :], steps[..., None]
    levels = _codes(x, s, bits, rule) - _middle(bits, rule)
    dots = mx.square((x * levels).sum(axis=-1))
    lengths = mx.square(levels).sum(axis=-1)
    second = dots[..., 1:] * lengths[..., :1] > dots[..., :1] * lengths[..., 1:]
    return mx.where(second, steps[..., 1:], steps[..., :1])


def _codes(y: mx.array, step: mx.array, bits: int, rule: str) -> mx.array:
    """The nearest codes, fp32."""
    middle = 1 << (bits - 1)
    n = y / mx.where(step > 0, step, 1.0)
    if rule == "paper":
        return mx.clip(mx.round(n) + middle, 1, 2 * middle - 1)
    return mx.clip(mx.floor(n) + middle, 0, 2 * middle - 1)


def _stored(y: mx.array, codes: mx.array, step: mx.array, bits: int, rule: str) -> mx.array:
    """The scale that is stored with the codes of groups [..., g]: it gives them the length of y
    back where steps were searched."""
    if rule != "search" or bits == 8:
        return step
    levels = mx.square(codes - _middle(bits, rule)).sum(axis=-1, keepdims=True)
    length = mx.sqrt(mx.square(y).sum(axis=-1, keepdims=True) / levels)
    return mx.where(step > 0, _to_half(length), 0.0)


def quantize_with_feedback(
    y: mx.array, bits: int, group: int, rule: str, G: mx.array
) -> tuple[mx.array, mx.array]:
    """As :func:`quantize`, but blocks of channels are rounded one after the other, the last
    first, each making up for the errors so far (:mod:`mlx_kvq.feedback`).

    Args:
        y (mx.array): fp32 [B, H, L, D].
        G (mx.array): fp32 [H, D, D].
    """
    D, block = y.shape[-1], feedback.BLOCK
    middle = _middle(bits, rule)
    codes: list[mx.array] = []
    scales: list[mx.array] = []
    errors: mx.array | None = None  # y − ŷ of the channels so far, [B, H, L, D - done]

    def asked(low: int, high: int) -> mx.array:
        """Channels of y that make up for the errors so far."""
        if errors is None:
            return y[..., low:high]
        return y[..., low:high] + errors @ G[:, low:high, D - errors.shape[-1] :].swapaxes(-1, -2)

    for end in range(D, 0, -group):
        # The group's step fits what is asked of it when its turn comes.
        step = _step(asked(end - group, end), bits, rule)
        known = errors
        targets: list[mx.array] = []
        rounded: list[mx.array] = []
        for j in range(end - block, end - group - 1, -block):
            targets.insert(0, asked(j, j + block))
            rounded.insert(0, _codes(targets[0], step, bits, rule))
            # A group of zeros, or a damaged one, has nothing to pass on.
            error = y[..., j : j + block] - step * (rounded[0] - middle)
            error = mx.where(step > 0, error, 0.0)
            errors = error if errors is None else mx.concatenate([error, errors], axis=-1)
        n, target = (mx.concatenate(parts, axis=-1) for parts in (rounded, targets))
        scale = _stored(target, n, step, bits, rule)
        error = mx.where(step > 0, y[..., end - group : end] - scale * (n - middle), 0.0)
        errors = error if known is None else mx.concatenate([error, known], axis=-1)
        finite = mx.isfinite((target * 0).sum(axis=-1, keepdims=True))
        codes.insert(0, mx.where(finite, mx.where(step > 0, n, 1 << (bits - 1)), 0))
        scales.insert(0, mx.where(finite, scale, mx.nan))
    whole = mx.concatenate(codes, axis=-1).astype(mx.uint32)
    return whole, mx.concatenate(scales, axis=-1).astype(mx.float16)


def pack_codes(codes: mx.array, bits: int) -> mx.array:
    """Codes uint32 [..., D] -> words uint32 [..., D * bits / 32], lowest bits first."""
    codes = codes.astype(mx.uint8)
    if bits == 4:
        codes = codes[..., ::2] | (codes[..., 1::2] << 4)
    return codes.view(mx.uint32)


def unpack_codes(words: mx.array, bits: int) -> mx.array:
    """Words uint32 [..., n] -> codes fp32 [..., 32 * n / bits]."""
    shifts = bits * mx.arange(32 // bits, dtype=mx.uint32)
    codes = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2).astype(mx.float32)


def quantize_pack(k: mx.array, v: mx.array, fmt: Format) -> mx.array:
    """k [B, H, L, Dk], v [B, H, L, Dv] -> rows uint32 [B, H, L, W]."""
    return _in_blocks(k, v, fmt, 0)[0]


def quantize_pack_tail(
    k: mx.array,
    v: mx.array,
    fmt: Format,
    tail: mx.array | None,
    keep: int,
    held: mx.array | None = None,
    capacity: int | None = None,
) -> tuple[mx.array, mx.array]:
    """As :func:`quantize_pack`, with the tail; see :func:`mlx_kvq.ops.quantize_pack_tail`."""
    B, H, L, _ = k.shape
    rows, y = _in_blocks(k, v, fmt, min(L, keep))
    y = y.astype(tail_dtype(k.dtype))
    if held is not None:
        rows = mx.concatenate([held[:, :, L:], rows], axis=2)
    elif capacity is not None and capacity > L:
        rows = mx.concatenate([rows, mx.zeros((B, H, capacity - L, rows.shape[3]), rows.dtype)], 2)
    if keep <= L:
        return rows, y
    if tail is None:
        tail = mx.zeros((B, H, keep - L, y.shape[3]), y.dtype)
    older = tail[:, :, tail.shape[2] + L - keep :].astype(y.dtype)
    return rows, mx.concatenate([older, y], axis=2)


def _in_blocks(k: mx.array, v: mx.array, fmt: Format, keep: int) -> tuple[mx.array, mx.array]:
    """Rows, and the rotated vectors [B, H, keep, Dk + Dv], fp32, of the last ``keep`` tokens."""
    B, H, L, _ = k.shape
    lay = fmt.layout
    if not B * H * L:
        tail = mx.zeros((B, H, min(L, keep), lay.k_dim + lay.v_dim))
        return mx.zeros((B, H, L, lay.words), mx.uint32), tail
    block = _PACK_BLOCK * (32 if _on_gpu() else 1)
    step = max(1, block // (B * H))
    rows: list[mx.array] = []
    kept: list[mx.array] = []
    for i in range(0, L, step):
        y, z = fmt.keys.forward(k[:, :, i : i + step]), fmt.values.forward(v[:, :, i : i + step])
        rows.append(_pack(y, z, fmt))
        if (first := max(0, L - keep - i)) < y.shape[2] and keep:
            kept.append(mx.concatenate([y[:, :, first:], z[:, :, first:]], axis=-1))
    return _joined(rows), _joined(kept) if kept else y[:, :, :0]


def _joined(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


def _pack(y: mx.array, z: mx.array, fmt: Format) -> mx.array:
    """Rotated keys y and values z, fp32 -> rows."""
    lay = fmt.layout
    alike = (lay.k_dim, lay.k_bits, lay.k_group) == (lay.v_dim, lay.v_bits, lay.v_group)
    if (G := fmt.feedback) is None and alike:
        # Of a single token, most of the time is the number of operations.
        codes, scales = quantize(mx.stack([y, z]), lay.k_bits, lay.k_group, fmt.scale)
        words = list(pack_codes(codes, lay.k_bits))
        halves = list(scales)
    else:
        if G is None:
            k_codes, k_scales = quantize(y, lay.k_bits, lay.k_group, fmt.scale)
        else:
            k_codes, k_scales = quantize_with_feedback(y, lay.k_bits, lay.k_group, fmt.scale, G)
        v_codes, v_scales = quantize(z, lay.v_bits, lay.v_group, fmt.scale)
        words = [pack_codes(k_codes, lay.k_bits), pack_codes(v_codes, lay.v_bits)]
        halves = [k_scales, v_scales]
    if (lay.k_scales + lay.v_scales) % 2:
        halves.append(mx.zeros((*y.shape[:-1], 1), mx.float16))
    return mx.concatenate([*words, mx.concatenate(halves, axis=-1).view(mx.uint32)], axis=-1)


def _on_gpu() -> bool:
    return mx.default_device().type == mx.DeviceType.gpu


def split(rows: mx.array, lay: RowLayout) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """rows [..., W] -> K codes, V codes (words) and K scales, V scales (fp16), all views."""
    halves, first = rows.view(mx.float16), 2 * lay.codes_words
    return (
        rows[..., : lay.k_words],
        rows[..., lay.k_words : lay.codes_words],
        halves[..., first : first + lay.k_scales],
        halves[..., first + lay.k_scales : first + lay.k_scales + lay.v_scales],
    )


def _middle(bits: int, rule: str) -> float:
    """The level of code 0 is minus this many scales."""
    return (1 << (bits - 1)) - (0.0 if rule == "paper" else 0.5)


def _values(words: mx.array, scales: mx.array, bits: int, group: int, rule: str) -> mx.array:
    """Codes and scales -> fp32 [..., D]."""
    levels = unpack_codes(words, bits) - _middle(bits, rule)
    levels = levels.reshape(*levels.shape[:-1], -1, group)
    return (levels * scales.astype(mx.float32)[..., None]).flatten(-2)


def dequantize(
    rows: mx.array,
    length: int,
    fmt: Format,
    dtype: mx.Dtype = mx.float32,
    tail: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Rows to rotated keys and values; see :func:`mlx_kvq.ops.dequantize`."""
    lay = fmt.layout
    packed = length if tail is None else max(0, length - tail.shape[2])
    parts: list[tuple[mx.array, mx.array]] = []
    if packed:
        kc, vc, ks, vs = split(rows[..., :packed, :], lay)
        k = _values(kc, ks, lay.k_bits, lay.k_group, fmt.scale)
        parts.append((k, _values(vc, vs, lay.v_bits, lay.v_group, fmt.scale)))
    if tail is not None:
        last = tail[:, :, tail.shape[2] - (length - packed) :]
        parts.append((last[..., : lay.k_dim], last[..., lay.k_dim :]))
    k, v = (_joined([saturated(x, dtype) for x in side]) for side in zip(*parts, strict=True))
    return k, v


def restore(
    rows: mx.array,
    length: int,
    fmt: Format,
    dtype: mx.Dtype,
    tail: mx.array | None = None,
    chunk: tuple[mx.array, mx.array] | None = None,
) -> tuple[mx.array, mx.array]:
    """As :func:`dequantize`, but out of the rotation; see :func:`mlx_kvq.ops.restore`."""
    k, v = dequantize(rows, length, fmt, mx.float32, tail)
    sides = [[saturated(side.output(x), dtype)] for side, x in ((fmt.keys, k), (fmt.values, v))]
    for side, new in zip(sides, chunk or (), strict=False):
        side.append(saturated(new, dtype))
    return _joined(sides[0]), _joined(sides[1])


def saturated(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """``x`` in ``dtype``: on the way to fp16, finite numbers saturate, infinities become NaN."""
    if dtype == mx.float16 and x.dtype != mx.float16:
        x = mx.clip(x, -_HALF_MAX, _HALF_MAX) + 0 * x
    return x.astype(dtype)


def _scores(q: mx.array, rows: mx.array, length: int, fmt: Format) -> mx.array:
    """Queries fp32 [B, H, M, Dk] times keys -> [B, H, M, length]."""
    lay = fmt.layout
    middle = _middle(lay.k_bits, fmt.scale)
    if _on_gpu():
        words, _, scales, _ = split(rows[..., :length, :], lay)
        return _matmul(q, words, scales, lay.k_bits, lay.k_group, fmt.scale, transpose=True)
    # MLX's product with a transposed quantized matrix adds up one term after the other, 1.6 ns
    # each. With the keys' codes turned over, as bytes, it is one that adds rows: 0.2 ns.
    B, H, M, D = q.shape
    G, g = lay.k_scales, lay.k_group
    q = q.reshape(B, H, M, G, g).swapaxes(2, 3)  # [B, H, G, M, g]
    if lay.k_bits == 4:
        q = mx.concatenate([q[..., ::2], q[..., 1::2]], axis=-1)
    n = 4 * lay.k_words
    blocks = []
    for i in range(0, length, _KEY_BLOCK):
        part = rows[:, :, i : min(length, i + _KEY_BLOCK)]
        T = part.shape[2]
        codes = part.view(mx.uint8)[..., :n].swapaxes(-1, -2)
        if T % 32:
            codes = mx.pad(codes, [(0, 0)] * 3 + [(0, -T % 32)])
        codes = mx.contiguous(codes).reshape(B, H, G, n // G, -1)
        if lay.k_bits == 4:
            codes = mx.concatenate([codes & 15, codes >> 4], axis=3)
        shape = (B, H, G, g, codes.shape[-1] // 32)
        one, offset = mx.ones(shape), mx.full(shape, -middle)
        dots = mx.quantized_matmul(
            q, codes.view(mx.uint32), one, offset, False, group_size=32, bits=8
        )
        scales = split(part, lay)[2].swapaxes(-1, -2)[:, :, :, None]
        blocks.append((dots[..., :T] * scales).sum(axis=2))
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=-1)


def _mix(p: mx.array, rows: mx.array, length: int, fmt: Format) -> mx.array:
    """Probabilities fp32 [B, H, M, length] times values -> [B, H, M, Dv]."""
    lay = fmt.layout
    _, words, _, scales = split(rows[..., :length, :], lay)
    return _matmul(p, words, scales, lay.v_bits, lay.v_group, fmt.scale, transpose=False)


def _matmul(
    x: mx.array,
    words: mx.array,
    scales: mx.array,
    bits: int,
    group: int,
    rule: str,
    transpose: bool,
) -> mx.array:
    """x @ Ŷᵀ (``transpose``) or x @ Ŷ with Ŷ given by codes and scales, fp32.

    ``mx.quantized_matmul`` knows groups of 32, 64 and 128; larger groups repeat their scale,
    smaller ones are dequantized first. So is everything on CUDA, where mlx 0.32 has no
    quantized product for most lengths.
    """
    if group % 32 or _on_gpu() and mx.cuda.is_available():
        y = _values(words, scales, bits, group, rule)
        return x @ (y.swapaxes(-1, -2) if transpose else y)
    unit = next(g for g in (128, 64, 32) if group % g == 0)
    scales = scales.astype(mx.float32)
    if unit != group:
        scales = mx.repeat(scales, group // unit, axis=-1)
    return mx.quantized_matmul(
        x,
        words,
        scales,
        -_middle(bits, rule) * scales,
        transpose=transpose,
        group_size=unit,
        bits=bits,
    )


def visible(query: mx.array, key: mx.array, causal: bool, window: int | None) -> mx.array | None:
    """Which keys queries may see, all given by their positions, boolean [queries, keys]."""
    if not causal and window is None:
        return None
    allowed = query[:, None] >= key if causal else key >= 0
    return allowed if window is None else allowed & (key > query[:, None] - window)


def attend(
    q: mx.array,
    rows: mx.array,
    length: int,
    fmt: Format,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    starts: mx.array | None = None,
    window: int | None = None,
    tail: mx.array | None = None,
    ring: tuple[int, int] | None = None,
) -> mx.array:
    """Attention over the first ``length`` rows; shapes as in :func:`mlx_kvq.ops.attend`."""
    lay = fmt.layout
    B, Hq, L, _ = q.shape
    Hkv = rows.shape[1]
    key, query = mx.arange(length), mx.arange(length - L, length)
    n = 0  # of the last keys, which some query reads from the tail
    packed = length  # of the first ones, which some query reads from its row
    if tail is not None:
        keep = 0
        if ring is not None:
            rows, mask = in_token_order(rows, mask, length, *ring)
            keep = ring[0]
        n = min(fmt.recent + L - 1, length - keep)
        last = tail[:, :, tail.shape[2] - n :].astype(mx.float32)
        if L == 1:  # what is left out would add zeros: the sums are the same to the last bit
            packed = length - n
        own = None if L == 1 else key[length - n :] > query[:, None] - fmt.recent
    qr = fmt.keys.query(q * scale if q.dtype == mx.float32 else q.astype(mx.float32) * scale)
    qr = qr.reshape(B, Hkv, -1, lay.k_dim)  # [B, Hkv, (Hq / Hkv) * L, Dk]
    parts = [_scores(qr, rows, packed, fmt).reshape(B, Hq, L, packed)] if packed else []
    if n:
        exact = (qr @ last[..., : lay.k_dim].swapaxes(-1, -2)).reshape(B, Hq, L, n)
        if own is not None:
            exact = mx.where(own, exact, parts[0][..., length - n :])
            parts[0] = parts[0][..., : length - n]
        parts.append(exact)
    scores = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
    least = mx.finfo(mx.float32).min
    if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
        # A mask of -inf alone must not make the softmax of a row NaN.
        scores = mx.maximum(scores + mask, least)
    elif isinstance(mask, mx.array):
        scores = mx.where(mask, scores, least)
    allowed = visible(query, key, mask == "causal" if isinstance(mask, str) else False, window)
    if allowed is not None:
        scores = mx.where(allowed, scores, least)
    if starts is not None:
        scores = mx.where(key >= starts.reshape(B, 1, 1, 1), scores, least)
    if sinks is not None:
        sink = sinks.astype(mx.float32).reshape(1, Hq, 1, 1)
        if (mu := fmt.keys.calibration.mu) is not None:
            # The centre was taken off every key; beside a sink it no longer cancels.
            q32 = q.astype(mx.float32).reshape(B, Hkv, -1, lay.k_dim)
            dot = (q32 * mu[:, None]).sum(axis=-1).reshape(B, Hq, L, 1)
            sink = sink - scale * dot
        scores = mx.concatenate([mx.broadcast_to(sink, (B, Hq, L, 1)), scores], axis=-1)
    p = mx.softmax(scores, axis=-1, precise=True)
    if sinks is not None:
        p = p[..., 1:]
    sums: list[mx.array] = []
    rest = p[..., :packed]
    if n:
        exact = p[..., length - n :]
        if own is not None:
            exact = mx.where(own, exact, 0.0)
            rest = mx.concatenate([p[..., : length - n], p[..., length - n :] - exact], axis=-1)
        sums.append(exact.reshape(B, Hkv, -1, n) @ last[..., lay.k_dim :])
    if packed:
        sums.append(_mix(rest.reshape(B, Hkv, -1, packed), rows, packed, fmt))
    o = sums[0] if len(sums) == 1 else sums[0] + sums[1]
    p = p.reshape(B, Hkv, -1, length)
    return _output(o.reshape(B, Hq, L, lay.v_dim), p, fmt, q.dtype, sinks is not None)


def in_token_order(
    rows: mx.array, mask: mx.array | str | None, length: int, keep: int, idx: int
) -> tuple[mx.array, mx.array | str | None]:
    """Rows of a ring, and an array mask over them, in the order of the tokens."""
    if idx == length:
        return rows, mask

    def ordered(a: mx.array, axis: int) -> mx.array:
        a = a.swapaxes(axis, 0)
        a = mx.concatenate([a[:keep], a[idx:length], a[keep:idx]])
        return a.swapaxes(axis, 0)

    rows = ordered(rows, 2)
    if isinstance(mask, mx.array) and mask.shape[-1] == length:
        mask = ordered(mask, mask.ndim - 1)
    return rows, mask


def _output(o: mx.array, p: mx.array, fmt: Format, dtype: mx.Dtype, sinks: bool) -> mx.array:
    mu = fmt.values.calibration.mu
    out = fmt.values.output(o)
    if sinks and mu is not None:
        # The sink takes part of the probability, so the values' centre counts Σp < 1 times.
        B, Hq, L, D = out.shape
        missing = 1.0 - p.sum(axis=-1).reshape(B, mu.shape[0], -1, L, 1)
        out = (out.reshape(B, mu.shape[0], -1, L, D) - missing * mu[:, None, None]).reshape(
            B, Hq, L, D
        )
    return saturated(out, dtype)
