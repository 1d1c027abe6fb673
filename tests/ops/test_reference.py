"""Properties of the reference backend that hold for any data."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mlx_kvq.format import levels as format_levels
from mlx_kvq.format import rotation
from mlx_kvq.format.format import make_format
from mlx_kvq.format.layout import is_narrow, read_bits
from mlx_kvq.format.spec import Spec
from mlx_kvq.format.transform import Calibration
from mlx_kvq.ops import plain as reference
from tests.support import calls, op_matrix, oracle

RULES = [(bits, rule) for bits in (3, 4, 5, 8) for rule in ("search", "absmax", "paper")]
any_rule = st.sampled_from(RULES)
some = settings(max_examples=60, deadline=None)


@st.composite
def vectors(draw, group=None):
    """fp32 [n, group] of multiples of 1/1024 below 1024; no group is all smaller than 1."""
    shape = (draw(st.integers(1, 4)), group or draw(st.sampled_from([8, 16, 24, 32])))
    y = draw(arrays(np.int32, shape, elements=st.integers(-(2**20), 2**20))) / 1024
    y[:, draw(st.integers(0, shape[1] - 1))] = draw(st.integers(2**10, 2**20)) / 1024
    return y.astype(np.float32)


def quantized(y, bits, rule):
    """Codes, scales and the values they stand for, by way of packed words."""
    codes, scales = format_levels.quantize(mx.array(y), bits, y.shape[-1], rule)
    words = format_levels.pack_codes(codes, bits)
    if is_narrow(bits) and y.shape[-1] % 16:  # half a unit: 16 channels are stored together
        words = words + format_levels._MORE[bits]
    elif is_narrow(bits):
        words = format_levels._widened(*format_levels.narrowed(words, bits), bits)
    values = format_levels.read_levels(words, scales, read_bits(bits), y.shape[-1], rule)
    return codes, scales, values


@given(st.data(), st.sampled_from([4, 8]), st.integers(1, 9))
def test_pack_and_unpack(data, bits, words):
    elements = st.integers(0, 2**bits - 1)
    codes = data.draw(arrays(np.uint32, (2, words * 32 // bits), elements=elements))
    packed = format_levels.pack_codes(mx.array(codes), bits)
    assert (packed.dtype, packed.shape) == (mx.uint32, (2, words))
    assert np.array_equal(packed, oracle._join(codes, bits))
    assert np.array_equal(format_levels.unpack_codes(packed, bits), codes)


@given(st.data(), st.sampled_from([3, 5]), st.integers(1, 9))
def test_narrow_codes_in_and_out_of_their_places(data, bits, units):
    elements = st.integers(0, 2**bits - 1)
    codes = data.draw(arrays(np.uint32, (2, 16 * units), elements=elements))
    low, high = format_levels.narrowed(format_levels.pack_codes(mx.array(codes), bits), bits)
    assert (low.dtype, high.dtype) == (mx.uint32, mx.uint16)
    for got, want in zip((low, high), oracle._join_narrow(codes, bits), strict=True):
        assert np.array_equal(got, want)
    wide = format_levels._widened(low, high, bits)
    more = 4 if bits == 3 else 112
    assert np.array_equal(format_levels.unpack_codes(wide, read_bits(bits)), codes + more)


@some
@given(any_rule, vectors())
def test_what_was_quantized_once_stays(rule, y):
    codes, scales, values = quantized(y, *rule)
    again = quantized(np.array(values), *rule)
    for a, b in zip((codes, scales, values), again, strict=True):
        assert mx.array_equal(a, b)


@some
@given(any_rule, vectors(), st.integers(-6, 8))
def test_a_power_of_two_moves_to_the_scale(rule, y, exponent):
    codes, scales, _ = quantized(y, *rule)
    moved, moved_scales, _ = quantized(y * np.float32(2.0**exponent), *rule)
    a, b = np.array(scales.astype(mx.float32)) * 2.0**exponent, np.array(moved_scales)
    a = np.minimum(a, np.finfo(np.float16).max)  # the largest scale that there is
    same = ((a == b) & (a < np.finfo(np.float16).max))[..., 0]
    assert np.array_equal(np.array(codes)[same], np.array(moved)[same])
    # A scale that covers is a multiple of 2^-24 before it is one of fp16: its neighbour, seldom.
    covers = rule[1] != "search" or rule[0] == 8
    assert (np.abs(a - b) <= (2.0**-10 * b if covers else 0)).all()


def test_the_op_matrix_allows_for_channels_on_boundaries():
    """Of a scale that is tried many channels lie between two levels. Which codes they get, and so
    which scale has the smaller angle, is a matter of the last bit."""
    rng, n = np.random.default_rng(), 3000
    step = 280 * 2.0**-24
    y = rng.integers(-3, 4, (n, 96)) * step
    y[:, 48:] = np.clip(rng.normal(size=(n, 48)) * 1.2 * step, -4.9 * step, 4.9 * step)
    y[:, 0] = 3.5 * step / oracle.tried(96, 3)[1]
    y = y.astype(np.float32)
    codes, scales, _ = quantized(y, 3, "search")
    case = SimpleNamespace(rule="search", data="boundaries")
    data = SimpleNamespace(case=case, spec=SimpleNamespace(rotation="none", seed=0))
    op_matrix._check_side(
        data,
        oracle.KEYS,
        y.astype(np.float64).reshape(1, 1, n, 96),
        (None, None, None),
        np.array(codes).reshape(1, 1, n, 96),
        np.array(scales.astype(mx.float32)).astype(np.float64).reshape(1, 1, n, 1),
        3,
        None,
    )


@some
@given(any_rule, vectors())
def test_half_a_step_is_the_largest_error(rule, y):
    """But for the outermost level, which the scale's rounding to fp16 moves by up to 2^-11."""
    bits, name = rule
    _, scales, values = quantized(y, bits, "absmax" if name == "search" else name)
    step = np.array(scales.astype(mx.float32))
    outermost = np.abs(y).max(axis=-1, keepdims=True) * 2.0**-11
    assert (np.abs(np.array(values) - y) <= step / 2 * (1 + 1e-5) + outermost).all()


