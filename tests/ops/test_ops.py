"""The operations: the op matrix on the reference backend, damage, accuracy, shape errors."""

import itertools
import math
import os
import random
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvq import ops
from mlx_kvq.format.format import make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.format.transform import Calibration
from mlx_kvq.ops import plain
from tests.support import calls, op_cases, op_matrix, oracle

FULL = os.environ.get("MLX_KVQ_FULL", "0") not in ("", "0")
MATRIX = [*op_matrix.CASES, *(op_matrix.product() if FULL else ())]
CASE = op_matrix.Case(
    dims=(64, 64),
    group=32,
    bits="int4",
    rotation="srft",
    rule="search",
    dtype="fp32",
    heads=(1, 2),
    gqa=2,
    length=33,
    queries=2,
    mask=None,
    sinks=False,
    starts=False,
    window=None,
    recent=None,
    first=None,
    calibration="",
    data="normal",
)


def normal(*shape: int, seed: int = 0, dtype=mx.float32) -> mx.array:
    x = np.random.default_rng([seed, *shape]).standard_normal(shape)
    return mx.array(x.astype(np.float32)).astype(dtype)


@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_reference(case):
    op_matrix.check(plain, case)


@pytest.mark.parametrize("D", [8, 16, 24, 32, 40, 48, 72, 576])
@pytest.mark.parametrize("bits", ["int4", "int8", "k8v4"])
def test_unusual_head_sizes(D, bits):
    case = replace(CASE, dims=(D, D), group=None, bits=bits, calibration="mu sigma lam")
    op_matrix.check(plain, case)


@pytest.mark.parametrize("dims", [(16, 16), (32, 32), (48, 80), (576, 576)])
@pytest.mark.parametrize("bits", ["int3", "k4v3", "k5v4", "int5"])
def test_unusual_head_sizes_of_narrow_codes(dims, bits):
    """Also an odd number of halves of high bits, and of scales."""
    case = replace(CASE, dims=dims, group=None, bits=bits, calibration="mu sigma lam")
    op_matrix.check(plain, case)


@pytest.mark.parametrize("case", op_matrix.CASES[:8], ids=str)
def test_the_public_functions_are_the_backends(case):
    op_matrix.check(ops, case)


