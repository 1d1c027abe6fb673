"""The reference backend: the three operations in plain ``mx`` ops, on any device.

Everything is computed in fp32, also for half-precision models: half precision is emulated on
CPU (``quantized_matmul`` is about 48x slower there in fp16), and a half-precision rotation
costs accuracy on any device. Long inputs are worked on in blocks: what is in between then fits
the processor's cache, and costs no memory to speak of.

What the choices here were measured by is in ``scripts/studies/speed.md``.
"""

import mlx.core as mx

from ..format.format import Format, recent_at
from ..format.layout import tail_dtype
from ..format.levels import (
    HALF_MAX,
    joined,
    pack_codes,
    quantize,
    quantize_with_feedback,
    read_levels,
    split,
    widened,
    zero_code,
)
from .packed import EVERY, First, Mask, Packed

_PACK_BLOCK = 1024  # vectors quantized at a time, 32 times as many on GPUs
_KEY_BLOCK = 4096  # keys whose codes are unpacked at a time


def quantize_pack(
    k: mx.array,
    v: mx.array,
    fmt: Format,
    tail: mx.array | None = None,
    size: int = 0,
    capacity: int | None = None,
) -> tuple[mx.array, mx.array | None]:
    """k [B, H, L, Dk], v [B, H, L, Dv] -> rows uint32 [B, H, L, W], and the new tail
    [B, H, size, Dk + Dv]; see :func:`mlx_kvq.ops.quantize_pack`."""
    B, H, L, _ = k.shape
    rows, y = _in_blocks(k, v, fmt, min(L, size))
    if capacity is not None and capacity > L:
        rows = mx.concatenate([rows, mx.zeros((B, H, capacity - L, rows.shape[3]), rows.dtype)], 2)
    if not size:
        return rows, None
    return rows, _moved_on(tail, y.astype(tail_dtype(k.dtype)), size)


def _moved_on(tail: mx.array | None, new: mx.array, size: int) -> mx.array:
    """A tail of ``size`` tokens, the last ones ``new``, at most as many; before it there were those
    of ``tail``, or none."""
    B, H, L, channels = new.shape
    if size == L:
        return new
    if tail is None:
        tail = mx.zeros((B, H, size - L, channels), new.dtype)
    older = tail[:, :, tail.shape[2] + L - size :].astype(new.dtype)
    return mx.concatenate([older, new], axis=2)


def pack_rotated(y: mx.array, fmt: Format) -> mx.array:
    """y [B, H, L, Dk + Dv], tokens of a tail -> rows uint32 [B, H, L, W]; see
    :func:`mlx_kvq.ops.pack_rotated`."""
    y = y.astype(mx.float32)
    return _pack(y[..., : fmt.layout.k_dim], y[..., fmt.layout.k_dim :], fmt)


def keep_exact(k: mx.array, v: mx.array, fmt: Format, tail: mx.array, size: int) -> mx.array:
    """k [B, H, L, Dk], v [B, H, L, Dv] -> the new tail [B, H, size, Dk + Dv]; see
    :func:`mlx_kvq.ops.keep_exact`."""
    new = mx.concatenate([k, v], axis=-1)
    if k.size:
        new = mx.concatenate([fmt.keys.forward(k), fmt.values.forward(v)], axis=-1)
    return _moved_on(tail, new.astype(tail_dtype(k.dtype)), size)


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
        if (dtype := tail_dtype(k.dtype)) != mx.float32:  # codes are made of what the tail has
            y, z = (x.astype(dtype).astype(mx.float32) for x in (y, z))
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
    return joined(words, halves, (lay.k_bits, lay.v_bits))


def _on_gpu() -> bool:
    return mx.default_device().type == mx.DeviceType.gpu


