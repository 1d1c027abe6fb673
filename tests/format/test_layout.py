"""The packed row: where its parts are, how long it is, and which groups a head size takes."""

import struct

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_kvq.format import levels
from mlx_kvq.format.layout import RowLayout, choose_group
from tests.support import oracle

# (Dk, Dv, k_bits, v_bits, k_group, v_group): K words, V words, K scales, V scales, W, bits a value
# fmt: off
ROWS = {
    (128, 128, 4, 4, 32, 32): (16, 16, 4, 4, 36, 4.5),  # 144 bytes, as in the design
    (128, 128, 4, 4, 64, 64): (16, 16, 2, 2, 34, 4.25),  # 136 bytes
    (128, 128, 4, 4, 128, 128): (16, 16, 1, 1, 33, 4.125),
    (128, 128, 8, 8, 32, 32): (32, 32, 4, 4, 68, 8.5),
    (128, 128, 8, 4, 32, 32): (32, 16, 4, 4, 52, 6.5),
    (64, 64, 4, 4, 8, 8): (8, 8, 8, 8, 24, 6.0),
    (80, 80, 4, 4, 40, 40): (10, 10, 2, 2, 22, 4.4),
    (96, 96, 4, 4, 32, 32): (12, 12, 3, 3, 27, 4.5),
    (112, 112, 4, 4, 56, 56): (14, 14, 2, 2, 30, 30 / 7),
    (256, 256, 4, 4, 32, 32): (32, 32, 8, 8, 72, 4.5),
    (256, 256, 4, 4, 256, 256): (32, 32, 1, 1, 65, 4.0625),
    (192, 128, 4, 4, 32, 32): (24, 16, 6, 4, 45, 4.5),
    (192, 128, 8, 4, 64, 128): (48, 16, 3, 1, 66, 6.6),
    (192, 64, 4, 4, 64, 32): (24, 8, 3, 2, 35, 4.375),  # an odd number of scales: a half is spare
    (64, 128, 4, 4, 64, 64): (8, 16, 1, 2, 26, 4 + 1 / 3),
    (8, 8, 4, 4, 8, 8): (1, 1, 1, 1, 3, 6.0),
    (128, 128, 3, 3, 32, 32): (8, 8, 4, 4, 28, 3.5),  # 112 bytes, 8 words of them high bits
    (128, 128, 3, 3, 64, 64): (8, 8, 2, 2, 26, 3.25),
    (128, 128, 4, 3, 32, 32): (16, 8, 4, 4, 32, 4.0),
    (64, 64, 3, 3, 32, 32): (4, 4, 2, 2, 14, 3.5),
    (80, 80, 3, 3, 80, 80): (5, 5, 1, 1, 16, 3.2),
    (80, 80, 4, 3, 40, 80): (10, 5, 2, 1, 20, 4.0),  # 5 halves of high bits: one is spare
    (256, 256, 3, 3, 32, 32): (16, 16, 8, 8, 56, 3.5),
    (16, 16, 3, 3, 16, 16): (1, 1, 1, 1, 4, 4.0),
    (128, 128, 5, 4, 64, 64): (16, 16, 2, 2, 38, 4.75),  # 152 bytes, 4 words of them high bits
    (128, 128, 5, 5, 64, 64): (16, 16, 2, 2, 42, 5.25),
    (128, 128, 5, 5, 32, 32): (16, 16, 4, 4, 44, 5.5),
    (64, 64, 5, 4, 64, 64): (8, 8, 1, 1, 19, 4.75),
    (80, 80, 5, 4, 80, 80): (10, 10, 1, 1, 24, 4.8),  # 5 halves of high bits: one is spare
    (80, 80, 5, 5, 80, 80): (10, 10, 1, 1, 26, 5.2),
    (112, 112, 5, 4, 16, 112): (14, 14, 7, 1, 36, 36 / 7),
    (256, 256, 5, 4, 64, 64): (32, 32, 4, 4, 76, 4.75),
    (16, 16, 5, 5, 16, 16): (2, 2, 1, 1, 6, 6.0),
}
GROUPS = {
    # D: the default, then every possible group
    8: (8, [8]), 16: (16, [8, 16]), 24: (24, [8, 24]), 32: (32, [8, 16, 32]), 40: (40, [8, 40]),
    64: (64, [8, 16, 32, 64]), 72: (72, [8, 24, 72]), 80: (80, [8, 16, 40, 80]),
    96: (96, [8, 16, 24, 32, 48, 96]), 112: (112, [8, 16, 56, 112]),
    128: (64, [8, 16, 32, 64, 128]), 144: (72, [8, 16, 24, 48, 72, 144]),
    192: (64, [8, 16, 24, 32, 48, 64, 96, 192]), 256: (64, [8, 16, 32, 64, 128, 256]),
    576: (64, [8, 16, 24, 32, 48, 64, 72, 96, 144, 192, 288, 576]),
}
NARROW = {  # of 3 and 5 bits
    16: (16, [16]), 48: (48, [16, 48]), 64: (64, [16, 32, 64]), 80: (80, [16, 80]),
    96: (96, [16, 32, 48, 96]), 112: (112, [16, 112]), 128: (64, [16, 32, 64, 128]),
    144: (144, [16, 48, 144]), 256: (64, [16, 32, 64, 128, 256]),
}
# fmt: on