def test_the_matrix_meets_every_pair():
    """All that 4000 random cases contain; the sampling could lose a factor unseen."""
    rng = random.Random(3)
    drawn = (op_cases._draw(rng) for _ in range(4000))
    possible = set().union(*(op_cases.pairs(case) for case in drawn))
    met = set().union(*(op_cases.pairs(case) for case in op_matrix.CASES))
    assert len(set(op_matrix.CASES)) == len(op_matrix.CASES) == 288
    assert possible - met == set()
    values = {(name, value) for name, values in op_cases.FACTORS.items() for value in values}
    assert {item for pair in met for item in pair} == values


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rotation, groups", [("none", [2]), ("srft", [0, 1, 2, 3])])
@pytest.mark.parametrize("bits", ["int4", "int8", "int3", "int5"])
@pytest.mark.parametrize("rule", ["search", "absmax", "paper"])
def test_damage_stays_where_it_is(bad, rotation, groups, bits, rule):
    """One bad number makes its own groups' scales NaN and leaves every other bit as it was."""
    fmt = make_format(Spec(bits, rotation, 32, scale=rule), 128)
    k, v = np.array(normal(2, 2, 5, 128)), normal(2, 2, 5, 128, seed=1)
    before = np.array(calls.quantize_pack(plain, mx.array(k), v, fmt))
    k[1, 0, 3, 70] = bad
    rows = np.array(calls.quantize_pack(plain, mx.array(k), v, fmt))
    halves, was = rows.view(np.uint16).copy(), before.view(np.uint16).copy()
    first = 2 * fmt.layout.codes_words
    scales = halves[..., first:].view(np.float16)
    want = np.zeros(scales.shape, bool)
    want[1, 0, 3, groups] = True  # K scales come first
    assert np.array_equal(np.isnan(scales), want)
    lay = fmt.layout
    parts = [(0, 2 * lay.k_words // 4)]  # the halves of a group's codes
    if lay.k_halves:
        parts.append((2 * lay.high_word, lay.k_halves // 4))
    for g in groups:
        damaged = [i + g * n + j for i, n in parts for j in range(n)] + [first + g]
        assert not halves[1, 0, 3, damaged[:-1]].any()
        halves[1, 0, 3, damaged] = was[1, 0, 3, damaged] = 0
    assert np.array_equal(halves, was)


@pytest.mark.parametrize("sinks", [None, mx.array([0.0, 1.0])])
def test_a_query_that_sees_nothing_is_finite(sinks):
    fmt = make_format(Spec.parse("int4-srft"), 64)
    rows = calls.quantize_pack(plain, normal(1, 1, 4, 64), normal(1, 1, 4, 64, seed=1), fmt)
    seen = mx.array([[True, False, True, True], [False] * 4])  # the second query sees nothing
    q = normal(1, 2, 2, 64, seed=2)
    out = calls.attend(plain, q, rows, 4, fmt, 0.125, seen, sinks)
    assert mx.all(mx.isfinite(out))
    alone = calls.attend(plain, q[:, :, :1], rows, 4, fmt, 0.125, seen[:1], sinks)
    assert mx.allclose(out[:, :, :1], alone, atol=1e-6)
    if sinks is not None:
        assert not mx.any(out[:, :, 1] != 0)


@pytest.mark.parametrize("length", [1, 2, 32, 33, 60])
def test_only_the_first_rows_count(length):
    """The buffer is longer than the sequence, also where the rest holds sound rows."""
    fmt = make_format(Spec.parse("int4-srft"), 64)
    rows = calls.quantize_pack(plain, normal(2, 2, 60, 64), normal(2, 2, 60, 64, seed=1), fmt)
    q = normal(2, 4, 1, 64, seed=2)
    whole = calls.attend(plain, q, rows, length, fmt, 0.125)
    cut = calls.attend(plain, q, mx.contiguous(rows[:, :, :length]), length, fmt, 0.125)
    assert mx.array_equal(whole, cut)
    k, _ = calls.dequantize(plain, rows, length, fmt)
    assert k.shape == (2, 2, length, 64)


# Every option does something: the rows of the same vectors differ from all others.
VARIANTS = ["int4-srft", "int4-srht", "int4-none", "int8-srft", "k8v4-srft"]
VARIANTS += [f"int4-srft:{o}" for o in ("group_size=32", "seed=1", "scale=absmax", "scale=paper")]
VARIANTS += ["int8-srft:scale=paper", "int8-srft:seed=1"]
VARIANTS += ["int3-srft", "k4v3-srft", "int3-srft:scale=absmax", "int3-srft:scale=paper"]
VARIANTS += ["int5-srft", "k5v4-srft", "int5-srft:scale=absmax", "int5-srft:scale=paper"]


def test_every_option_changes_the_rows():
    k, v = normal(1, 1, 8, 128), normal(1, 1, 8, 128, seed=1)
    rows = {
        t: np.array(calls.quantize_pack(ops, k, v, make_format(Spec.parse(t), 128)))
        for t in VARIANTS
    }
    for a, b in itertools.combinations(VARIANTS, 2):
        assert rows[a].shape != rows[b].shape or (rows[a] != rows[b]).mean() > 0.2, (a, b)


def attention_error(text: str, seed: int, **calibration) -> float:
    """Relative error of the attention of smooth random data, the whole way, as users get it."""
    rng = np.random.default_rng(seed)
    drift = rng.standard_normal((1, 2, 300, 128)).cumsum(axis=2) / 17  # neighbours are alike
    k = rng.standard_normal((1, 2, 300, 128)) + drift + 4 * rng.standard_normal((2, 1, 128))
    v = rng.standard_normal((1, 2, 300, 128)) + drift
    q = rng.standard_normal((1, 8, 4, 128))
    want = oracle.attend_exact(q, k, v, 128**-0.5, "causal")
    fmt = make_format(Spec.parse(text), 128, **calibration)
    k, v, q = (mx.array(x.astype(np.float32)) for x in (k, v, q))
    rows = calls.quantize_pack(ops, k, v, fmt)
    got = np.array(calls.attend(ops, q, rows, 300, fmt, 128**-0.5, "causal"))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("seed", range(3))
def test_accuracy_rises_with_the_bits(seed):
    names = ("int8", "k8v4", "int5", "k5v4", "int4", "k4v3", "int3")
    int8, k8v4, int5, k5v4, int4, k4v3, int3 = (attention_error(f"{b}-srft", seed) for b in names)
    assert int8 < 0.01
    assert 3 * int8 < k8v4 < int4 / 1.5
    assert 2 * int8 < int5 < k5v4 / 1.05 and 1.05 * k8v4 < k5v4 < int4 / 1.05
    assert int5 < int4 / 1.7
    assert 1.05 * int4 < k4v3 < int3 / 1.3 and int3 < 3 * int4
    assert int4 < 0.2


def test_accuracy_of_the_scale_rules_and_groups():
    def mean(options):
        return np.mean([attention_error(f"int4-srft:{options}", seed) for seed in range(8)])

    search, absmax, paper = (mean(f"scale={rule}") for rule in ("search", "absmax", "paper"))
    assert search < absmax < paper
    assert mean("group_size=8") < search < mean("group_size=128")


def test_centring_the_keys_helps_where_they_share_a_bias():
    rng = np.random.default_rng(0)
    bias = 50 * rng.standard_normal((1, 128))
    k, v = rng.standard_normal((2, 1, 1, 200, 128))
    k, q = k + bias, rng.standard_normal((1, 2, 1, 128))
    want = oracle.attend_exact(q, k, v, 0.1)
    k, v, q = (mx.array(x.astype(np.float32)) for x in (k, v, q))
    errors = []
    for keys in None, Calibration(mu=mx.array(bias.astype(np.float32))):
        fmt = make_format(Spec.parse("int4-srft"), 128, keys=keys)
        got = np.array(calls.attend(ops, q, calls.quantize_pack(ops, k, v, fmt), 200, fmt, 0.1))
        errors.append(np.linalg.norm(got - want) / np.linalg.norm(want))
    assert errors[1] < 0.2 < 3 * errors[1] < errors[0]


FMT = make_format(Spec.parse("int4-srft:group_size=32,recent=16"), 64, 128)
BARE = make_format(Spec.parse("int4-srft:first=0"), 64, 128)
ROWS = mx.zeros((2, 2, 16, FMT.layout.words), mx.uint32)


@pytest.mark.parametrize(
    "k_shape, v_shape, message",
    [
        ((2, 4, 64), (2, 4, 128), "are not [B, Hkv, L, D] of one size."),
        ((1, 2, 2, 4, 64), (1, 2, 2, 4, 128), "are not [B, Hkv, L, D] of one size."),
        ((2, 2, 4, 64), (2, 2, 5, 128), "are not [B, Hkv, L, D] of one size."),
        ((2, 2, 4, 64), (2, 1, 4, 128), "are not [B, Hkv, L, D] of one size."),
        ((1, 2, 4, 64), (2, 2, 4, 128), "are not [B, Hkv, L, D] of one size."),
        ((2, 2, 4, 128), (2, 2, 4, 64), "do not fit the cache's head sizes 64 and 128."),
        ((2, 2, 4, 64), (2, 2, 4, 64), "do not fit the cache's head sizes 64 and 128."),
    ],
)
def test_shape_errors_of_quantize_pack(k_shape, v_shape, message):
    with pytest.raises(ValueError) as info:
        calls.quantize_pack(ops, mx.zeros(k_shape), mx.zeros(v_shape), FMT)
    assert str(info.value) == f"Keys {k_shape} and values {v_shape} {message}"


@pytest.mark.parametrize("shape", [(1, 4, 1, 64), (2, 3, 1, 64), (2, 4, 1, 128)])
def test_shape_errors_of_attend(shape):
    with pytest.raises(ValueError) as info:
        calls.attend(ops, mx.zeros(shape), ROWS, 16, FMT, 1.0)
    assert str(info.value) == f"Queries {shape} do not fit rows {ROWS.shape} of {FMT.signature}."


@pytest.mark.parametrize("q", [mx.zeros((4, 1, 64)), mx.zeros((2, 4, 1, 64), mx.int32)])
def test_what_is_not_queries(q):
    with pytest.raises(ValueError) as info:
        calls.attend(ops, q, ROWS, 16, FMT, 1.0)
    want = f"Queries are float16, bfloat16 or float32 [B, Hq, L, 64], got {q.dtype} {q.shape}."
    assert str(info.value) == want


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mask": "casual"}, "A mask is None, 'causal' or an array, got 'casual'."),
        ({"mask": 1}, "A mask is None, 'causal' or an array, got 1."),
        ({"mask": mx.ones((3, 16), mx.int32)}, "boolean (True attends) or a float to add, got "),
        ({"mask": mx.ones((3, 15), mx.bool_)}, "does not broadcast to the scores"),
        ({"mask": mx.ones((2, 2, 3, 16))}, "= (2, 4, 3, 16)."),
        ({"mask": mx.ones((1, 1, 1, 1, 16))}, "does not broadcast to the scores"),
        (
            {"sinks": mx.zeros(2)},
            "Sinks are one float for each of 4 query heads, got mlx.core.float32 (2,).",
        ),
        (
            {"sinks": mx.zeros(4, mx.int32)},
            "one float for each of 4 query heads, got mlx.core.int32",
        ),
        (
            {"starts": mx.zeros(1, mx.int32)},
            "Starts are one integer for each of 2 sequences, got mlx.core.int32 (1,).",
        ),
        (
            {"starts": mx.zeros(2)},
            "Starts are one integer for each sequence, got mlx.core.float32 (2,).",
        ),
        ({"window": 0}, "A window is at least 1, got 0."),
        ({"window": -3}, "A window is at least 1, got -3."),
        ({"window": 2.5}, "A window is a whole number, got 2.5."),
        ({"window": True}, "A window is a whole number, got True."),
        ({"window": 10**12}, f"A window is at most {2**31 - 1}, got {10**12}."),
        ({"scale": math.nan}, "A scale is a finite number, got nan."),
        ({"scale": -math.inf}, "A scale is a finite number, got -inf."),
        ({"scale": 1e300}, "A scale is a finite number, got 1e+300."),
        ({"scale": None}, "A scale is a finite number, got None."),
        ({"scale": True}, "A scale is a finite number, got True."),
        ({"length": True}, "A length is a whole number, got True."),
        ({"length": 5.0}, "A length is a whole number, got 5.0."),
        (
            {"tail": mx.zeros((2, 2, 18, 192)), "ring": (3, 99)},
            "A ring of 16 rows for 3 queries is",
        ),
        ({"tail": mx.zeros((2, 2, 18, 192)), "ring": (0.0, 16)}, "got (0.0, 16)."),
        ({"tail": mx.zeros((2, 2, 18, 192)), "ring": 3}, "got 3."),
        (
            {"tail": mx.zeros((2, 2, 17, 192))},
            "The tail is [2, 2, at least 18 tokens, 192] in float",
        ),
        ({"tail": mx.zeros((2, 2, 18, 192), mx.int32)}, "got mlx.core.int32 (2, 2, 18, 192)."),
        (
            {"fmt": "int4-srft"},
            "A format is what mlx_kvq.format.format.make_format returns, got 'int4-srft'.",
        ),
    ],
)
def test_what_attention_is_told(arguments, message):
    with pytest.raises(ValueError) as info:
        calls.attend(
            ops,
            mx.zeros((2, 4, 3, 64)),
            ROWS,
            **({"length": 16, "fmt": FMT, "scale": 1.0} | arguments),
        )
    assert message in str(info.value)


@pytest.mark.parametrize(
    "shape", [(), (1,), (16,), (3, 1), (4, 3, 16), (2, 1, 3, 16), (1, 4, 1, 1)]
)
def test_masks_broadcast(shape):
    q = mx.ones((2, 4, 3, 64))
    found = calls.attend(ops, q, ROWS, 16, FMT, 1.0, mx.ones(shape, mx.bool_))
    assert mx.array_equal(found, calls.attend(ops, q, ROWS, 16, FMT, 1.0))


@pytest.mark.parametrize("dtypes", [(mx.int32, mx.float32), (mx.float16, mx.uint8)])
def test_keys_and_values_are_floats(dtypes):
    k, v = (mx.zeros((2, 2, 4, D), dtype) for D, dtype in zip((64, 128), dtypes, strict=True))
    with pytest.raises(ValueError) as info:
        calls.quantize_pack(ops, k, v, FMT)
    want = "Keys and values are float16, bfloat16 or float32, got {} and {}."
    assert str(info.value) == want.format(*dtypes)


@pytest.mark.parametrize(
    "rows", [ROWS[0], ROWS[..., :-1], ROWS.astype(mx.int32), ROWS.view(mx.float32), ROWS[None]]
)
def test_what_is_not_rows(rows):
    for call in (
        lambda: calls.attend(ops, mx.zeros((2, 4, 1, 64)), rows, 1, FMT, 1.0),
        lambda: calls.dequantize(ops, rows, 1, FMT),
    ):
        with pytest.raises(ValueError) as info:
            call()
        want = f"Rows are uint32 [B, Hkv, capacity, 27] for {FMT.signature}"
        assert str(info.value).startswith(want)
        assert str(info.value).endswith(f"got {rows.dtype} {rows.shape}.")


@pytest.mark.parametrize("length", [0, -1, 17])
def test_lengths_outside_the_rows(length):
    for call in (
        lambda: calls.attend(ops, mx.zeros((2, 4, 1, 64)), ROWS, length, FMT, 1.0),
        lambda: calls.dequantize(ops, ROWS, length, FMT),
    ):
        with pytest.raises(ValueError, match=f"^Length {length} is not 1 to the capacity 16.$"):
            call()


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("MLX_KVQ_BACKEND", "metall")
    with pytest.raises(ValueError, match="^MLX_KVQ_BACKEND is .*'reference'.* got 'metall'.$"):
        ops.backend(FMT)
    monkeypatch.setenv("MLX_KVQ_BACKEND", "reference")
    assert ops.backend(FMT) is plain


K, V = mx.zeros((2, 2, 4, 64)), mx.zeros((2, 2, 4, 128))
TAIL = mx.zeros((2, 2, 5, 192))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"size": 0, "tail": TAIL}, "A tail's number of tokens to keep is at least 1, got 0."),
        ({"size": -1}, "A tail's number of tokens to keep is at least 1, got -1."),
        ({"size": 3.0}, "A tail's number of tokens to keep is a whole number, got 3.0."),
        ({"size": True}, "A tail's number of tokens to keep is a whole number, got True."),
        ({"size": 10**9}, "A tail's number of tokens to keep is at most 65540, got 1000000000."),
        ({"size": 10, "tail": TAIL}, "The tail is [2, 2, at least 6 tokens, 192] in float16, "),
        ({"tail": TAIL.astype(mx.int32)}, "got mlx.core.int32 (2, 2, 5, 192)."),
        ({"tail": TAIL[:1]}, "got mlx.core.float32 (1, 2, 5, 192)."),
        ({"capacity": 3}, "A capacity is at least 4, got 3."),
        ({"capacity": 8.0}, "A capacity is a whole number, got 8.0."),
        ({"fmt": None}, "A format is what mlx_kvq.format.format.make_format returns, got None."),
    ],
)
def test_what_a_tail_is_told(arguments, message):
    with pytest.raises(ValueError) as info:
        ops.quantize_pack(K, V, **({"fmt": FMT, "tail": None, "size": 3} | arguments))
    assert message in str(info.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"size": 3}, "A tail's number of tokens to keep is at least 4, got 3."),
        ({"size": 5.0}, "A tail's number of tokens to keep is a whole number, got 5.0."),
        ({"size": 10}, "The tail is [2, 2, at least 6 tokens, 192] in float16, "),
        ({"tail": TAIL.astype(mx.int32)}, "got mlx.core.int32 (2, 2, 5, 192)."),
        ({"tail": TAIL[:1]}, "got mlx.core.float32 (1, 2, 5, 192)."),
        ({"v": V[:, :, :3]}, "are not [B, Hkv, L, D] of one size."),
        ({"fmt": None}, "A format is what mlx_kvq.format.format.make_format returns, got None."),
    ],
)
def test_what_keeping_a_token_is_told(arguments, message):
    with pytest.raises(ValueError) as info:
        ops.keep_exact(**({"k": K, "v": V, "fmt": FMT, "tail": TAIL, "size": 6} | arguments))
    assert message in str(info.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"size": 0}, "A tail's number of tokens to keep is at least 1, got 0."),
        ({"capacity": 3}, "A capacity is at least 4, got 3."),
        ({"k": K[:, :, :3], "v": V[:, :, :3]}, "number of first tokens is at most 3, got 4."),
        ({"fmt": BARE}, "A format's number of first tokens is at least 1, got 0."),
        ({"fmt": None}, "A format is what mlx_kvq.format.format.make_format returns, got None."),
    ],
)
def test_what_packing_a_start_is_told(arguments, message):
    with pytest.raises(ValueError) as info:
        ops.pack_start(**({"k": K, "v": V, "fmt": FMT, "size": 6} | arguments))
    assert message in str(info.value)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("size, capacity", [(1, None), (3, 16), (9, None), (20, 10)])
