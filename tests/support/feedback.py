"""Keys rounded with feedback: formats, and how a kernel's rows are compared with plain ones.

A number that is nearly half-way between two codes may go to another one, since sums are in another
order; later codes of its vector then differ. So codes are compared by the part that differs, and
what they are worth by the cost that feedback lowers.
"""

import mlx.core as mx
import numpy as np

from mlx_kvq.format import levels
from mlx_kvq.format.format import Format, make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.format.transform import Calibration

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


def _normal(*shape: int, seed: int) -> mx.array:
    x = np.random.default_rng((seed, *shape)).standard_normal(shape)
    return mx.array(x.astype(np.float32))


def weighted(spec: str, D: int, heads: int = 2, centred: bool = True) -> Format:
    """A format with feedback for queries of a few strong directions."""
    strong = np.array(_normal(heads, D, D // 4, seed=3)) * 4
    metric = strong @ strong.swapaxes(1, 2) / D + np.eye(D)
    mu = 0.7 * _normal(heads, D, seed=10) if centred else None
    keys = Calibration(
        mu, mx.exp(0.3 * _normal(heads, D, seed=11)),
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


def assert_same_levels(got: mx.array, want: mx.array, fmt: Format, differ: float = 0.0) -> None:
    """``differ``: part of the values' words and scales that rounding may turn, or one of them; half
    of it of the keys' scales, 0.01 at least."""
    lay = fmt.layout
    for a, b in zip(levels.split(got, lay)[1::2], levels.split(want, lay)[1::2], strict=True):
        apart = (np.nan_to_num(np.array(a)) != np.nan_to_num(np.array(b))).mean()
        most = max(differ, 1 / a.size) if differ else 0.0
        assert apart <= most, f"{apart:.2g} of the values' {a.dtype}"
    (n, s, _), (n0, s0, _) = keys_of(got, fmt), keys_of(want, fmt)
    assert (n != n0).mean() < 0.01, f"{(n != n0).mean():.2g} of the keys' codes"
    assert (np.isnan(s) == np.isnan(s0)).all(), "damage in other groups"
    off = np.abs(np.nan_to_num(s) - np.nan_to_num(s0)) / np.maximum(np.nan_to_num(s0), 1e-8)
    limit = max(0.01, differ / 2)
    assert (off > 1e-3).mean() < limit, f"{(off > 1e-3).mean():.2g} of the keys' scales"


def assert_alike(
    got: mx.array, want: mx.array, k: mx.array, fmt: Format, differ: float = 0.0
) -> None:
    assert_same_levels(got, want, fmt, differ)
    y, y0 = keys_of(got, fmt)[2], keys_of(want, fmt)[2]
    x = np.array(fmt.keys.forward(k.astype(mx.float32)), np.float64)
    M = np.array(fmt.keys.calibration.metric, np.float64)
    ones = mx.broadcast_to(mx.eye(k.shape[3]), (1, k.shape[1], k.shape[3], k.shape[3]))
    A = np.array(fmt.keys.query(ones), np.float64)[0]  # error of y -> of the key
    M = A.swapaxes(1, 2) @ M @ A
    cost, cost0 = (np.einsum("bhnd,hde,bhne->", e, M, e) for e in (y - x, y0 - x))
    assert cost <= 1.02 * cost0, f"{cost / cost0:.3f} of the cost"
