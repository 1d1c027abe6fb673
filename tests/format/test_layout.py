"""The packed row: where its parts are, how long it is, and which groups a head size takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
# fmt: on


@pytest.mark.parametrize("sizes", ROWS)
def test_rows(sizes):
    lay = RowLayout(*sizes)
    k_words, v_words, k_scales, v_scales, words, bits = ROWS[sizes]
    assert (lay.k_words, lay.v_words) == (k_words, v_words)
    assert (lay.k_scales, lay.v_scales) == (k_scales, v_scales)
    assert lay.codes_words == k_words + v_words
    assert lay.words == words
    assert lay.bits_per_value == pytest.approx(bits)


@given(
    dims=st.tuples(st.integers(1, 40), st.integers(1, 40)).map(lambda d: (8 * d[0], 8 * d[1])),
    bits=st.sampled_from([(4, 4), (8, 8), (8, 4)]),
    data=st.data(),
)
def test_rows_are_as_long_as_the_oracles_and_hold_everything(dims, bits, data):
    groups = [data.draw(st.sampled_from([g for g in range(8, D + 1) if D % g == 0])) for D in dims]
    lay = RowLayout(*dims, *bits, *groups)
    assert lay.words == oracle.row_words(*dims, *bits, *groups)
    halves = 2 * (lay.words - lay.codes_words) - lay.k_scales - lay.v_scales
    assert halves in (0, 1)  # a row wastes at most half a word


@pytest.mark.parametrize("D", GROUPS)
def test_choose_group(D):
    default, possible = GROUPS[D]
    assert choose_group(D, None) == default
    for g in range(8, D + 9, 8):
        if g in possible:
            assert choose_group(D, g) == g
            continue
        with pytest.raises(ValueError) as info:
            choose_group(D, g)
        fits = ", ".join(map(str, possible))
        want = f"group_size={g} does not divide head size {D} (possible: {fits})"
        assert str(info.value) == want


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
        ((128, 128, 5, 4, 32, 32), "codes have 4 or 8 bits, not 5"),
        ((128, 128, 4, 8.0, 32, 32), "codes have 4 or 8 bits, not 8.0"),
        ((128, 128, 4, 4, 0, 32), "group_size=0 does not divide head size 128"),
        ((128, 128, 4, 4, 32, 7), "group_size=7 does not divide head size 128"),
        ((128, 128, 4, 4, None, 32), "group_size=None does not divide head size 128"),
    ],
)
def test_rows_that_cannot_be_laid_out(sizes, message):
    with pytest.raises(ValueError) as info:
        RowLayout(*sizes)
    assert str(info.value) == message
