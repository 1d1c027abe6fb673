"""Keys and values up to fp16's largest number, decoded token by token beside an exact tail: outputs
stay finite and right on the reference backend and in the kernels, and damage still shows."""

from contextlib import nullcontext

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvq import ops
from mlx_kvq.format.format import make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.ops import gpu as fused
from mlx_kvq.ops import plain as reference
from tests.emulator import emulated
from tests.support import calls, oracle

D, RECENT, TOKENS, LARGE = 64, 4, 7, 3
BACKENDS = {"reference": (reference, nullcontext), "kernels": (fused, emulated)}
DTYPES = [mx.float16, mx.bfloat16, mx.float32]
# Of an output, relative to the largest value: its rounding (bf16: the tail's as well), and
# the fp16 queries and probabilities of the kernels.
TOLERANCE = {mx.float16: 1e-3, mx.bfloat16: 1e-2, mx.float32: 2e-5}
FUSED_TOLERANCE = {mx.float16: 4e-3, mx.bfloat16: 1e-2, mx.float32: 4e-3}


def extreme(kind: str, shape: tuple[int, ...], stream: int, rng) -> np.ndarray:
    if kind == "signs":
        return 3e4 * rng.choice([-1.0, 1.0], shape)
    if kind == "full":
        return np.full(shape, oracle.FP16_MAX)
    if kind == "channel":
        x = rng.standard_normal(shape)
        x[..., 5] = oracle.FP16_MAX
        return x
    size = {"aligned": 8e3, "aligned full": oracle.FP16_MAX}[kind]
    row = oracle.rotate(np.eye(D), "srft", 0, stream).T[0]  # sqrt(D) times as large rotated
    return np.broadcast_to(size * np.sign(row), shape).copy()