@some
@given(vectors(), st.sampled_from([3, 4, 5]))
def test_the_search_keeps_the_length(y, bits):
    """To the rounding of the scale to fp16, 2^-11; codes are those of the better scale tried."""
    codes, scales, values = quantized(y, bits, "search")
    middle = 1 << (bits - 1)
    length = np.linalg.norm(y, axis=-1)
    assert (np.abs(np.linalg.norm(values, axis=-1) - length) <= 2.0**-11 * length * 1.01).all()

    def cosine(levels):
        return (y * levels).sum(axis=-1) / (length * np.linalg.norm(levels, axis=-1))

    steps = [
        np.abs(y).max(axis=-1, keepdims=True) * c / (middle - 0.5)
        for c in format_levels.tried(y.shape[-1], bits)
    ]
    tried = [cosine(np.clip(np.floor(y / s), -middle, middle - 1) + 0.5) for s in steps]
    assert (cosine(np.array(codes) - (middle - 0.5)) >= np.max(tried, axis=0) - 1e-6).all()


@given(any_rule, st.integers(1, 5))
def test_zeros_stay_zeros(rule, n):
    bits, name = rule
    codes, scales, values = quantized(np.zeros((n, 16), np.float32), *rule)
    assert mx.all(codes == 2 ** (bits - 1)) and not mx.any(scales) and not mx.any(values)


