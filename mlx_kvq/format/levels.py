"""Codes and scales: quantizing rotated vectors, packing codes into words, reading them back."""

from collections.abc import Sequence
from functools import reduce

import mlx.core as mx

from . import feedback
from .layout import RowLayout, is_narrow

HALF_MAX = 65504.0
_LEAST = 2.0**-24  # fp16's smallest number: groups of smaller channels have a scale of 0
# Up to so many times the outermost level a searched scale rounds to 0 in fp16.
_LEAST_SEARCHED = 2.0**-25


def quantize(y: mx.array, bits: int, group: int, rule: str) -> tuple[mx.array, mx.array]:
    """Quantize along the last axis.

    Args:
        y (mx.array): fp32 [..., D].
        bits (int): 3, 4, 5 or 8.
        group (int): Channels that share a scale.
        rule (str): ``"search"``, ``"absmax"`` or ``"paper"``; at 8 bits ``"search"`` is
            ``"absmax"``, as clipping never pays there.

    Returns:
        Codes uint32 [..., D] and scales fp16 [..., D / group]. A group with a NaN or an infinity
        gets a NaN scale; a finite scale that would overflow fp16 saturates.
    """
    y = y.reshape(*y.shape[:-1], -1, group)  # [..., G, g]
    damage = (y * 0).sum(axis=-1, keepdims=True)  # 0 or NaN
    step = _step(y, bits, rule)
    codes = mx.where(step > 0, _codes(y, step, bits, rule), 1 << (bits - 1))
    scale = _stored(y, codes, step, bits, rule)
    codes = mx.where(damage == 0, codes, 0).astype(mx.uint32)
    return codes.flatten(-2), (scale + damage).astype(mx.float16).squeeze(-1)


def tried(group: int, bits: int = 4) -> tuple[float, float]:
    """Fractions of the abs-max scale that are tried for groups of this size (scripts/studies). The
    first of them finds the codes of vectors that were quantized before: at 3 bits any above 5/6
    does, at 4 bits above 13/14, at 5 bits above 29/30."""
    if bits == 3:
        if group <= 32:
            return 0.92, 0.80
        return (0.86, 0.76) if group <= 64 else (0.84, 0.70)
    if bits == 5:
        if group <= 32:
            return 1.0, 0.97
        return (1.0, 0.96) if group <= 64 else (0.98, 0.94)
    if group <= 32:
        return 1.0, 0.94
    return (0.96, 0.89) if group <= 64 else (0.93, 0.86)


def _to_half(s: mx.array) -> mx.array:
    return mx.minimum(s, HALF_MAX).astype(mx.float16).astype(mx.float32)


def _covering(top: mx.array, levels: float) -> mx.array:
    """The fp16 scale of which ``levels`` reach ``top``, rounded up: rounded down, the smallest
    scales would clip the largest channel by a third."""
    scale = mx.ceil(top * (1 / levels / _LEAST)) * _LEAST
    return mx.where(top >= _LEAST, _to_half(scale), 0.0)


def _step(y: mx.array, bits: int, rule: str) -> mx.array:
    """The scale that rounds groups [..., g], fp32 [..., 1]. A searched one need not be a number of
    fp16: :func:`_stored` replaces it."""
    middle = 1 << (bits - 1)
    top = mx.abs(y).max(axis=-1, keepdims=True)
    if rule == "paper":
        return _covering(top, middle - 1)
    if rule == "absmax" or bits == 8:
        return _covering(top, middle - 0.5)
    steps = top * mx.array([c / (middle - 0.5) for c in tried(y.shape[-1], bits)])  # [..., 2]
    steps = mx.where(top > (middle - 0.5) * _LEAST_SEARCHED, steps, 0.0)
    # The one whose levels point more in the direction of y.
    x, s = y[..., None, :], steps[..., None]
    levels = _codes(x, s, bits, rule) - zero_code(bits, rule)
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
    """The scale that is stored with the codes of groups [..., g]. For a searched step it gives the
    decoded group the length of y."""
    if rule != "search" or bits == 8:
        return step
    levels = mx.square(codes - zero_code(bits, rule)).sum(axis=-1, keepdims=True)
    length = mx.sqrt(mx.square(y).sum(axis=-1, keepdims=True) / levels)
    return mx.where(step > 0, _to_half(length), 0.0)


def quantize_with_feedback(
    y: mx.array, bits: int, group: int, rule: str, G: mx.array
) -> tuple[mx.array, mx.array]:
    """:func:`quantize` for y fp32 [B, H, L, D] with the error feedback of G fp32 [H, D, D]
    (:mod:`mlx_kvq.format.feedback`): blocks of channels are rounded from the last to the first,
    each making up for the errors so far."""
    D, block = y.shape[-1], feedback.BLOCK
    middle = zero_code(bits, rule)
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
        whole = asked(end - group, end)
        step = _step(whole, bits, rule)
        # A group of zeros, or a damaged one, has nothing to pass on.
        step = mx.where((whole * 0).sum(axis=-1, keepdims=True) == 0, step, 0.0)
        known = errors
        targets: list[mx.array] = []
        rounded: list[mx.array] = []
        for j in range(end - block, end - group - 1, -block):
            targets.insert(0, asked(j, j + block))
            rounded.insert(0, _codes(targets[0], step, bits, rule))
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
    """Codes uint32 [..., D] -> words uint32 [..., D * bits / 32], lowest bits first; codes of 3
    bits take 4 each, codes of 5 bits 8 (:func:`narrowed`)."""
    codes = codes.astype(mx.uint8)
    if bits < 5:
        codes = codes[..., ::2] | (codes[..., 1::2] << 4)
    return codes.view(mx.uint32)


