"""The mathematics of the cache in float64 numpy: what every backend is compared with.

Written from the design alone and by direct definition, so that it shares no code, and no mistake,
with the package. Slow on purpose: nothing here is fused, folded or reordered.

Shapes: B batch, Hq query heads, Hkv = H key/value heads, L queries, T positions, D head dimension
(Dk for keys, Dv for values), G = D / group_size groups, W words per row.
Source: arXiv 2605.05699; the centre, the balanced scale and the half-step levels are the project's.
"""

import math

import numpy as np

KEYS, VALUES = 0, 1  # the streams of `signs`
# Bits -> group size up to -> fractions.
SEARCH = {
    3: {32: (0.92, 0.80), 64: (0.86, 0.76), math.inf: (0.84, 0.70)},
    4: {32: (1.0, 0.94), 64: (0.96, 0.89), math.inf: (0.93, 0.86)},
    5: {32: (1.0, 0.97), 64: (1.0, 0.96), math.inf: (0.98, 0.94)},
}
FP16_MAX, FP16_LEAST = 65504.0, 2.0**-24
MASK64 = 2**64 - 1


def signs(seed: int, stream: int, D: int) -> np.ndarray:
    """[D] of +-1.0: the top bits of splitmix64 started at 2 * seed + stream (1 means -1)."""
    state = (2 * int(seed) + int(stream)) & MASK64
    out = np.empty(D)
    for i in range(D):
        state = (state + 0x9E3779B97F4A7C15) & MASK64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
        z ^= z >> 31
        out[i] = -1.0 if z >> 63 else 1.0
    return out


