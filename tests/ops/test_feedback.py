"""Keys rounded with feedback by the fused kernel, run by the emulator, against plain operations.

A number that is nearly half-way between two codes may go to another one, since sums are in another
order; later codes of its vector then differ. So codes are compared by the part that differs, and
what they are worth by the cost that feedback lowers.
"""

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvq.format import levels
from mlx_kvq.format.format import Format, make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.format.transform import Calibration
from mlx_kvq.ops import gpu as fused
from mlx_kvq.ops import plain
from tests.ops.test_fused import emulator, launches, normal, transposed

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
]


def weighted(spec: str, D: int, heads: int = 2) -> Format:
    """A format with feedback for queries of a few strong directions."""
    strong = np.array(normal(heads, D, D // 4, seed=3)) * 4
    metric = strong @ strong.swapaxes(1, 2) / D + np.eye(D)
    keys = Calibration(
        0.7 * normal(heads, D, seed=10), mx.exp(0.3 * normal(heads, D, seed=11)),
        metric=mx.array(metric.astype(np.float32)),
    )  # fmt: skip
    join = "," if ":" in spec else ":"
    return make_format(Spec.parse(f"{spec}{join}rounding=feedback"), D, keys=keys)


def keys_of(rows: mx.array, fmt: Format) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and vectors of the keys."""
    words, _, scales, _ = levels.split(rows, fmt.layout)
    bits = fmt.layout.wide.k_bits
    y = levels.read_levels(words, scales, bits, fmt.layout.k_group, fmt.scale)
    return np.array(levels.unpack_codes(words, bits)), np.array(scales), np.array(y, np.float64)


def assert_alike(got: mx.array, want: mx.array, k: mx.array, fmt: Format) -> None:
    lay = fmt.layout
    for a, b in zip(levels.split(got, lay)[1::2], levels.split(want, lay)[1::2], strict=True):
        assert mx.array_equal(a, b)  # of the values
    (n, s, y), (n0, s0, y0) = keys_of(got, fmt), keys_of(want, fmt)
    assert (n != n0).mean() < 0.01
    assert (np.abs(s - s0) > 1e-3 * s0).mean() < 0.01
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