@pytest.mark.parametrize("sizes", ROWS)
def test_rows(sizes):
    lay = RowLayout(*sizes)
    k_words, v_words, k_scales, v_scales, words, bits = ROWS[sizes]
    assert (lay.k_words, lay.v_words) == (k_words, v_words)
    assert (lay.k_scales, lay.v_scales) == (k_scales, v_scales)
    assert lay.high_word == k_words + v_words
    high = [D // 16 if b in (3, 5) else 0 for D, b in zip(sizes[:2], sizes[2:4], strict=True)]
    assert [lay.k_halves, lay.v_halves] == high
    assert lay.codes_words == k_words + v_words + (sum(high) + 1) // 2
    assert lay.words == words
    assert lay.bits_per_value == pytest.approx(bits)
    wide = sizes[:2] + tuple({3: 4, 5: 8}.get(b, b) for b in sizes[2:4]) + sizes[4:]
    assert lay.wide == RowLayout(*wide) == lay.wide.wide
    assert (lay.wide is lay) == (not {3, 5} & set(sizes[2:4]))


@given(
    dims=st.tuples(st.integers(1, 40), st.integers(1, 40)).map(lambda d: (16 * d[0], 16 * d[1])),
    half=st.booleans(),
    bits=st.sampled_from(
        [(4, 4), (8, 8), (8, 4), (3, 3), (4, 3), (8, 3), (3, 4), (5, 4), (5, 5), (8, 5)]
    ),
    data=st.data(),
)
def test_rows_are_as_long_as_the_oracles_and_hold_everything(dims, half, bits, data):
    if half and not {3, 5} & set(bits):
        dims = tuple(D // 2 for D in dims)
    groups = [
        data.draw(st.sampled_from([g for g in range(1, D + 1) if D % g == g % least == 0]))
        for D, least in zip(dims, (16 if b in (3, 5) else 8 for b in bits), strict=True)
    ]
    lay = RowLayout(*dims, *bits, *groups)
    assert lay.words == oracle.row_words(*dims, *bits, *groups)
    halves = 2 * (lay.words - lay.codes_words) - lay.k_scales - lay.v_scales
    assert halves in (0, 1)  # a row wastes at most half a word


def decoded(row, D, bits, group):
    """Keys and values of a row of uint32 words, decoded as the module's text says, in Python's
    integers alone: half-step levels."""
    row = b"".join(struct.pack("<I", int(word)) for word in row)
    low, sides = 0, []
    for b in bits:
        sides.append((b, row[low : low + D * {3: 2, 5: 4}.get(b, b) // 8]))
        low += len(sides[-1][1])
    high = low
    for b in bits:
        low += D // 8 if b in (3, 5) else 0
    scale_at, found = low + low % 4, []
    for b, codes in sides:
        values = []
        for c in range(D):
            if b == 3:
                unit, w, n = c // 16, c // 8 % 2, c % 8
                word = int.from_bytes(codes[4 * unit : 4 * unit + 4], "little")
                half = int.from_bytes(row[high + 2 * unit : high + 2 * unit + 2], "little")
                code = word >> 4 * n + 2 * w & 3 | (half >> 4 * (n % 4) + n // 4 + 2 * w & 1) << 2
            elif b == 5:
                unit, w, n = c // 16, c // 4 % 4, c % 4
                at = 8 * unit + 4 * (w // 2)
                word = int.from_bytes(codes[at : at + 4], "little")
                half = int.from_bytes(row[high + 2 * unit : high + 2 * unit + 2], "little")
                top = half >> 8 * (n % 2) + n // 2 + 2 * w & 1
                code = word >> 8 * n + 4 * (w % 2) & 15 | top << 4
            else:
                code = codes[c * b // 8] >> (4 * (c % 2) if b == 4 else 0) & 2**b - 1
            (scale,) = struct.unpack_from("<e", row, scale_at + 2 * (c // group))
            values.append((code - (2**b - 1) / 2) * scale)
        high += D // 8 if b in (3, 5) else 0
        scale_at += 2 * (D // group)
        found.append(values)
    return found


@pytest.mark.parametrize("D, group", [(16, 16), (48, 16), (64, 32), (80, 80), (128, 32)])
@pytest.mark.parametrize(
    "bits", [(3, 3), (4, 3), (3, 8), (4, 4), (8, 4), (5, 4), (5, 5), (8, 5), (3, 5)]
)
def test_a_row_decoded_by_hand(D, group, bits):
    rng = np.random.default_rng(D)
    y = [mx.array(rng.standard_normal((3, D)).astype(np.float32)) for _ in bits]
    lay = RowLayout(D, D, *bits, group, group)
    coded = [levels.quantize(x, b, group, "search") for x, b in zip(y, bits, strict=True)]
    words = [levels.pack_codes(codes, b) for (codes, _), b in zip(coded, bits, strict=True)]
    rows = levels.joined(words, [scales for _, scales in coded], bits)
    assert rows.shape == (3, lay.words)
    kc, vc, ks, vs = levels.split(rows, lay)
    for row, *read in zip(
        np.array(rows),
        np.array(levels.read_levels(kc, ks, lay.wide.k_bits, group, "search")),
        np.array(levels.read_levels(vc, vs, lay.wide.v_bits, group, "search")),
        strict=True,
    ):
        assert np.array_equal(decoded(row, D, bits, group), read)
    # And by the codes: levels times scales.
    for (codes, scales), b, x in zip(coded, bits, (kc, vc), strict=True):
        want = np.array(codes, np.float32) + {3: 4, 5: 112}.get(b, 0)
        assert np.array_equal(levels.unpack_codes(x, {3: 4, 5: 8}.get(b, b)), want)
        assert scales.shape == (3, D // group)


@pytest.mark.parametrize("bits", [3, 4, 5, 8])
@pytest.mark.parametrize("D", GROUPS)
def test_choose_group(D, bits):
    narrow = bits in (3, 5)
    if narrow and D not in NARROW:
        return
    default, possible = (NARROW if narrow else GROUPS)[D]
    assert choose_group(D, None, bits) == default
    assert choose_group(D, None, bits, 32) == next(g for g in possible if g >= min(32, D))
    for g in range(8, D + 9, 8):
        if g in possible:
            assert choose_group(D, g, bits) == g
            continue
        with pytest.raises(ValueError) as info:
            choose_group(D, g, bits)
        fits = ", ".join(map(str, possible))
        want = f"group_size={g} does not divide head size {D} (possible: {fits})"
        if narrow and D % g == 0:
            want = (
                f"group_size={g} is not a multiple of 16, as {bits}-bit codes need "
                f"(possible for head size {D}: {fits})"
            )
        assert str(info.value) == want


@pytest.mark.parametrize("bits", [3, 5])
@pytest.mark.parametrize("D", [8, 24, 72, 120, 4104])
def test_head_sizes_that_narrow_codes_cannot_pack(D, bits):
    want = f"^head size {D} is not a multiple of 16 from 16 to 4096 for {bits}-bit codes$"
    with pytest.raises(ValueError, match=want):
        choose_group(D, None, bits)
    with pytest.raises(ValueError, match=want):
        RowLayout(64, D, 4, bits, 32, 8)


@pytest.mark.parametrize("D", [-8, 0, 4, 12, 60, 100, 127, 4104, 10**12])
@pytest.mark.parametrize("group", [None, 8])
def test_head_sizes_that_cannot_be_packed(D, group):
    with pytest.raises(ValueError, match=f"^head size {D} is not a multiple of 8 from 8 to 4096$"):
        choose_group(D, group)


@pytest.mark.parametrize("D", [True, 128.0, "128", None])
def test_a_head_size_is_a_whole_number(D):
    with pytest.raises(
        ValueError, match=f"^head size {D!r} is not a multiple of 8 from 8 to 4096$"
    ):
        choose_group(D, None)


@pytest.mark.parametrize("group", [True, 32.0, -8, 0, 10**12])
def test_a_group_is_a_whole_number(group):
    with pytest.raises(ValueError, match=f"^group_size={group} does not divide head size 128 "):
        choose_group(128, group)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((-8, 128, 4, 4, 32, 32), "head size -8 is not a multiple of 8 from 8 to 4096"),
        ((128, 10**12, 4, 4, 32, 32), f"head size {10**12} is not a multiple of 8 from 8 to 4096"),
        ((128, 128, 6, 4, 32, 32), "codes have 3, 4, 5 or 8 bits, not 6"),
        ((128, 128, 4, 8.0, 32, 32), "codes have 3, 4, 5 or 8 bits, not 8.0"),
        ((128, 128, 4, 4, 0, 32), "group_size=0 does not divide head size 128"),
        ((128, 128, 4, 4, 32, 7), "group_size=7 does not divide head size 128"),
        ((128, 128, 3, 4, 8, 32), "groups of 3-bit codes are multiples of 16, not 8"),
        ((128, 128, 5, 4, 8, 32), "groups of 5-bit codes are multiples of 16, not 8"),
        ((128, 128, 4, 4, None, 32), "group_size=None does not divide head size 128"),
    ],
)
def test_rows_that_cannot_be_laid_out(sizes, message):
    with pytest.raises(ValueError) as info:
        RowLayout(*sizes)
    assert str(info.value) == message