def rotate(x, rotation: str, seed: int, stream: int) -> np.ndarray:
    """R x over the last axis: [..., D] -> [..., D]. "srft" needs an even D, "srht" a power of 2."""
    x = np.asarray(x, np.float64)
    D = x.shape[-1]
    _check_rotation(rotation, D)
    if rotation == "none":
        return x.copy()
    z = x * signs(seed, stream, D)
    if rotation == "srht":
        return z @ _hadamard(D)  # symmetric
    X = np.fft.rfft(z, axis=-1) / np.sqrt(D)
    y = np.empty_like(z)
    y[..., 0] = X[..., 0].real
    y[..., 1] = X[..., D // 2].real
    y[..., 2::2] = np.sqrt(2) * X[..., 1 : D // 2].real
    y[..., 3::2] = np.sqrt(2) * X[..., 1 : D // 2].imag
    return y


def unrotate(y, rotation: str, seed: int, stream: int) -> np.ndarray:
    """R^T y over the last axis, the inverse of `rotate`: [..., D] -> [..., D]."""
    y = np.asarray(y, np.float64)
    D = y.shape[-1]
    _check_rotation(rotation, D)
    if rotation == "none":
        return y.copy()
    if rotation == "srht":
        return (y @ _hadamard(D)) * signs(seed, stream, D)
    X = np.zeros((*y.shape[:-1], D // 2 + 1), np.complex128)
    X[..., 0] = y[..., 0]
    X[..., D // 2] = y[..., 1]
    X[..., 1 : D // 2] = (y[..., 2::2] + 1j * y[..., 3::2]) / np.sqrt(2)
    return np.fft.irfft(X * np.sqrt(D), n=D, axis=-1) * signs(seed, stream, D)


def _check_rotation(rotation: str, D: int) -> None:
    if rotation not in ("srft", "srht", "none"):
        raise ValueError(f"rotation is {rotation!r}; accepted: 'srft', 'srht', 'none'")
    if rotation == "srft" and (D < 2 or D % 2):
        raise ValueError(f"srft needs an even D, got {D}")
    if rotation == "srht" and (D < 1 or D & (D - 1)):
        raise ValueError(f"srht needs D to be a power of 2, got {D}")


def _hadamard(D: int) -> np.ndarray:
    """[D, D] orthonormal, Sylvester's order: (-1)^(number of common 1 bits of row and column)."""
    index = range(D)
    return np.array([[(-1.0) ** (i & j).bit_count() for j in index] for i in index]) / np.sqrt(D)


def _per_head(parameter, default: float) -> np.ndarray:
    """[H, D] -> [H, 1, D], to broadcast against [B, H, T, D]; None -> default, others as given."""
    parameter = np.asarray(default if parameter is None else parameter, np.float64)
    return parameter[:, None, :] if parameter.ndim == 2 else parameter


def forward(x, rotation: str, seed: int, stream: int, mu=None, sigma=None, lam=None) -> np.ndarray:
    """lam * R((x - mu) / sigma): x [B, H, T, D], parameters [H, D] or None -> [B, H, T, D]."""
    x = np.asarray(x, np.float64)
    z = (x - _per_head(mu, 0.0)) / _per_head(sigma, 1.0)
    return _per_head(lam, 1.0) * rotate(z, rotation, seed, stream)


def backward(y, rotation: str, seed: int, stream: int, mu=None, sigma=None, lam=None) -> np.ndarray:
    """The inverse of `forward`: (R^T(y / lam)) * sigma + mu, [B, H, T, D] -> [B, H, T, D]."""
    y = np.asarray(y, np.float64)
    x = unrotate(y / _per_head(lam, 1.0), rotation, seed, stream)
    return x * _per_head(sigma, 1.0) + _per_head(mu, 0.0)


def _fp16(x: np.ndarray) -> np.ndarray:
    """x >= 0 rounded to fp16 (to nearest, ties to even), saturated at 65504, as float64."""
    return np.minimum(x, FP16_MAX).astype(np.float16).astype(np.float64)


def _covering(largest: np.ndarray, levels: float) -> np.ndarray:
    """fp16 scales of which `levels` reach the largest channels; 0 for those below FP16_LEAST. Up to
    a multiple of FP16_LEAST, then to fp16."""
    scale = _fp16(np.ceil(largest / levels / FP16_LEAST) * FP16_LEAST)
    return np.where(largest < FP16_LEAST, 0.0, scale)


def _searched(largest: np.ndarray, fraction: float, bits: int = 4) -> np.ndarray:
    """A step that is tried; 0 where the abs-max one is none of fp16, rounded to the nearest."""
    outermost = _offset(bits, "search")
    return np.where(_fp16(largest / outermost) == 0, 0.0, fraction * largest / outermost)


def _offset(bits: int, rule: str) -> float:
    """The code, as a real number, that stands for 0."""
    if bits not in (3, 4, 5, 8):
        raise ValueError(f"bits is {bits}; accepted: 3, 4, 5, 8")
    if rule not in ("search", "absmax", "paper"):
        raise ValueError(f"rule is {rule!r}; accepted: 'search', 'absmax', 'paper'")
    return 2.0 ** (bits - 1) - (0.0 if rule == "paper" else 0.5)


def _encode(y: np.ndarray, scale: np.ndarray, bits: int, rule: str) -> np.ndarray:
    """Codes, int64 [..., G, g], of finite y [..., G, g] under finite scales [..., G, 1]."""
    middle, top = 2 ** (bits - 1), 2**bits - 1
    ratio = y / np.where(scale == 0, 1.0, scale)
    if rule == "paper":
        n = np.clip(np.rint(ratio) + middle, 1, top)
    else:
        n = np.clip(np.floor(ratio) + middle, 0, top)
    return np.where(scale == 0, middle, n).astype(np.int64)


def tried(group_size: int, bits: int = 4) -> tuple[float, float]:
    """Of the abs-max scale, for groups of this size."""
    return next(fractions for size, fractions in SEARCH[bits].items() if group_size <= size)


def _cosine(y: np.ndarray, n: np.ndarray, bits: int = 4) -> np.ndarray:
    """Of the angle between y [..., G, g] and the levels of its half-step codes n, [..., G, 1]; 1
    for zeros."""
    levels = n - _offset(bits, "search")
    lengths = np.linalg.norm(y, axis=-1, keepdims=True) * np.linalg.norm(
        levels, axis=-1, keepdims=True
    )
    return np.where(
        lengths == 0,
        1.0,
        (y * levels).sum(axis=-1, keepdims=True) / np.where(lengths == 0, 1.0, lengths),
    )


def _length_scale(y: np.ndarray, n: np.ndarray, bits: int = 4) -> np.ndarray:
    """The scale [..., G, 1] at which half-step codes n of y [..., G, g] have y's length."""
    levels = n - _offset(bits, "search")
    return np.sqrt((y**2).sum(axis=-1, keepdims=True) / (levels**2).sum(axis=-1, keepdims=True))


def quantize(y, bits: int, group_size: int, rule: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round y [..., D] in groups of group_size neighbours.

    Returns codes (int64 [..., D]), scales (float64 [..., G], each an fp16 number) and
    values (float64 [..., D]).

    rule "absmax": scale = fp16(max|y| / 7.5), value = scale * (n - 7.5), n = 0 ... 15; for 8 bits
    127.5 and 0 ... 255, for 3 bits 3.5 and 0 ... 7, for 5 bits 15.5 and 0 ... 31. "search": for 4
    bits the scale c * max|y| / 7.5, c in `SEARCH`, under which y and n - 7.5 enclose the smallest
    angle, the first on ties, gives the codes, and the scale that is stored is fp16(|y| / |n -
    7.5|), Euclidean norms of the group; for 3 bits with 3.5, for 5 bits with 15.5; for 8 bits the
    same as "absmax". "paper": scale = fp16(max|y| / 7), value = scale * (n - 8), n = 1 ... 15; for
    8 bits 127, 128, 1 ... 255, for 3 bits 3, 4, 1 ... 7, for 5 bits 15, 16, 1 ... 31.

    A scale beyond fp16 is 65504. One of "absmax" and "paper" is rounded up to a multiple of 2^-24,
    fp16's smallest number, first, and is 0 where max|y| is below that; a searched one is 0 where
    fp16(max|y| / 7.5) is. A scale of 0 gives code 8 (128, 4, 16) and value 0. A group with a NaN
    or an infinity has scale NaN, codes 0 and values NaN.
    """
    y = np.asarray(y, np.float64)
    offset = _offset(bits, rule)
    D = y.shape[-1]
    if D % group_size:
        raise ValueError(f"group_size {group_size} does not divide D = {D}")
    groups = y.reshape(*y.shape[:-1], D // group_size, group_size)
    broken = ~np.isfinite(groups).all(axis=-1, keepdims=True)
    groups = np.where(broken, 0.0, groups)

    largest = np.abs(groups).max(axis=-1, keepdims=True)
    top_level = offset - 1.0 if rule == "paper" else offset
    scale = _covering(largest, top_level)
    codes = _encode(groups, scale, bits, rule)
    if rule == "search" and bits != 8:
        steps = [_searched(largest, c, bits) for c in tried(group_size, bits)]
        found = [_encode(groups, step, bits, rule) for step in steps]
        first, second = (_cosine(groups, n, bits) for n in found)
        codes = np.where(second > first, found[1], found[0])
        scale = np.where(steps[0] == 0, 0.0, _fp16(_length_scale(groups, codes, bits)))
    codes = np.where(broken, 0, codes)
    scale = np.where(broken, np.nan, scale)
    values = scale * (codes - offset)
    return codes.reshape(y.shape), scale[..., 0], values.reshape(y.shape)


def fake_quantize(
    x,
    bits: int,
    group_size: int,
    rule: str,
    rotation: str,
    seed: int,
    stream: int,
    mu=None,
    sigma=None,
    lam=None,
) -> np.ndarray:
    """What the cache remembers of x, in the original domain: [B, H, T, D] -> [B, H, T, D]."""
    y = forward(x, rotation, seed, stream, mu, sigma, lam)
    _, _, y_hat = quantize(y, bits, group_size, rule)
    return backward(y_hat, rotation, seed, stream, mu, sigma, lam)


LOW = {3: 2, 5: 4}  # bits of narrow codes -> bits that are among a row's codes


def _code_words(D: int, bits: int) -> int:
    """Words of D codes; of narrow codes those of their low bits."""
    bits = LOW.get(bits, bits)
    if D * bits % 32:
        raise ValueError(f"D = {D} codes of {bits} bits do not fill whole 32-bit words")
    return D * bits // 32


def _high_words(dims: tuple[int, int], bits: tuple[int, int]) -> int:
    """Words of the high bits of narrow codes, 16 to a half, both sides together."""
    return (sum(D // 16 for D, b in zip(dims, bits, strict=True) if b in LOW) + 1) // 2


def row_words(Dk: int, Dv: int, k_bits: int, v_bits: int, k_group: int, v_group: int) -> int:
    """W: the uint32 words of one row."""
    if Dk % k_group or Dv % v_group:
        raise ValueError(f"groups ({k_group}, {v_group}) do not divide Dk, Dv = ({Dk}, {Dv})")
    scales = Dk // k_group + Dv // v_group
    codes = _code_words(Dk, k_bits) + _code_words(Dv, v_bits)
    return codes + _high_words((Dk, Dv), (k_bits, v_bits)) + (scales + 1) // 2


def _join(fields: np.ndarray, bits: int, word: int = 32) -> np.ndarray:
    """Unsigned fields [..., N] -> uint32 [..., N * bits / word], the first field lowest."""
    if ((fields < 0) | (fields >= 2**bits)).any():
        raise ValueError(f"a code is outside 0 ... {2**bits - 1}")
    per_word = word // bits
    fields = fields.astype(np.uint64).reshape(*fields.shape[:-1], -1, per_word)
    shifts = bits * np.arange(per_word, dtype=np.uint64)
    return (fields << shifts).sum(axis=-1, dtype=np.uint64).astype(np.uint32)


def _split(words: np.ndarray, bits: int, word: int = 32) -> np.ndarray:
    """The inverse of `_join`: uint32 [..., N * bits / word] -> uint32 [..., N]."""
    shifts = bits * np.arange(word // bits, dtype=np.uint32)
    fields = (words[..., None] >> shifts) & np.uint32(2**bits - 1)
    return fields.reshape(*words.shape[:-1], -1)


def _places(D: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Of narrow codes [D]: the bit at which the low ones begin, counted through a side's words, and
    that of the high one, counted through its halves."""
    c = np.arange(D)
    unit = c // 16
    if bits == 3:
        w, n = c // 8 % 2, c % 8
        return 32 * unit + 4 * n + 2 * w, 16 * unit + 4 * (n % 4) + n // 4 + 2 * w
    w, n = c // 4 % 4, c % 4
    low = 64 * unit + 32 * (w // 2) + 8 * n + 4 * (w % 2)
    return low, 16 * unit + 8 * (n % 2) + n // 2 + 2 * w


def _join_narrow(codes: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Narrow codes [..., D] -> their low bits, uint32 words, and high ones, [..., D / 16] of 16
    bits."""
    if ((codes < 0) | (codes >= 2**bits)).any():
        raise ValueError(f"a code is outside 0 ... {2**bits - 1}")
    D = codes.shape[-1]
    low_at, high_at = _places(D, bits)
    low = np.zeros((*codes.shape[:-1], LOW[bits] * D), np.uint8)
    for i in range(LOW[bits]):
        low[..., low_at + i] = codes >> i & 1
    high = np.zeros(codes.shape, np.uint8)
    high[..., high_at] = codes >> LOW[bits]
    return _join(low, 1), _join(high.reshape(*codes.shape[:-1], -1, 16), 1, 16)[..., 0]


def _split_narrow(low: np.ndarray, high: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `_join_narrow`."""
    low_at, high_at = _places(16 * high.shape[-1], bits)
    low = _split(low, 1)
    high = _split(high[..., None], 1, 16).reshape(*low.shape[:-1], -1)
    found = (low[..., low_at + i] << i for i in range(LOW[bits]))
    return sum(found, high[..., high_at] << LOW[bits])


def _padded(halves: np.ndarray) -> np.ndarray:
    """Halves [..., n] in words; a zero half last when their count is odd."""
    if halves.shape[-1] % 2:
        halves = np.concatenate([halves, np.zeros_like(halves[..., :1])], axis=-1)
    return _join(halves, 16)


def pack_row(k_codes, k_scales, v_codes, v_scales, k_bits: int, v_bits: int) -> np.ndarray:
    """uint32 [..., W], laid out K codes | V codes | high bits | K scales | V scales.

    codes [..., D], 32 / bits to a word, lowest bits first; scales [..., G], fp16 numbers, K's then
    V's without a gap, two to a word, low half first, a zero half last when their count is odd.
    Codes of 3 and 5 bits have two and four bits among the codes and one among the high bits, K's
    then V's, which are padded likewise (`_places`).
    """
    words, highs = [], []
    for codes, bits in ((k_codes, k_bits), (v_codes, v_bits)):
        codes = _code_array(codes, bits)
        if bits in LOW:
            low, high = _join_narrow(codes, bits)
            words.append(low)
            highs.append(high)
        else:
            words.append(_join(codes, bits))
    if highs:
        words.append(_padded(np.concatenate(highs, axis=-1)))
    scales = np.concatenate([np.asarray(k_scales), np.asarray(v_scales)], axis=-1)
    halves = scales.astype(np.float16)
    if not np.array_equal(halves.astype(np.float64), scales, equal_nan=True):
        raise ValueError("a scale is not an fp16 number; take the scales of `quantize`")
    return np.concatenate([*words, _padded(halves.view(np.uint16))], axis=-1)


def unpack_codes(rows, Dk: int, Dv: int, k_bits: int, v_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """uint32 rows [..., W] -> codes (int64 [..., Dk], int64 [..., Dv])."""
    rows = np.asarray(rows, np.uint32)
    high_at = _code_words(Dk, k_bits) + _code_words(Dv, v_bits)
    highs = _split(rows[..., high_at:], 16)
    found, word, half = [], 0, 0
    for D, bits in ((Dk, k_bits), (Dv, v_bits)):
        words = rows[..., word : word + _code_words(D, bits)]
        word += _code_words(D, bits)
        if bits in LOW:
            found.append(_split_narrow(words, highs[..., half : half + D // 16], bits))
            half += D // 16
        else:
            found.append(_split(words, bits))
    k_codes, v_codes = (codes.astype(np.int64) for codes in found)
    return k_codes, v_codes


def _code_array(codes, bits: int) -> np.ndarray:
    codes = np.asarray(codes)
    _code_words(codes.shape[-1], bits)
    return codes.astype(np.int64)


def unpack_row(
    rows, Dk: int, Dv: int, k_bits: int, v_bits: int, k_group: int, v_group: int, rule: str
) -> tuple[np.ndarray, np.ndarray]:
    """uint32 rows [..., W] -> rotated-domain values (float64 [..., Dk], float64 [..., Dv])."""
    rows = np.asarray(rows, np.uint32)
    W = row_words(Dk, Dv, k_bits, v_bits, k_group, v_group)
    if rows.shape[-1] != W:
        raise ValueError(f"rows have {rows.shape[-1]} words; this layout has {W}")
    k_groups, v_groups = Dk // k_group, Dv // v_group
    halves = _split(rows[..., W - (k_groups + v_groups + 1) // 2 :], 16).astype(np.uint16)
    scales = halves.view(np.float16).astype(np.float64)
    k_codes, v_codes = unpack_codes(rows, Dk, Dv, k_bits, v_bits)

    def decode(codes, scales, bits, group):
        return np.repeat(scales, group, axis=-1) * (codes - _offset(bits, rule))

    k_scales, v_scales = scales[..., :k_groups], scales[..., k_groups : k_groups + v_groups]
    k_values = decode(k_codes, k_scales, k_bits, k_group)
    v_values = decode(v_codes, v_scales, v_bits, v_group)
    return k_values, v_values


def _heads(x: np.ndarray, Hq: int) -> np.ndarray:
    """[B, Hkv, ...] -> [B, Hq, ...]: query head h uses KV head h // (Hq // Hkv)."""
    Hkv = x.shape[1]
    if Hq % Hkv:
        raise ValueError(f"{Hq} query heads are not a multiple of {Hkv} KV heads")
    return np.repeat(x, Hq // Hkv, axis=1)


def _softmax(logits: np.ndarray, mask, sinks) -> np.ndarray:
    """Masked logits [B, Hq, L, T] -> probabilities [B, Hq, L, T]; with sinks they sum to < 1."""
    B, Hq, L, T = logits.shape
    if isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f"mask is {mask!r}; accepted: None, 'causal', a bool or float array")
        mask = np.arange(T) <= T - L + np.arange(L)[:, None]  # [L, T]
    if mask is not None:
        mask = np.asarray(mask)
        if mask.dtype == bool:
            logits = np.where(mask, logits, -np.inf)
        elif np.issubdtype(mask.dtype, np.floating):
            logits = logits + mask.astype(np.float64)
        else:
            raise ValueError(f"mask has dtype {mask.dtype}; accepted: bool (True attends), floats")
        if logits.shape != (B, Hq, L, T):
            raise ValueError(f"mask {mask.shape} does not broadcast to {(B, Hq, L, T)}")
    if sinks is not None:
        column = np.asarray(sinks, np.float64).reshape(1, Hq, 1, 1)
        logits = np.concatenate([logits, np.broadcast_to(column, (B, Hq, L, 1))], axis=-1)
    with np.errstate(invalid="ignore"):  # -inf - -inf: a row without any position
        p = np.exp(logits - logits.max(axis=-1, keepdims=True))
        p = p / p.sum(axis=-1, keepdims=True)
    return p[..., :T]


def attend(
    q,
    k_hat,
    v_hat,
    scale: float,
    *,
    rotation: str,
    seed: int,
    mask=None,
    sinks=None,
    k_params=(None, None, None),
    v_params=(None, None, None),
    exact=None,
) -> np.ndarray:
    """Attention in the rotated domain: nothing stored is ever inverted.

    q [B, Hq, L, Dk] in the original domain; k_hat [B, Hkv, T, Dk] and v_hat [B, Hkv, T, Dv] in the
    rotated one; k_params and v_params (mu, sigma, lam), each [Hkv, D] or None. mask: None, "causal"
    (the queries are the last L of the T positions), bool (True attends) or additive, broadcastable
    to [B, Hq, L, T]. sinks: None or [Hq], logits of one more softmax column that has no value.
    Returns [B, Hq, L, Dv] in the original domain.

    With sinks the softmax is not invariant to a shift of the positions' logits, so scale * q . mu_k
    comes back, and the probabilities sum to P < 1, so the value centre counts P times, not once:
    sum p (v + mu) = sum p v + P mu. Without sinks P = 1.

    A query all of whose positions are masked gives NaN, unless there are sinks (then P = 0 and the
    output is 0). A masked position still has p = 0 times its value, so a NaN value shows.

    exact: None, or (k, v, reads): the vectors before rounding, of the shapes of k_hat and v_hat,
    and bool [L, T] or [B, L, T], where a query takes them in place of k_hat and v_hat.
    """
    q, k_hat, v_hat = (np.asarray(a, np.float64) for a in (q, k_hat, v_hat))
    Hq, Hkv = q.shape[1], k_hat.shape[1]

    def per_query_head(parameter, default, D):
        full = np.broadcast_to(_per_head(parameter, default), (1, Hkv, 1, D))
        return _heads(full, Hq)

    Dk, Dv = k_hat.shape[-1], v_hat.shape[-1]
    defaults = (0.0, 1.0, 1.0)
    mu_k, sigma_k, lam_k = (
        per_query_head(p, d, Dk) for p, d in zip(k_params, defaults, strict=True)
    )
    mu_v, sigma_v, lam_v = (
        per_query_head(p, d, Dv) for p, d in zip(v_params, defaults, strict=True)
    )

    q_rotated = rotate(q * sigma_k, rotation, seed, KEYS) / lam_k
    if exact is None:
        exact = k_hat, v_hat, np.zeros((len(q), q.shape[2], k_hat.shape[2]), bool)
    *whole, reads = exact
    reads = np.broadcast_to(reads, (len(q), q.shape[2], k_hat.shape[2]))
    read = [  # by each query: keys [B, Hq, T, Dk], values [B, Hq, T, Dv]
        [
            _heads(np.where(reads[:, None, i, :, None], x, x_hat), Hq)
            for x, x_hat in zip(whole, (k_hat, v_hat), strict=True)
        ]
        for i in range(q.shape[2])
    ]
    logits = scale * np.stack(
        [np.einsum("bhd,bhtd->bht", q_rotated[:, :, i], k) for i, (k, _) in enumerate(read)], axis=2
    )
    if sinks is not None:
        logits = logits + scale * (q * mu_k).sum(axis=-1, keepdims=True)
    p = _softmax(logits, mask, sinks)
    mixed = np.stack(
        [np.einsum("bht,bhtd->bhd", p[:, :, i], v) for i, (_, v) in enumerate(read)], axis=2
    )
    out = unrotate(mixed / lam_v, rotation, seed, VALUES) * sigma_v
    return out + p.sum(axis=-1, keepdims=True) * mu_v


def attend_exact(q, k, v, scale: float, mask=None, sinks=None) -> np.ndarray:
    """Plain attention: q [B, Hq, L, Dk], k [B, Hkv, T, Dk], v [B, Hkv, T, Dv] -> [B, Hq, L, Dv].

    mask and sinks as in `attend`; a query all of whose positions are masked gives NaN without sinks
    and 0 with them.
    """
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    Hq = q.shape[1]
    logits = scale * np.einsum("bhld,bhtd->bhlt", q, _heads(k, Hq))
    p = _softmax(logits, mask, sinks)
    return np.einsum("bhlt,bhtd->bhld", p, _heads(v, Hq))