def wide(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def decode(backend, fmt, q, k, v):
    """Token by token as a cache does it: outputs, rows, and how each query read them."""
    buffer = mx.zeros((1, k.shape[1], TOKENS, fmt.layout.words), mx.uint32)
    tail, outputs = None, []
    for t in range(TOKENS):
        rows, tail = backend.quantize_pack(
            k[:, :, t : t + 1], v[:, :, t : t + 1], fmt, tail, fmt.recent
        )
        buffer[:, :, t : t + 1] = rows
        outputs.append(
            calls.attend(backend, q[:, :, t : t + 1], buffer, t + 1, fmt, D**-0.5, tail=tail)
        )
    return mx.concatenate(outputs, axis=2), buffer, tail


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", ["int4-srft", "int8-srft:scale=absmax"])
@pytest.mark.parametrize("kind", ["signs", "aligned", "aligned full", "full", "channel"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_numbers(backend, kind, spec, dtype):
    """The first LARGE tokens are, and later ones are not: in the end they are read from rows."""
    rng = np.random.default_rng(len(kind))
    shape = (1, 2, TOKENS, D)
    k, v = (rng.standard_normal(shape) for _ in "kv")
    for stream, x in enumerate((k, v)):
        x[:, :, :LARGE] = extreme(kind, (1, 2, LARGE, D), stream, rng)
    # Logits of a few units: each query reads several tokens.
    q = rng.standard_normal((1, 4, TOKENS, D)) / np.abs(k).max()
    q, k, v = (mx.array(x.astype(np.float32)).astype(dtype) for x in (q, k, v))
    joiner = ":" if ":" not in spec else ","
    fmt = make_format(Spec.parse(f"{spec}{joiner}recent={RECENT}"), D)
    module, context = BACKENDS[backend]
    with context():
        got, rows, _ = decode(module, fmt, q, k, v)
        mx.eval(got, rows)
    got = wide(got)
    assert np.isfinite(got).all()
    lay, exact = fmt.layout, [oracle.forward(wide(x), "srft", 0, s) for s, x in enumerate((k, v))]
    kept = ops.tail_dtype(dtype)
    exact = [wide(mx.array(y.astype(np.float32)).astype(kept)) for y in exact]
    layout = lay.k_dim, lay.v_dim, lay.k_bits, lay.v_bits, lay.k_group, lay.v_group
    stored = oracle.unpack_row(np.array(rows), *layout, fmt.scale)
    largest = np.maximum(np.abs(wide(v)).max(), 1.0)
    tolerances = TOLERANCE if module is reference else FUSED_TOLERANCE
    tolerance, of_kept = (tolerances[t] * largest for t in (dtype, kept))
    for t in range(TOKENS):
        reads = np.arange(t + 1)[None] > t - RECENT
        seen = [x[:, :, : t + 1] for x in (*stored, *exact)]
        one = wide(q)[:, :, t : t + 1]
        want = oracle.attend(
            one, *seen[:2], D**-0.5, rotation="srft", seed=0, exact=(*seen[2:], reads)
        )
        if dtype == mx.float16:
            want = np.clip(want, -oracle.FP16_MAX, oracle.FP16_MAX)
        assert np.abs(got[:, :, t : t + 1] - want).max() <= tolerance, t
        if t < RECENT:  # exact altogether, so what plain attention gives
            plain = [wide(x)[:, :, : t + 1] for x in (k, v)]
            want = oracle.attend_exact(one, *plain, D**-0.5)
            assert np.abs(got[:, :, t : t + 1] - want).max() <= max(tolerance, of_kept), t


@pytest.mark.parametrize("rotation", ["srft", "none"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_damage_shows(backend, side, bad, rotation):
    """To the query that reads it from the tail and to the one that reads it from rows."""
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((1, 1, TOKENS, D)) for _ in "kv")
    (k if side == "keys" else v)[0, 0, 1, 9] = bad
    q = mx.array(rng.standard_normal((1, 1, TOKENS, D)).astype(np.float32)).astype(mx.float16)
    k, v = (mx.array(x.astype(np.float32)).astype(mx.float16) for x in (k, v))
    fmt = make_format(Spec.parse(f"int4-{rotation}:recent={RECENT}"), D)
    module, context = BACKENDS[backend]
    with context():
        got, rows, _ = decode(module, fmt, q, k, v)
        restored = calls.restore(module, rows, TOKENS, fmt, mx.float16)
        mx.eval(got, rows, restored)
    got = np.array(got)[0, 0]
    assert np.isfinite(got[0]).all()
    for t in range(1, TOKENS):
        # A key of -inf in a channel of its own hides its token, as in any attention.
        hidden = side == "keys" and rotation == "none" and np.isinf(bad)
        assert hidden or not np.isfinite(got[t]).all(), t
    assert not np.isfinite(np.array(restored[side == "values"])[0, 0, 1]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp16_saturates(backend):
    """Levels of a scale may be beyond fp16; what is restored, rotated or not, is not."""
    fmt = make_format(Spec.parse("int4-srft"), D)
    x = oracle.FP16_MAX * np.sign(oracle.rotate(np.eye(D), "srft", 0, 0).T[0])
    k = mx.array(np.broadcast_to(x, (1, 1, 3, D)).astype(np.float32)).astype(mx.float16)
    module, context = BACKENDS[backend]
    with context():
        rows, tail = module.quantize_pack(k, k, fmt, None, 2)
        found = [*calls.dequantize(module, rows, 3, fmt, mx.float16, tail)]
        found += calls.dequantize(module, rows, 3, fmt, mx.float16)
        found += calls.restore(module, rows, 3, fmt, mx.float16, tail)
        found += calls.restore(module, rows, 3, fmt, mx.float16)
        mx.eval(tail, found)
    assert tail.dtype == mx.bfloat16
    assert mx.abs(tail).max() > 5e5
    for x in found:
        assert np.isfinite(np.array(x)).all()
    assert np.abs(np.array(found[0])).max() == oracle.FP16_MAX