def test_a_start_is_packed_like_any_tokens(size, capacity, dtype):
    fmt, n = FMT, FMT.first
    k, v = normal(2, 2, 9, 64).astype(dtype), normal(2, 2, 9, 128).astype(dtype)
    rows, tail, first = ops.pack_start(k, v, fmt, size, capacity)
    wanted = ops.quantize_pack(k, v, fmt, None, size, capacity)
    assert mx.array_equal(rows, wanted[0]) and mx.array_equal(tail, wanted[1])
    assert mx.array_equal(first, ops.keep_exact(k[:, :, :n], v[:, :, :n], fmt, tail, n))
    assert first.dtype == tail.dtype


@pytest.mark.parametrize("wrong", [TAIL[0], TAIL[..., :-8], TAIL.astype(mx.uint32)])
def test_what_packing_a_tail_is_told(wrong):
    with pytest.raises(ValueError, match="^The tail is .* in float16, bfloat16 or float32, got"):
        ops.pack_rotated(wrong, FMT)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("spec", ["int4-srft", "int8-srft", "k4v3-srht:scale=paper", "int4-none"])
def test_rows_of_a_tail_are_those_of_its_tokens(spec, dtype):
    """Token by token, and all at once."""
    fmt = make_format(Spec.parse(spec), 64, 128)
    k, v = normal(2, 2, 7, 64).astype(dtype), normal(2, 2, 7, 128).astype(dtype)
    rows, tail = ops.quantize_pack(k, v, fmt, None, 7)
    kept = mx.zeros_like(tail)
    for i in range(7):
        kept = ops.keep_exact(k[:, :, i : i + 1], v[:, :, i : i + 1], fmt, kept, 7)
    assert mx.array_equal(kept, tail)
    assert mx.array_equal(ops.pack_rotated(tail, fmt), rows)