def dequantize(packed: Packed, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, mx.array]:
    """Rows to rotated keys and values; see :func:`mlx_kvq.ops.dequantize`."""
    fmt, tail, length = packed.format, packed.tail, packed.length
    lay = fmt.layout
    n = length if tail is None else max(0, length - tail.shape[2])  # from rows
    parts: list[tuple[mx.array, mx.array]] = []
    if n:
        kc, vc, ks, vs = split(packed.rows[..., :n, :], lay)
        k = read_levels(kc, ks, lay.wide.k_bits, lay.k_group, fmt.scale)
        v = read_levels(vc, vs, lay.wide.v_bits, lay.v_group, fmt.scale)
        if (first := _first_tokens(packed.first, fmt, n)) is not None:
            k, v = first.put(k, v)
        parts.append((k, v))
    if tail is not None:
        last = tail[:, :, tail.shape[2] - (length - n) :]
        parts.append((last[..., : lay.k_dim], last[..., lay.k_dim :]))
    k, v = (_joined([saturated(x, dtype) for x in side]) for side in zip(*parts, strict=True))
    return k, v


def restore(
    packed: Packed, dtype: mx.Dtype, chunk: tuple[mx.array, mx.array] | None = None
) -> tuple[mx.array, mx.array]:
    """As :func:`dequantize`, but out of the rotation; see :func:`mlx_kvq.ops.restore`."""
    fmt, (k, v) = packed.format, dequantize(packed)
    sides = [[saturated(side.output(x), dtype)] for side, x in ((fmt.keys, k), (fmt.values, v))]
    for side, new in zip(sides, chunk or (), strict=False):
        side.append(saturated(new, dtype))
    return _joined(sides[0]), _joined(sides[1])


