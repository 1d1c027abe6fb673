"""Keys rounded with feedback by the fused kernel, run by the emulator, against plain operations."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvq import ops
from mlx_kvq.format.format import make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.ops import gpu as fused
from mlx_kvq.ops import plain, trial
from mlx_kvq.ops.gpu import jit
from tests.ops.test_fused import emulator, launches, normal, strange, transposed
from tests.support.feedback import FORMATS, assert_alike, assert_same_levels, keys_of, weighted

__all__ = ["emulator", "launches"]


@pytest.mark.parametrize("spec, D", FORMATS)
def test_feedback(emulator, spec, D):
    fmt = weighted(spec, D)
    assert fmt.kind.feedback
    k, v = (transposed(1, 2, 23, D, mx.float32, seed) for seed in (3, 4))
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
def test_with_a_tail(emulator, launches, spec, D, L):
    """Any strides; several sets of a SIMD group, of which the last one is not whole; and the same
    rows of the tail."""
    at_once = {1: 4, 5: 4, 23: 2}[L]
    launches(pack_pairs=2, pack_threadgroups=2, hold_tables=L == 5, fed_at_once=at_once)
    fmt = weighted(spec, D)
    k, v = (normal(2, 1, D, L, seed=s).transpose(1, 0, 3, 2) for s in (3, 4))
    tail = normal(1, 2, 30, 2 * D, seed=5)
    got, kept = fused.quantize_pack(k, v, fmt, tail, 28)
    want, expected = plain.quantize_pack(k, v, fmt, tail, 28)
    assert_alike(got, want, k, fmt)
    assert mx.allclose(kept, expected, rtol=0, atol=1e-5 * mx.abs(expected).max().item())
    assert mx.array_equal(fused.pack_rotated(kept[:, :, -L:], fmt), got)


@pytest.mark.parametrize(
    "spec, D",
    [
        ("int4-srft:group_size=64", 128), ("k5v4-srft", 80), ("int3-srft:scale=absmax", 256),
        ("int4-none:group_size=8,scale=paper", 32),
    ],
)  # fmt: skip
def test_rows_are_the_same_however_many_are_rounded_at_once(emulator, launches, spec, D):
    """Whatever a token has beside it in its set, a NaN too, and wherever a prompt is cut."""
    fmt = weighted(spec, D)
    k, v = transposed(1, 2, 19, D, seed=3), transposed(1, 2, 19, D, seed=4)
    damaged = mx.where(mx.arange(19)[:, None] == 6, mx.nan, k)
    others = mx.array([i for i in range(19) if i != 6])
    known = None
    for at_once, hold in ((1, False), (2, False), (4, True)):
        launches(fed_at_once=at_once, hold_tables=hold)
        rows = fused.quantize_pack(k, v, fmt)[0]
        known = rows if known is None else known
        assert mx.array_equal(rows, known), f"{at_once} at once"
        for cut in (1, 3, 16):
            parts = [
                fused.quantize_pack(k[:, :, i], v[:, :, i], fmt)[0]
                for i in (slice(cut), slice(cut, None))
            ]
            assert mx.array_equal(mx.concatenate(parts, axis=2), known), f"cut at {cut}"
        beside = fused.quantize_pack(damaged, v, fmt)[0]
        assert mx.array_equal(beside[:, :, others], known[:, :, others])
        assert not mx.array_equal(beside, known)


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
        return source(name).replace("uint(8 * D * block)", "uint(8 * D * (block ^ 1))")

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