def normal(*shape: int, seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


seeds = st.integers(0, 2**32 - 1)
forms = st.sampled_from(
    [
        "int4-srft",
        "int8-srht",
        "k8v4-none",
        "int4-srft:scale=paper",
        "int3-srft",
        "k4v3-srht",
        "k5v4-srft",
        "int5-none",
    ]
)


@some
@given(forms, seeds, vectors(group=64), st.lists(st.integers(-512, 512), min_size=64, max_size=64))
def test_a_centre_absorbs_what_all_keys_share(form, seed, k, shift):
    """The bytes are the same, hence all that follows; and the softmax is that of the keys."""
    k, v = mx.array(k)[None, None], normal(1, 1, len(k), 64, seed=seed)
    q = normal(1, 2, 1, 64, seed=seed + 1) / 1024
    mu = mx.array([shift], dtype=mx.float32) / 64
    plain = make_format(Spec.parse(form), 64)
    centred = make_format(Spec.parse(form), 64, keys=Calibration(mu=mu))
    rows = calls.quantize_pack(reference, k, v, plain)
    shifted = calls.quantize_pack(reference, k + mu, v, centred)
    assert mx.array_equal(rows, shifted)
    T = len(k[0, 0])
    a = calls.attend(reference, q, rows, T, plain, 1.0)
    b = calls.attend(reference, q, shifted, T, centred, 1.0)
    assert mx.array_equal(a, b)
    remembered = [
        oracle.backward(y, plain.spec.rotation, 0, stream)
        for stream, y in enumerate(calls.dequantize(reference, rows, T, plain))
    ]
    exact = oracle.attend_exact(q, remembered[0] + np.array(mu), remembered[1], 1.0)
    np.testing.assert_allclose(b, exact, atol=2e-4)


@some
@given(forms, seeds, st.permutations(range(13)), st.booleans())
def test_the_order_of_keys_does_not_matter(form, seed, order, sinks):
    fmt, order = make_format(Spec.parse(form), 64), mx.array(order)
    k, v, q = (normal(2, h, 13, 64, seed=seed + i) for i, h in enumerate((2, 2, 4)))
    mask = normal(2, 1, 13, 13, seed=seed + 3)
    sinks = mx.array([0.0, 1.0, -1.0, 2.0]) if sinks else None
    rows = calls.quantize_pack(reference, k, v, fmt)
    a = calls.attend(reference, q, rows, 13, fmt, 0.125, mask, sinks)
    b = calls.attend(reference, q, rows[:, :, order], 13, fmt, 0.125, mask[..., order], sinks)
    np.testing.assert_allclose(a, b, atol=2e-6)


@some
@given(forms, seeds, st.integers(1, 8), st.integers(0, 30))
def test_queries_together_or_one_by_one(form, seed, L, before):
    """A causal chunk gives what its tokens give alone, each over the rows up to its own."""
    fmt, T = make_format(Spec.parse(form), 64), before + L
    k, v = normal(1, 2, T, 64, seed=seed), normal(1, 2, T, 64, seed=seed + 1)
    q, rows = normal(1, 4, L, 64, seed=seed + 2), calls.quantize_pack(reference, k, v, fmt)
    together = calls.attend(reference, q, rows, T, fmt, 0.125, "causal")
    for i in range(L):
        alone = calls.attend(reference, q[:, :, i : i + 1], rows, before + i + 1, fmt, 0.125)
        np.testing.assert_allclose(together[:, :, i : i + 1], alone, atol=2e-6)


@pytest.mark.parametrize("form", ["int4-srft", "int8-none", "int3-srft", "k5v4-srft"])
def test_batch_and_heads_are_independent(form):
    fmt = make_format(Spec.parse(form), 64)
    k, v, q = (normal(3, h, 20, 64, seed=h + i) for i, h in enumerate((2, 2, 6)))
    rows = calls.quantize_pack(reference, k, v, fmt)
    out = calls.attend(reference, q, rows, 20, fmt, 0.125, "causal")
    for b, h in np.ndindex(3, 2):
        mine = (slice(b, b + 1), slice(3 * h, 3 * h + 3))
        alone = calls.attend(reference, q[mine], rows[b, None, h, None], 20, fmt, 0.125, "causal")
        np.testing.assert_allclose(out[mine], alone, atol=2e-6)


@pytest.mark.parametrize(
    "form",
    ["int4-srft", "k8v4-srft", "int8-none:group_size=24", "int3-srft", "k4v3-srft", "k5v4-srft"],
)
@pytest.mark.parametrize("L", [1, 100])
def test_blocks_change_nothing(form, L, monkeypatch):
    """Not a bit: what a token adds must not depend on how many came with it."""
    D = 72 if "24" in form else 64
    fmt = make_format(Spec.parse(form), D)
    k, v, q = (normal(2, h, n, D, seed=n + i) for i, (h, n) in enumerate([(2, L), (2, L), (6, 1)]))
    rows = calls.quantize_pack(reference, k, v, fmt)
    whole = calls.attend(reference, q, rows, L, fmt, 0.125)
    monkeypatch.setattr(reference, "_PACK_BLOCK", 12)
    monkeypatch.setattr(reference, "_KEY_BLOCK", 7)
    assert mx.array_equal(calls.quantize_pack(reference, k, v, fmt), rows)
    assert mx.array_equal(calls.attend(reference, q, rows, L, fmt, 0.125), whole)


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
@pytest.mark.parametrize("sinks", [False, True])
def test_a_mask_of_minus_infinity(dtype, sinks):
    """A row whose mask lets nothing through is finite, and the others are as without it."""
    fmt = make_format(Spec.parse("int4-srft"), 64)
    k, v, q = (
        normal(1, h, n, 64, seed=n + i) for i, (h, n) in enumerate([(2, 40), (2, 40), (4, 3)])
    )
    rows = calls.quantize_pack(reference, k, v, fmt)
    mask = mx.where(mx.arange(40) >= mx.array([0, 40, 5])[:, None], 0.0, -mx.inf).astype(dtype)
    sinks = mx.zeros((4,)) if sinks else None
    out = calls.attend(reference, q, rows, 40, fmt, 0.125, mask, sinks)
    assert mx.all(mx.isfinite(out))
    for i in (0, 2):
        same = calls.attend(
            reference, q[:, :, i : i + 1], rows, 40, fmt, 0.125, mask[i] == 0, sinks
        )
        np.testing.assert_allclose(out[:, :, i : i + 1], same, atol=2e-6)


@pytest.mark.parametrize("D", [8, 24, 40, 64, 72, 80, 112, 128, 192, 256, 512])
def test_the_fast_rotation_is_the_matrix(D):
    x, R = normal(3, 5, D, seed=D), np.array(rotation.matrix("srft", 7, 1, D), dtype=np.float64)
    y = rotation.srft(x, 7, 1)
    np.testing.assert_allclose(y, np.array(x, dtype=np.float64) @ R.T, atol=3e-6)
    np.testing.assert_allclose(rotation.srft_inverse(x, 7, 1), np.array(x) @ R, atol=3e-6)
    # A vector's bits must not depend on its company.
    alone = rotation.srft(x[1:2, 3:4], 7, 1), rotation.srft_inverse(y[1:2, 3:4], 7, 1)
    assert mx.array_equal(alone[0], y[1:2, 3:4])
    assert mx.array_equal(alone[1], rotation.srft_inverse(y, 7, 1)[1:2, 3:4])


@pytest.mark.parametrize(
    "form, D", [("int4-srft", 64), ("k8v4-srht", 128), ("int4-none:group_size=24", 72)]
)
def test_the_way_of_gpus_gives_the_same(form, D, monkeypatch):
    """Where no fused kernel does a format, GPUs multiply without turning the codes over."""
    fmt = make_format(Spec.parse(form), D)
    k, v, q = (
        normal(2, h, n, D, seed=n + i) for i, (h, n) in enumerate([(2, 70), (2, 70), (4, 2)])
    )
    rows = calls.quantize_pack(reference, k, v, fmt)
    out = calls.attend(reference, q, rows, 70, fmt, 0.125, "causal")
    monkeypatch.setattr(reference, "_on_gpu", lambda: True)
    assert mx.array_equal(calls.quantize_pack(reference, k, v, fmt), rows)
    np.testing.assert_allclose(
        calls.attend(reference, q, rows, 70, fmt, 0.125, "causal"), out, atol=5e-6
    )
