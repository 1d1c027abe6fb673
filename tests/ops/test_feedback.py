"""Keys rounded with feedback by the fused kernel, run by the emulator, against plain operations.

A number that is nearly half-way between two codes may go to another one, since sums are in another
order; later codes of its vector then differ. So codes are compared by the part that differs, and
what they are worth by the cost that feedback lowers.
"""

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvq import ops
from mlx_kvq.format import levels
from mlx_kvq.format.format import Format, make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.format.transform import Calibration
from mlx_kvq.ops import gpu as fused
from mlx_kvq.ops import plain, trial
from mlx_kvq.ops.gpu import jit
from tests.ops.test_fused import emulator, launches, normal, strange, transposed

__all__ = ["emulator", "launches"]

FORMATS = [
    # spec, head size
    ("int4-srft:group_size=32", 64),
    ("int4-srft:group_size=64", 64),
    ("int4-srft:group_size=80", 80),
    ("int4-srft:group_size=24", 96),
    ("int4-srft:group_size=32", 128),
    ("int4-srft:group_size=64,scale=absmax", 128),
    ("int4-srft:group_size=128,scale=paper", 128),
    ("int4-srht:group_size=64", 256),
    ("int4-none:group_size=32", 96),
    ("k4v3-srft:group_size=32", 128),
    ("k4v3-srft", 80),
    ("int3-srft:group_size=32", 64),
    ("int3-srft", 80),
    ("int3-srft:group_size=64", 128),
    ("int3-srft:scale=paper", 256),
    ("k5v4-srft:group_size=32", 64),
    ("k5v4-srft", 80),
    ("k5v4-srft", 128),
    ("int5-srft:scale=paper", 112),
    ("int5-srft:scale=absmax", 256),
]