@pytest.mark.parametrize("op", ["restore", "dequantize"])
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dtype": mx.int32}, "The dtype is float16, bfloat16 or float32, got mlx.core.int32."),
        ({"dtype": None}, "The dtype is float16, bfloat16 or float32, got None."),
        ({"length": 4.0}, "A length is a whole number, got 4.0."),
        ({"length": True}, "A length is a whole number, got True."),
        ({"tail": TAIL[:, :1]}, "got mlx.core.float32 (2, 1, 5, 192)."),
    ],
)
def test_what_unpacking_is_told(op, arguments, message):
    with pytest.raises(ValueError) as info:
        getattr(calls, op)(ops, ROWS, **({"length": 4, "fmt": FMT} | arguments))
    assert message in str(info.value)


def test_a_calibration_is_of_as_many_heads_as_the_rows():
    values = Calibration(mu=mx.zeros((3, 128)))
    fmt = make_format(FMT.spec, 64, 128, values=values)
    for call in (
        lambda: calls.quantize_pack(ops, K, V, fmt),
        lambda: ops.quantize_pack(K, V, fmt, None, 3),
        lambda: calls.attend(ops, mx.zeros((2, 4, 3, 64)), ROWS, 16, fmt, 1.0),
        lambda: calls.dequantize(ops, ROWS, 16, fmt),
        lambda: calls.restore(ops, ROWS, 16, fmt),
    ):
        with pytest.raises(ValueError, match="^The format is calibrated for 3 KV heads, got 2.$"):
            call()