def unpack_codes(words: mx.array, bits: int) -> mx.array:
    """Words uint32 [..., n] -> codes fp32 [..., 32 * n / bits]."""
    shifts = bits * mx.arange(32 // bits, dtype=mx.uint32)
    codes = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2).astype(mx.float32)


# Of a word of codes of 4 bits (3) and of 8 bits (5): low bits, high bits, and what wide codes are
# larger by.
_LOW = {3: 0x33333333, 5: 0x0F0F0F0F}
_HIGH = {3: 0x44444444, 5: 0x10101010}
_MORE = {3: 0x44444444, 5: 0x70707070}


def narrowed(words: mx.array, bits: int) -> tuple[mx.array, mx.array]:
    """3- and 5-bit codes, words uint32 [..., 2 n] and [..., 4 n] of :func:`pack_codes`, as rows
    store them: their low bits uint32 [..., n] and [..., 2 n], their high bits uint16 [..., n]."""
    step = 2 if bits == 3 else 4
    of_unit = [words[..., w::step] for w in range(step)]
    shifted = [_shifted(x & _HIGH[bits], 2 * w - step) for w, x in enumerate(of_unit)]
    high = reduce(mx.bitwise_or, shifted)
    high = ((high | (high >> 15)) & 0xFFFF).astype(mx.uint16)
    pairs = [x & _LOW[bits] for x in (words[..., ::2], words[..., 1::2])]
    return pairs[0] | (pairs[1] << step), high


def _widened(low: mx.array, high: mx.array, bits: int) -> mx.array:
    """The other way round, into wider codes with the same levels: uint32 [..., 2 n] of 4 bits,
    [..., 4 n] of 8 bits."""
    step = 2 if bits == 3 else 4
    h = high.astype(mx.uint32)
    h = h | (h << 15)
    pairs = mx.stack([low & _LOW[bits], (low >> step) & _LOW[bits]], axis=-1).flatten(-2)
    highs = [_shifted(h, step - 2 * w) & _HIGH[bits] for w in range(step)]
    return (pairs | mx.stack(highs, axis=-1).flatten(-2)) + _MORE[bits]


def _shifted(x: mx.array, by: int) -> mx.array:
    return x << by if by > 0 else x >> -by


def widened(rows: mx.array, lay: RowLayout) -> mx.array:
    """Rows uint32 [..., W] as rows of ``lay.wide``, which may be these themselves."""
    if lay.wide is lay:
        return rows
    low = rows[..., : lay.k_words], rows[..., lay.k_words : lay.high_word]
    at = 2 * lay.high_word
    halves = rows.view(mx.uint16)[..., at : at + lay.k_halves + lay.v_halves]
    high = halves[..., : lay.k_halves], halves[..., lay.k_halves :]
    codes = [
        _widened(a, b, bits) if is_narrow(bits) else a
        for a, b, bits in zip(low, high, (lay.k_bits, lay.v_bits), strict=True)
    ]
    return mx.concatenate([*codes, rows[..., lay.codes_words :]], axis=-1)


def joined(codes: Sequence[mx.array], scales: Sequence[mx.array], bits: Sequence[int]) -> mx.array:
    """Keys' and values' codes, words of :func:`pack_codes`, and their fp16 scales -> rows."""
    words: list[mx.array] = []
    high: list[mx.array] = []
    for of_side, b in zip(codes, bits, strict=True):
        low, halves = narrowed(of_side, b) if is_narrow(b) else (of_side, None)
        words.append(low)
        if halves is not None:
            high.append(halves)
    return mx.concatenate([*words, *_whole(high), *_whole(scales)], axis=-1)


def _whole(halves: Sequence[mx.array]) -> list[mx.array]:
    """Arrays of 16 bits [..., n] in words, one array or none; a zero half pads an odd count."""
    if not halves:
        return []
    n, first = sum(a.shape[-1] for a in halves), halves[0]
    padding = [mx.zeros((*first.shape[:-1], 1), first.dtype)] * (n % 2)
    return [mx.concatenate([*halves, *padding], axis=-1).view(mx.uint32)]


def split(rows: mx.array, lay: RowLayout) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """rows [..., W] -> K codes, V codes (words) and K scales, V scales (fp16), all views; 3-
    and 5-bit codes as the 4- and 8-bit codes that they are read as."""
    rows, lay = widened(rows, lay), lay.wide
    halves, first = rows.view(mx.float16), 2 * lay.codes_words
    return (
        rows[..., : lay.k_words],
        rows[..., lay.k_words : lay.codes_words],
        halves[..., first : first + lay.k_scales],
        halves[..., first + lay.k_scales : first + lay.k_scales + lay.v_scales],
    )


def zero_code(bits: int, rule: str) -> float:
    """The level of code 0 is minus this many scales."""
    return (1 << (bits - 1)) - (0.0 if rule == "paper" else 0.5)


def read_levels(words: mx.array, scales: mx.array, bits: int, group: int, rule: str) -> mx.array:
    """Codes and scales -> fp32 [..., D]."""
    levels = unpack_codes(words, bits) - zero_code(bits, rule)
    levels = levels.reshape(*levels.shape[:-1], -1, group)
    return (levels * scales.astype(mx.float32)[..., None]).flatten(-2)