def saturated(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """``x`` in ``dtype``: on the way to fp16, finite numbers saturate, infinities become NaN."""
    if dtype == mx.float16 and x.dtype != mx.float16:
        x = x.astype(mx.float32)  # in bf16 the limit would be 65536
        x = mx.clip(x, -HALF_MAX, HALF_MAX) + 0 * x
    return x.astype(dtype)


def _scores(q: mx.array, rows: mx.array, length: int, fmt: Format) -> mx.array:
    """Queries fp32 [B, H, M, Dk] times keys of wide rows -> [B, H, M, length]."""
    lay = fmt.layout.wide
    middle = zero_code(lay.k_bits, fmt.scale)
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
    """Probabilities fp32 [B, H, M, length] times values of wide rows -> [B, H, M, Dv]."""
    lay = fmt.layout.wide
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
        y = read_levels(words, scales, bits, group, rule)
        return x @ (y.swapaxes(-1, -2) if transpose else y)
    unit = next(g for g in (128, 64, 32) if group % g == 0)
    scales = scales.astype(mx.float32)
    if unit != group:
        scales = mx.repeat(scales, group // unit, axis=-1)
    return mx.quantized_matmul(
        x,
        words,
        scales,
        -zero_code(bits, rule) * scales,
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
    packed: Packed,
    scale: float,
    mask: Mask = EVERY,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention over the first ``length`` rows; shapes as in :func:`mlx_kvq.ops.attend`."""
    fmt, (B, Hq, L, _) = packed.format, q.shape
    length, Hkv = packed.length, packed.rows.shape[1]
    rows, array, exact = packed.rows, mask.array, None
    keep, idx = packed.ring or (0, length)
    if packed.tail is not None or packed.first is not None:
        rows, array = in_token_order(rows, array, length, keep, idx)
    if packed.tail is not None:
        exact = _Exact(packed, L, mask.starts)
    n = length if exact is None else exact.packed  # from rows
    if n and fmt.layout.wide is not fmt.layout:
        rows = widened(rows[..., :n, :], fmt.layout)
    qr = fmt.keys.query(q * scale if q.dtype == mx.float32 else q.astype(mx.float32) * scale)
    qr = qr.reshape(B, Hkv, -1, fmt.layout.k_dim)  # [B, Hkv, (Hq / Hkv) * L, Dk]
    scores = _scores(qr, rows, n, fmt).reshape(B, Hq, L, n) if n else mx.zeros((B, Hq, L, 0))
    first = _first_tokens(packed.first, fmt, n)
    if first is not None:
        scores = first.scores(qr, scores)
    if exact is not None:
        scores = exact.scores(qr, scores)
    p = _probabilities(q, _masked(scores, mask, array), scale, fmt, sinks)
    sums: list[mx.array] = []
    rest = p
    if exact is not None:
        o, rest = exact.mix(p, Hkv)
        sums.append(o)
    if first is not None:
        o, rest = first.mix(rest, Hkv)
        sums.append(o)
    if n:
        sums.append(_mix(rest.reshape(B, Hkv, -1, n), rows, n, fmt))
    o = sum(sums[1:], sums[0]).reshape(B, Hq, L, fmt.layout.v_dim)
    return _output(o, p.reshape(B, Hkv, -1, length), fmt, q.dtype, sinks is not None)


class _Exact:
    """The newest keys, which queries read from the tail: ``n`` that some query reads there, and
    ``packed`` that some query reads from its row."""

    def __init__(self, packed: Packed, L: int, starts: mx.array | None):
        fmt, length, tail = packed.format, packed.length, packed.tail
        assert tail is not None
        keep = packed.ring[0] if packed.ring else 0
        recent = packed.most_recent
        self.n = min(recent + L - 1, length - keep)
        self.length, self.dim = length, fmt.layout.k_dim
        self.tail = tail[:, :, tail.shape[2] - self.n :].astype(mx.float32)
        self.packed, self.own = length, None
        fixed = packed.recent is not None
        alike = fixed or starts is None or recent == fmt.recent  # in all sequences
        if L == 1 and alike:  # what is left out would add zeros: the sums are the same to the bit
            self.packed = length - self.n
            return
        query = mx.arange(length - L, length)[:, None]
        tokens = query + 1 if starts is None else query + 1 - starts.reshape(-1, 1, 1, 1)
        reads = recent if fixed else recent_at(fmt.recent, tokens)
        self.own = mx.arange(length - self.n, length) > query - reads

    def scores(self, q: mx.array, of_rows: mx.array) -> mx.array:
        """Of all keys, [B, Hq, L, length]."""
        first = self.length - self.n
        exact = q @ self.tail[..., : self.dim].swapaxes(-1, -2)
        exact = exact.reshape(*of_rows.shape[:3], self.n)
        if self.own is not None:
            exact = mx.where(self.own, exact, of_rows[..., first:])
        return mx.concatenate([of_rows[..., :first], exact], axis=-1)

    def mix(self, p: mx.array, Hkv: int) -> tuple[mx.array, mx.array]:
        """The tail's part of the output, and the probabilities of the rows."""
        first = self.length - self.n
        exact, rest = p[..., first:], p[..., :first]
        if self.own is not None:
            exact = mx.where(self.own, exact, 0.0)
            rest = mx.concatenate([rest, p[..., first:] - exact], axis=-1)
        exact = exact.reshape(p.shape[0], Hkv, -1, self.n)
        return exact @ self.tail[..., self.dim :], rest


def _first_tokens(first: First | None, fmt: Format, n: int) -> "_FirstTokens | None":
    """Those that are in the first ``n`` rows."""
    if first is None or not n or not first.count:
        return None
    tokens = _FirstTokens(first, fmt, n)
    return tokens if tokens.tokens.shape[2] else None


class _FirstTokens:
    """The first keys, which queries read exactly; ``n`` keys are read from rows."""

    def __init__(self, first: First, fmt: Format, n: int):
        self.n, self.dim = n, fmt.layout.k_dim
        self.tokens = first.array[:, :, : first.count].astype(mx.float32)
        at = first.at
        self.columns: mx.array | None = None
        if isinstance(at, mx.array):  # columns [B, F] of the tokens, and tokens [B, n] of columns
            self.columns = at.reshape(-1, 1) + mx.arange(first.count)
            self.places = mx.arange(n) - at.reshape(-1, 1)
            self.inside = (self.places >= 0) & (self.places < first.count)
            self.low = self.high = 0
        else:
            self.low = min(n, max(0, at))
            self.high = max(self.low, min(n, at + first.count))
            self.tokens = self.tokens[:, :, self.low - at : self.high - at]

    def _over(self, of_rows: mx.array, new: mx.array, axis: int) -> mx.array:
        """``of_rows`` with ``new`` in the places of the first tokens."""
        ndim, count = of_rows.ndim, new.shape[axis]
        if self.columns is None:
            sizes = [self.low, self.high]
            before, _, after = mx.split(of_rows, sizes, axis=axis)
            return mx.concatenate([before, new, after], axis=axis)

        def along(a: mx.array) -> mx.array:
            shape = [1] * ndim
            shape[0], shape[axis] = a.shape
            return a.reshape(shape)

        at = along(mx.clip(self.places, 0, count - 1))
        return mx.where(along(self.inside), mx.take_along_axis(new, at, axis=axis), of_rows)

    def put(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Rotated keys and values of all rows, with these."""
        new = self.tokens[..., : self.dim], self.tokens[..., self.dim :]
        return self._over(k, new[0], 2), self._over(v, new[1], 2)

    def scores(self, q: mx.array, of_rows: mx.array) -> mx.array:
        """Of the rows' keys, [B, Hq, L, n]."""
        exact = q @ self.tokens[..., : self.dim].swapaxes(-1, -2)
        return self._over(of_rows, exact.reshape(*of_rows.shape[:3], -1), 3)

    def mix(self, p: mx.array, Hkv: int) -> tuple[mx.array, mx.array]:
        """Their part of the output, and the probabilities of the rows."""
        count = self.tokens.shape[2]
        if self.columns is None:
            exact = p[..., self.low : self.high]
        else:
            there = (self.columns >= 0) & (self.columns < self.n)
            at = mx.clip(self.columns, 0, self.n - 1)[:, None, None]
            shape = *p.shape[:3], count
            exact = mx.take_along_axis(p, mx.broadcast_to(at, shape), axis=3) * there[:, None, None]
        rest = self._over(p, mx.zeros_like(exact), 3)
        exact = exact.reshape(p.shape[0], Hkv, -1, count)
        return exact @ self.tokens[..., self.dim :], rest


def _masked(scores: mx.array, mask: Mask, array: mx.array | None) -> mx.array:
    L, length = scores.shape[2:]
    least = mx.finfo(mx.float32).min
    if array is not None:
        # A mask of -inf alone must not make the softmax of a row NaN.
        boolean = array.dtype == mx.bool_
        scores = mx.where(array, scores, least) if boolean else mx.maximum(scores + array, least)
    key, query = mx.arange(length), mx.arange(length - L, length)
    if (allowed := visible(query, key, mask.causal, mask.window)) is not None:
        scores = mx.where(allowed, scores, least)
    if mask.starts is not None:
        scores = mx.where(key >= mask.starts.reshape(-1, 1, 1, 1), scores, least)
    return scores


def _probabilities(q, scores: mx.array, scale: float, fmt: Format, sinks) -> mx.array:
    """Softmax over the keys, and over the sinks, which are then left out."""
    if sinks is None:
        return mx.softmax(scores, axis=-1, precise=True)
    B, Hq, L, _ = q.shape
    sink = sinks.astype(mx.float32).reshape(1, Hq, 1, 1)
    if (mu := fmt.keys.calibration.mu) is not None:
        # The centre was taken off every key; beside a sink it no longer cancels.
        q32 = q.astype(mx.float32).reshape(B, mu.shape[0], -1, fmt.layout.k_dim)
        sink = sink - scale * (q32 * mu[:, None]).sum(axis=-1).reshape(B, Hq, L, 1)
    sink = mx.broadcast_to(sink, (B, Hq, L, 1))
    return mx.softmax(mx.concatenate([sink, scores], axis=-1), axis=-1, precise=True)[..., 1:]


def in_token_order(
    rows: mx.array, mask: mx.array | None, length: int, keep: int, idx: int
) -> tuple[mx.array, mx.array | None]:
    """Rows of a ring, and a mask over them, in the order of the tokens."""
    if idx == length:
        return rows, mask

    def ordered(a: mx.array, axis: int) -> mx.array:
        a = a.swapaxes(axis, 0)
        a = mx.concatenate([a[:keep], a[idx:length], a[keep:idx]])
        return a.swapaxes(axis, 0)

    rows = ordered(rows, 2)
    if mask is not None and mask.shape[-1] == length:
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