def weighted(spec: str, D: int, heads: int = 2, centred: bool = True) -> Format:
    """A format with feedback for queries of a few strong directions."""
    strong = np.array(normal(heads, D, D // 4, seed=3)) * 4
    metric = strong @ strong.swapaxes(1, 2) / D + np.eye(D)
    mu = 0.7 * normal(heads, D, seed=10) if centred else None
    keys = Calibration(
        mu, mx.exp(0.3 * normal(heads, D, seed=11)),
        metric=mx.array(metric.astype(np.float32)),
    )  # fmt: skip
    join = "," if ":" in spec else ":"
    return make_format(Spec.parse(f"{spec}{join}rounding=feedback"), D, keys=keys)


def keys_of(rows: mx.array, fmt: Format) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and vectors of the keys."""
    words, _, scales, _ = levels.split(rows, fmt.layout)
    bits = fmt.layout.wide.k_bits
    y = levels.read_levels(words, scales, bits, fmt.layout.k_group, fmt.scale)
    codes = np.array(levels.unpack_codes(words, bits))
    return codes, np.array(scales, np.float64), np.array(y, np.float64)


def assert_same_levels(got: mx.array, want: mx.array, fmt: Format) -> None:
    lay = fmt.layout
    for a, b in zip(levels.split(got, lay)[1::2], levels.split(want, lay)[1::2], strict=True):
        assert mx.array_equal(a, b, equal_nan=a.dtype == mx.float16)  # of the values
    (n, s, _), (n0, s0, _) = keys_of(got, fmt), keys_of(want, fmt)
    assert (n != n0).mean() < 0.01
    assert (np.isnan(s) == np.isnan(s0)).all()
    off = np.abs(np.nan_to_num(s) - np.nan_to_num(s0)) / np.maximum(np.nan_to_num(s0), 1e-8)
    assert (off > 1e-3).mean() < 0.01


def assert_alike(got: mx.array, want: mx.array, k: mx.array, fmt: Format) -> None:
    assert_same_levels(got, want, fmt)
    y, y0 = keys_of(got, fmt)[2], keys_of(want, fmt)[2]
    x = np.array(fmt.keys.forward(k.astype(mx.float32)), np.float64)
    M = np.array(fmt.keys.calibration.metric, np.float64)
    ones = mx.broadcast_to(mx.eye(k.shape[3]), (1, k.shape[1], k.shape[3], k.shape[3]))
    A = np.array(fmt.keys.query(ones), np.float64)[0]  # error of y -> of the key
    M = A.swapaxes(1, 2) @ M @ A
    cost, cost0 = (np.einsum("bhnd,hde,bhne->", e, M, e) for e in (y - x, y0 - x))
    assert cost <= 1.02 * cost0


@pytest.mark.parametrize("spec, D", FORMATS)
def test_feedback(emulator, spec, D):
    fmt = weighted(spec, D)
    assert fmt.kind.feedback
    k, v = transposed(1, 2, 23, D, seed=3), transposed(1, 2, 23, D, seed=4)
    got, want = (backend.quantize_pack(k, v, fmt)[0] for backend in (fused, plain))
    assert_alike(got, want, k, fmt)


@pytest.mark.parametrize(
    "spec",
    [
        "int4-srft:group_size=32", "int4-none:group_size=16", "int4-srft:scale=absmax",
        "int3-srft:group_size=32", "int3-none:scale=paper", "k4v3-srft",
        "k5v4-srft", "int5-none:group_size=16",
    ],
)  # fmt: skip
def test_strange_vectors(emulator, spec):
    """Zeros, an outlier, keys below fp16's scales, beyond its largest; NaN and infinities, which
    stay in their groups where nothing is rotated."""
    fmt = weighted(spec, 64, heads=1, centred=False)
    k = strange(9)
    k[0, 0, 8, 40] = np.nan
    k, v = mx.array(k), normal(1, 1, 9, 64, seed=6)
    got, want = (backend.quantize_pack(k, v, fmt)[0] for backend in (fused, plain))
    assert_same_levels(got, want, fmt)
    codes, scales, _ = keys_of(got, fmt)
    assert (scales[0, 0, 1] == 0).all()
    damaged = np.isnan(scales[0, 0])
    assert not damaged[:6].any() and damaged[6:].any(axis=1).all()
    if "none" in spec and scales.shape[-1] > 1:
        assert (damaged[6:].sum(axis=1) == 1).all()
    of_channel = np.repeat(damaged, 64 // damaged.shape[1], axis=1)
    assert (codes[0, 0][of_channel] == {3: 4, 5: 112}.get(fmt.layout.k_bits, 0)).all()


@pytest.mark.parametrize(
    "spec, D", [("int4-srft", 128), ("int3-srft", 64), ("k4v3-srft", 80), ("k5v4-srft", 80)]
)
@pytest.mark.parametrize("L", [1, 5, 23])
def test_with_a_tail_and_held_rows(emulator, launches, spec, D, L):
    """Any strides; several sets of a SIMD group, of which the last one is not whole."""
    launches(pack_pairs=2, pack_threadgroups=2, hold_tables=L == 5)
    fmt = weighted(spec, D)
    k, v = (normal(2, 1, D, L, seed=s).transpose(1, 0, 3, 2) for s in (3, 4))
    tail, held = (
        normal(1, 2, 30, 2 * D, seed=5),
        plain.quantize_pack(normal(1, 2, 31, D, seed=1), normal(1, 2, 31, D, seed=2), fmt)[0],
    )
    rows = plain.quantize_pack(k, v, fmt)[0]
    for pending in (None, mx.contiguous(held)):
        got, kept = fused.quantize_pack(k, v, fmt, tail, 28, pending)
        want, expected = plain.quantize_pack(k, v, fmt, tail, 28, pending)
        assert got.shape == want.shape
        assert mx.array_equal(got[:, :, :-L], want[:, :, :-L])
        assert_alike(got[:, :, -L:], rows, k, fmt)
        assert mx.allclose(kept, expected, rtol=0, atol=1e-5 * mx.abs(expected).max().item())


def test_the_operation_takes_the_kernel(emulator, capsys):
    fmt = weighted("int4-srft", 64)
    k, v = transposed(1, 2, 5, 64), transposed(1, 2, 5, 64, seed=1)
    rows, _ = ops.quantize_pack(k, v, fmt)
    assert_alike(rows, plain.quantize_pack(k, v, fmt)[0], k, fmt)
    assert "kvq_quantize_pack" in emulator.counters[-1].kernel
    assert emulator.counters[-1].bytes_read["feedback"] > 0
    assert not ops.is_reference(fmt, k.dtype)
    assert capsys.readouterr().err == ""
    ops.forget()


def test_wrong_feedback_is_found_at_first_use(emulator, monkeypatch, capsys):
    source = jit.kernel_source

    def planted(name):
        return source(name).replace("(8 * block + j) * D", "(8 * (block ^ 1) + j) * D")

    monkeypatch.setattr(jit, "kernel_source", planted)
    monkeypatch.setattr(jit, "_source", jit._source.__wrapped__)
    monkeypatch.setattr(trial, "_said", set())
    fmt = weighted("int4-srft", 64)
    k, v = transposed(1, 2, 5, 64), transposed(1, 2, 5, 64, seed=1)
    rows, _ = ops.quantize_pack(k, v, fmt)
    assert mx.array_equal(rows, plain.quantize_pack(k, v, fmt)[0])
    assert "quantize_pack kernel failed on this machine (its res" in capsys.readouterr().err
    ops.forget()


def test_8_bit_keys_have_the_kernel_of_nearest_rounding():
    keys = weighted("int4-srft", 64).keys.calibration
    kinds = [
        make_format(Spec.parse(spec), 64, keys=keys).kind
        for spec in ("k8v4-srft", "k8v4-srft:rounding=feedback")
    ]
    assert kinds[0] is kinds[1]