@pytest.mark.parametrize("B, H, L", [(0, 2, 4), (2, 0, 4), (2, 2, 0), (0, 0, 0)])
@pytest.mark.parametrize("spec", ["int4-srft", "k8v4-srht", "int8-none", "int3-srft", "k5v4-srft"])
def test_nothing_at_all(B, H, L, spec):
    """Empty arrays of the right shapes."""
    fmt = make_format(Spec.parse(spec), 64, 128)
    W = fmt.layout.words
    k, v = mx.zeros((B, H, L, 64), mx.float16), mx.zeros((B, H, L, 128), mx.float16)
    rows = calls.quantize_pack(ops, k, v, fmt)
    assert (rows.shape, rows.dtype) == ((B, H, L, W), mx.uint32)
    tail = normal(B, H, 5, 192) if B * H else mx.zeros((B, H, 5, 192))
    for old in (None, tail):
        rows, kept = ops.quantize_pack(k, v, fmt, old, 3)
        assert (rows.shape, kept.shape, kept.dtype) == ((B, H, L, W), (B, H, 3, 192), mx.bfloat16)
    if not L:  # what was there stays
        assert mx.array_equal(kept, tail[:, :, 2:].astype(mx.bfloat16))
    size = max(1, L)
    kept = ops.keep_exact(k, v, fmt, tail, size)
    assert (kept.shape, kept.dtype) == ((B, H, size, 192), mx.bfloat16)
    assert ops.pack_rotated(tail[:, :, :L], fmt).shape == (B, H, L, W)
    rows, _ = ops.quantize_pack(k, v, fmt, tail, 3, 9)
    assert rows.shape == (B, H, 9, W)
    if L:
        for op in (calls.dequantize, calls.restore):
            assert [x.shape for x in op(ops, rows, 4, fmt)] == [(B, H, 4, 64), (B, H, 4, 128)]
    chunk = calls.restore(ops, rows, 4, fmt, mx.float16, None, (k, v))
    assert [(x.shape, x.dtype) for x in chunk] == [
        ((B, H, 4 + L, D), mx.float16) for D in (64, 128)
    ]
    for tail in (None, mx.zeros((B, H, fmt.recent + 3, 192))):
        out = calls.attend(
            ops, mx.zeros((B, 2 * H, L, 64), mx.float16), rows, 4, fmt, 0.1, tail=tail
        )
        assert (out.shape, out.dtype) == ((B, 2 * H, L, 128), mx.float16)


def test_no_queries_of_rows_that_are_there():
    for shape in ((2, 4, 0, 64), (2, 0, 1, 64)):
        out = calls.attend(ops, mx.zeros(shape), ROWS, 16, FMT, 1.0)
        assert out.shape == (*shape[:3], 128)


@pytest.mark.parametrize("size", [1e-6, 3e-6, 1e-5, 1e-4, 1e-2])
@pytest.mark.parametrize(
    "spec, most",
    [
        ("int8-srft", 0.04),
        ("int4-srft", 0.2),
        ("int4-none", 0.2),
        ("int3-srft", 0.3),
        ("k5v4-srft", 0.15),
    ],
)
def test_small_values_are_kept(spec, most, size):
    """Down to the smallest numbers of fp16, which scales are."""
    fmt = make_format(Spec.parse(spec), 128)
    k, v = size * normal(1, 2, 50, 128), size * normal(1, 2, 50, 128, seed=1)
    for x, y in zip(
        (k, v), calls.restore(ops, calls.quantize_pack(ops, k, v, fmt), 50, fmt), strict=True
    ):
        x, y = (np.array(a, np.float64) for a in (x, y))
        assert np.linalg.norm(x - y) < most * np.linalg.norm(x)
