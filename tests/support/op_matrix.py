"""The op matrix: one list of cases for the three operations, checked on every backend.

A backend is a module with ``quantize_pack``, ``dequantize`` and ``attend`` as in
``mlx_kvq.ops.plain``; ``check(backend, case)`` compares it with the float64 oracle on fresh random
data. The seed is printed, and ``MLX_KVQ_SEED`` repeats it.

``CASES`` meets every pair of values of two factors that can meet, the most telling cases first, so
a slow backend may take a slice from the front. ``product()`` is every format and dtype, for
``MLX_KVQ_FULL=1``.
"""

import itertools
import os
import secrets
from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_kvq import ops
from mlx_kvq.format.format import Format, make_format
from mlx_kvq.format.spec import BITS, Spec
from mlx_kvq.format.transform import Calibration
from tests.support import calls, oracle
from tests.support.op_cases import CASES, Case, product

__all__ = ["CASES", "Case", "check", "product"]

DTYPES = {"fp16": mx.float16, "bf16": mx.bfloat16, "fp32": mx.float32}
TAIL_DTYPES = DTYPES | {"fp16": mx.bfloat16}  # a rotated vector may be too large for fp16

# Largest error of an attention output, relative to the largest channel of its vector: one rounding
# to the dtype at the end (2^-11, 2^-8), and fp32 all the way before it. The reference backend came
# to 4.8e-4, 3.9e-3 and 1.2e-5 in 36 runs of all cases.
TOLERANCE = {"fp16": 6e-4, "bf16": 4.5e-3, "fp32": 2e-5}
# The kernels' operands are fp16 (queries, probabilities, dequantized values), whatever the dtype:
# the error of an output vector, relative to the vector, both in the Euclidean norm.
FUSED_TOLERANCE = {"fp16": 2e-3, "bf16": 4e-3, "fp32": 2e-3}
# Largest error of a rotated value, relative to the norm of its vector: 2.6e-7 in 3 runs.
SLACK = 5e-7


class _Data:
    """Inputs of a case, as the backend gets them (mx) and as the oracle does (float64)."""

    def __init__(self, case: Case, rng: np.random.Generator):
        (B, H), T, L = case.heads, case.length, case.queries
        Hq = H * case.gqa
        self.case, self.rng, self.dtype = case, rng, DTYPES[case.dtype]
        self.spec = Spec(*f"{case.bits}-{case.rotation}".split("-"), scale=case.rule)
        self.spec = replace(self.spec, seed=int(rng.integers(2**32)), recent=case.recent or 0)
        self.spec = replace(self.spec, first=case.first or 0)
        self.k, self.k64 = self._array(self._vectors((B, H, T, case.dims[0]), oracle.KEYS))
        self.v, self.v64 = self._array(self._vectors((B, H, T, case.dims[1]), oracle.VALUES))
        rms = np.sqrt(np.mean(np.where(np.isfinite(self.k64), self.k64, 0) ** 2))
        q = rng.standard_normal((B, Hq, L, case.dims[0])) * 2 / max(rms, 1)
        self.q, self.q64 = self._array(q)
        self.scale = case.dims[0] ** -0.5
        self.sinks = self.sinks64 = None
        self.starts: mx.array | None = None
        self.mask: mx.array | str | None = None
        self.visible = self.mask64 = np.ones((B, Hq, L, T), bool)
        self.first: ops.First | None = None
        if case.sinks:
            self.sinks, self.sinks64 = self._array(rng.standard_normal(Hq), transposed=False)
        self._make_mask(B, Hq, L, T)
        # Scales of the calibration follow the data's, as those of a calibration pass do.
        self.k_params = self._calibration("keys", H, self.k64)
        self.v_params = self._calibration("values", H, self.v64)
        self.format = self._make_format()
        self._make_exact(B, H, T, L)

    def _make_exact(self, B: int, H: int, T: int, L: int) -> None:
        """The exact tail and the exact first tokens, the vectors in them for the oracle, and which
        queries read them. Rows may be a ring: [:keep], [idx:], [keep:idx] is then the order of
        their tokens, and the first ones are in no tail."""
        case, rng = self.case, self.rng
        self.tail = self.ring = self.exact = None
        if case.recent is None and case.first is None:
            return
        keep, idx = 0, T
        # By a window or a start, queries tell how old a row is from its place.
        if case.window is None and not case.starts and T > 2 and rng.random() < 0.6:
            keep = int(rng.integers(min(T - 1, 5)))
            idx = int(rng.integers(keep + 1, T + 1)) if L == 1 else T
            self.ring = keep, idx
        at = np.arange(T)
        order = np.concatenate([at[:keep], at[idx:], at[keep:idx]])
        y = self._rotated()
        kept = TAIL_DTYPES[case.dtype]
        rounded = np.array(mx.array(y.astype(np.float32)).astype(kept).astype(mx.float32))
        reads = np.zeros((B, L, T), bool)
        if case.first is not None:
            for b, tokens in enumerate(self._make_first(y[:, :, order], keep, order)):
                reads[b][:, order[tokens]] = True
        if case.recent is not None:
            R = self.format.recent_at(T) + L - 1 + int(rng.integers(3))
            newest = y[:, :, order][:, :, -R:]
            before = rng.standard_normal((B, H, R - newest.shape[2], y.shape[3]))  # of no row
            whole = mx.array(np.concatenate([before, newest], axis=2).astype(np.float32))
            self.tail = whole.astype(kept)
            starts = np.zeros(B, int) if self.starts is None else np.array(self.starts)
            for i in range(L):
                last = T - L + i + 1  # the query is the last of so many tokens, and padding
                for b, n in enumerate(last - starts):
                    oldest = max(keep, last - self.format.recent_at(int(n)))
                    reads[b, i, order[oldest:]] = True
        self.exact = rounded[..., : case.dims[0]], rounded[..., case.dims[0] :], reads

    def _rotated(self) -> np.ndarray:
        """Keys and values as codes are made of them, [B, H, T, Dk + Dv], without damage."""
        rotation, seed = self.spec.rotation, self.spec.seed
        sides = [
            np.nan_to_num(
                oracle.forward(x, rotation, seed, stream, *params), posinf=0.0, neginf=0.0
            )
            for stream, (x, params) in enumerate(
                ((self.k64, self.k_params), (self.v64, self.v_params))
            )
        ]
        return np.concatenate(sides, axis=-1)

    def _make_first(self, y: np.ndarray, keep: int, order: np.ndarray) -> list[np.ndarray]:
        """First tokens of vectors in the order of their tokens; of each sequence, which are there.
        What comes before the first one is padding, which a mask hides."""
        (B, H, T, D), rng, F = y.shape, self.rng, self.case.first
        count = int(rng.integers(F + 1))
        if is_ring := self.ring is not None and keep > 0:
            count = min(count, keep)  # all others may have gone
        places = np.zeros(B, int) if is_ring else rng.integers(-3, 1, size=B)
        own = rng.random() < 0.5
        if self.starts is not None:
            places, own = np.array(self.starts), True
        elif self.mask is not None and self.case.mask == "bool B11T" and not is_ring:
            places, own = rng.integers(-3, T, size=B), True
            for b, place in enumerate(places):
                seen = np.array(self.mask)
                seen[b, ..., order[: max(0, place)]] = False
                self.mask = mx.array(seen)
                self.visible = self.mask64 = self.visible & seen
        elif not own:
            places[:] = places[0]
        array = rng.standard_normal((B, H, F, D)) * (np.abs(y).mean() + 1e-30)
        found = []
        for b, place in enumerate(places):
            tokens = np.arange(count) + place
            there = (tokens >= 0) & (tokens < T)
            array[b, :, :count][:, there] = y[b, :, tokens[there]].swapaxes(0, 1)
            found.append(tokens[there])
        self.firsts = found
        kept = mx.array(array.astype(np.float32)).astype(TAIL_DTYPES[self.case.dtype])
        at = mx.array(places, dtype=mx.int32) if own else int(places[0])
        self.first = ops.First(kept, count, at)
        return found

    def _array(self, x, transposed: bool = True) -> tuple[mx.array, np.ndarray]:
        if not transposed:
            a = mx.array(x.astype(np.float32)).astype(self.dtype)
        else:  # the strides that models hand over: [B, T, H, D] in memory
            a = mx.array(np.ascontiguousarray(x.swapaxes(1, 2)).astype(np.float32))
            a = mx.contiguous(a.astype(self.dtype)).swapaxes(1, 2)
        return a, np.array(a.astype(mx.float32)).astype(np.float64)

    def _vectors(self, shape: tuple[int, ...], stream: int) -> np.ndarray:
        rng, data = self.rng, self.case.data
        x = rng.standard_normal(shape) * np.exp(0.5 * rng.standard_normal(shape[-1]))
        if data in ("signs", "aligned", "full", "channel"):
            return self._extremes(shape, stream)
        size = {"zeros": 0.0, "tiny": 1e-20, "subnormal": 2e-6, "small": 1e-5}.get(data, 1.0)
        if data == "large":  # beyond the largest fp16 scale, if the dtype can
            size = 5e3 if self.case.dtype == "fp16" else 1e7
            x = np.clip(x, -4, 4)
        if data == "constant":
            x[...] = x[..., :1]
        x *= size
        strange = {"outlier": [2e4, -2e4], "nan": [np.nan], "inf": [np.inf, -np.inf]}
        for value in strange.get(data, []):
            x[tuple(rng.integers(n) for n in shape)] = value
        return x

    def _extremes(self, shape: tuple[int, ...], stream: int) -> np.ndarray:
        """Numbers of fp16 whose rotated vectors may be none."""
        rng, data, D = self.rng, self.case.data, shape[-1]
        if data == "full":
            return np.full(shape, oracle.FP16_MAX)
        if data == "channel":
            x = rng.standard_normal(shape)
            x[..., int(rng.integers(D))] = oracle.FP16_MAX * rng.choice([-1, 1], shape[:-1])
            return x
        if data == "aligned":  # with a row of R, any for each token
            R = oracle.rotate(np.eye(D), self.spec.rotation, self.spec.seed, stream).T
            return 8e3 * np.sign(R[rng.integers(D, size=shape[:-1])])
        return 3e4 * rng.choice([-1.0, 1.0], shape)

    def _make_mask(self, B: int, Hq: int, L: int, T: int) -> None:
        """The arguments that hide positions, and for the oracle one mask [B, Hq, L, T]."""
        query, key = np.arange(T - L, T)[:, None], np.arange(T)
        self.visible = np.ones((B, Hq, L, T), bool)
        self.window = self.case.window
        if self.case.starts:
            starts = self.rng.integers(T, size=B)
            self.starts = mx.array(starts, dtype=mx.int32)
            self.visible &= key >= starts[:, None, None, None]
        if self.window is not None:
            self.visible &= key > query - self.window
        self.mask = self.case.mask
        if self.mask == "causal":
            self.visible &= key <= query
        self.mask64 = self.visible
        if self.mask not in (None, "causal"):
            kind, axes = self.mask.split()
            sizes = {"B": B, "H": Hq, "L": L, "T": T, "1": 1}
            shape = tuple(sizes[axis] for axis in axes)
            seen = self.rng.random(shape) < 0.6
            seen[..., self.rng.integers(T)] = True
            self.mask, added = mx.array(seen), 0.0
            if kind == "add":
                hidden = -np.inf if axes != "1H1T" else float(mx.finfo(self.dtype).min)
                added = np.where(seen, self.rng.standard_normal(shape), hidden)
                self.mask, added = self._array(added, transposed=False)
            elsewhere = np.where(self.visible, 0.0, -np.inf)
            self.visible = self.visible & seen
            self.mask64 = elsewhere + added if kind == "add" else self.visible

    def _calibration(self, side: str, H: int, x: np.ndarray) -> list[np.ndarray | None]:
        words = self.case.calibration.split()
        other = {"keys": "values", "values": "keys"}[side]
        size = np.abs(np.where(np.isfinite(x), x, 0)).mean() or 1.0

        def parameter(name: str, values: np.ndarray) -> np.ndarray | None:
            # Rounded to fp32 before the oracle sees it: that is what a calibration file holds.
            if other in words or name not in words:
                return None
            return values.astype(np.float32).astype(np.float64)

        normal = self.rng.standard_normal((3, H, x.shape[-1]))
        sigma, lam = np.exp(0.7 * normal[1]), np.exp(0.5 * normal[2])
        return [
            parameter("mu", size * normal[0]),
            parameter("sigma", sigma),
            parameter("lam", lam),
        ]

    def _make_format(self) -> Format:
        def calibration(params) -> Calibration | None:
            arrays = [None if p is None else mx.array(p.astype(np.float32)) for p in params]
            return None if all(p is None for p in params) else Calibration(*arrays)

        k_group, v_group = self.case.dims if self.case.group == "D" else [self.case.group] * 2
        keys, values = calibration(self.k_params), calibration(self.v_params)
        return make_format(
            self.spec, *self.case.dims, k_group=k_group, v_group=v_group, keys=keys, values=values
        )


def check(backend, case: Case, seed: int | None = None, *, fused: bool = False) -> dict[str, float]:
    """Compare the three operations of a backend with the oracle; returns the largest errors.

    Args:
        fused (bool): The backend computes with half-precision operands (``FUSED_TOLERANCE``).

    Raises:
        AssertionError: If one is off.
    """
    if seed is None:
        seed = int(os.environ.get("MLX_KVQ_SEED") or secrets.randbits(32))
    print(f"MLX_KVQ_SEED={seed} {case}")
    with np.errstate(invalid="ignore"):  # NaN and inf are among the data
        return _check(backend, case, _Data(case, np.random.default_rng(seed)), fused)


def _check(backend, case: Case, data: _Data, fused: bool) -> dict[str, float]:
    rows = calls.quantize_pack(backend, data.k, data.v, data.format)
    (B, H), T = case.heads, case.length
    layout = _layout(data)
    assert (rows.dtype, rows.shape) == (mx.uint32, (B, H, T, oracle.row_words(*layout)))
    errors = _check_rows(data, backend, np.array(rows))

    # Spare capacity holds NaN scales and, behind them, what an earlier sequence left.
    spare = np.full((B, H, 5, rows.shape[-1]), 0xFFFFFFFF, np.uint32)
    spare[..., 3:, :] = data.rng.integers(2**32, size=spare[..., 3:, :].shape)
    buffer = mx.concatenate([rows, mx.array(spare)], axis=2)
    stored = oracle.unpack_row(np.array(rows), *layout, case.rule)
    _check_dequantize(data, backend, buffer, stored)
    _check_restore(data, backend, buffer, stored)
    if case.recent is not None:
        _check_tail(data, backend, rows)
    return errors | _check_attend(data, backend, buffer, stored, fused)


def _layout(data: _Data) -> tuple[int, ...]:
    lay = data.format.layout
    return *data.case.dims, *BITS[data.case.bits], lay.k_group, lay.v_group


def _check_rows(data: _Data, backend, rows: np.ndarray) -> dict[str, float]:
    Dk, Dv, k_bits, v_bits, k_group, v_group = _layout(data)
    many = Dk // k_group, Dv // v_group
    first = rows.shape[-1] - (sum(many) + 1) // 2
    scales = np.ascontiguousarray(rows[..., first:]).view(np.float16).astype(np.float64)
    k_scales, v_scales, padding = np.split(scales, np.cumsum(many), -1)
    assert not padding.any(), "the half behind an odd number of scales is not zero"
    if sum(D // 16 for D, bits in ((Dk, k_bits), (Dv, v_bits)) if bits in oracle.LOW) % 2:
        assert not (rows[..., first - 1] >> 16).any(), "the half behind the high bits is not zero"
    k_codes, v_codes = oracle.unpack_codes(rows, Dk, Dv, k_bits, v_bits)
    made_of: list = [None, None]
    if TAIL_DTYPES[data.case.dtype] == mx.bfloat16:
        kept = backend.quantize_pack(data.k, data.v, data.format, None, data.case.length)[1]
        made_of = np.split(np.array(kept.astype(mx.float32)).astype(np.float64), [Dk], axis=-1)
    k_own, v_own = made_of
    k = _check_side(data, oracle.KEYS, data.k64, data.k_params, k_codes, k_scales, k_bits, k_own)
    v = _check_side(data, oracle.VALUES, data.v64, data.v_params, v_codes, v_scales, v_bits, v_own)
    return {name: max(k[name], v[name]) for name in k}


def _check_side(data, stream, x, params, codes, scales, bits, made_of) -> dict[str, float]:
    """Codes [B, H, T, D] and scales [B, H, T, G] of keys or of values against the oracle; of a
    model in half precision those of ``made_of``, y in bf16 as the backend keeps it.

    A backend's y is off by up to ``slack``, so a code may be any of those within it (mostly one),
    and a scale the fp16 neighbour. Of the searched scales any may be taken whose angle is the
    smallest but for that noise and the rounding of a cosine in fp32.
    """
    rule, rotation = data.case.rule, data.spec.rotation
    y = oracle.forward(x, rotation, data.spec.seed, stream, *params)
    want_codes, want_scales, _ = oracle.quantize(y, bits, y.shape[-1] // scales.shape[-1], rule)

    def grouped(a):
        return a.reshape(*scales.shape, -1)

    broken = ~np.isfinite(grouped(y)).all(axis=-1)
    assert np.array_equal(np.isnan(scales), broken), "NaN scales: those of damaged groups, no other"
    assert not grouped(codes)[broken].any(), "codes of a damaged group are 0"
    if rotation == "none":
        slack = noise = SLACK * np.abs(y)
    else:
        mu, sigma, lam = (oracle._per_head(*p) for p in zip(params, (0.0, 1.0, 1.0), strict=True))
        norm = np.linalg.norm((x - mu) / sigma, axis=-1, keepdims=True)
        slack = SLACK * norm * np.abs(lam) * np.ones_like(y)
        noise = slack * 2 / np.sqrt(y.shape[-1])
    if made_of is not None:
        known = np.isfinite(y) & np.isfinite(made_of)
        # A centre may cancel; a GPU may take the smallest numbers for 0.
        most = slack + SLACK * np.nanmax(np.abs(np.where(known, y, 0)), -1, keepdims=True) + 1e-37
        assert (np.abs(y - made_of) <= most + 2.0**-8 * np.abs(y))[known].all(), "y in bf16"
        assert (np.isnan(y) | known | (np.abs(y) > 3.3e38)).all(), "damage that y does not have"
        y = made_of
        want_codes, want_scales, _ = oracle.quantize(y, bits, y.shape[-1] // scales.shape[-1], rule)
    # From here on one row per sound group: [n, g], scales [n, 1].
    y, slack, noise, n, want_n = (grouped(a)[~broken] for a in (y, slack, noise, codes, want_codes))
    scale, want_scale = scales[~broken][:, None], want_scales[~broken][:, None]
    if not len(y):
        return {"codes": 0.0, "scales": 0.0}
    offset = oracle._offset(bits, rule)
    outermost = offset - 1 if rule == "paper" else offset
    searched = rule == "search" and bits != 8
    factors = oracle.tried(y.shape[1], bits) if searched else (1.0,)
    top, top_slack = np.abs(y).max(axis=1, keepdims=True), slack.max(axis=1, keepdims=True)

    # Of every scale that may have been tried: whether the codes are its codes.
    tried, best = [], np.full_like(scale, -np.inf)
    for factor in factors:
        tops = [np.maximum(top + sign * top_slack, 0) for sign in (-1, 0, 1)]
        if searched:
            ends = [oracle._searched(x, factor, bits) for x in tops]
        else:
            ends = [oracle._covering(x, outermost) for x in tops]
        for end in ends:
            end = end if searched else np.clip(scale, ends[0], ends[-1])
            low, high = (oracle._encode(y + sign * slack, end, bits, rule) for sign in (-1, 1))
            # Several numbers of bf16 are often on a boundary at once, and turn each for itself.
            tied = (low != high).sum(axis=1, keepdims=True) > (1 if made_of is not None else n.size)
            tried.append((end, ((n >= low) & (n <= high)).all(axis=1, keepdims=True), tied))
        if searched:
            # Channels on a boundary of the very scale turn on either side, upwards or outwards.
            around = (ends[0], np.where(ends[0] == 0, 0, ends[1]), ends[2])
            outwards = slack * np.sign(y)
            turned = (y, y + slack, y - slack, y + outwards, y - outwards)
            found = [
                oracle._cosine(y, oracle._encode(x, e, bits, rule), bits)
                for e, x in itertools.product(around, turned)
            ]
            best = np.maximum(best, np.min(found, axis=0))
    length, off = (np.linalg.norm(a, axis=1, keepdims=True) for a in (y, noise))
    relative = off / np.where(length == 0, 1, length)
    sound = np.zeros_like(scale, bool)
    for end, its, tied in tried:
        if not searched:
            sound |= its & (scale == end)
            continue
        # The length in fp32, and in it the noise of y.
        real = np.where(end == 0, 0.0, oracle._length_scale(y, n, bits))
        spread = np.where(end == 0, 0.0, real * 2e-6 + 2 * off)
        low, high = (oracle._fp16(np.maximum(real + x, 0)) for x in (-spread, spread))
        close = (end == 0) | tied | (oracle._cosine(y, n, bits) >= best - 2e-6 - 2 * relative)
        sound |= its & close & (scale >= low) & (scale <= high)
    assert sound.any() or not len(sound)
    assert sound.all(), (
        f"{(~sound).sum()} of {sound.size} groups have codes or a scale of no candidate, or of one "
        f"at a larger angle: {y[~sound[:, 0]][:1]} {n[~sound[:, 0]][:1]} {scale[~sound][:1]}"
    )

    same = scale == want_scale
    differ, others = ((n != want_n) & same).sum(), (~same).sum()
    if data.case.data == "normal":  # the others sit on boundaries by the nature of their data
        # By the paper's rule numbers of bf16 are often on a boundary: on an H200 2 in 1,000.
        ties = made_of is not None and rule == "paper"
        most = 2 + (4e-3 if ties else 1e-3) * n.size
        assert differ <= most, f"{differ} of {n.size} codes are not the oracle's"
        assert others <= 2 + 5e-3 * scale.size, f"{others} of {scale.size} scales"
    return {"codes": differ / n.size, "scales": others / scale.size}


def _check_dequantize(data: _Data, backend, buffer: mx.array, stored) -> None:
    """Values are products of an fp16 scale and a short level: exact in fp32, then rounded once."""
    for dtype in (mx.float32, data.dtype):
        got = calls.dequantize(backend, buffer, data.case.length, data.format, dtype)
        for a, want in zip(got, stored, strict=True):
            want = mx.array(_saturated(want, dtype).astype(np.float32)).astype(dtype)
            assert (a.dtype, a.shape) == (dtype, want.shape)
            assert mx.array_equal(a, want, equal_nan=True), f"dequantize to {dtype}"
        if data.first is not None and data.ring is None:
            found = calls.dequantize(
                backend, buffer, data.case.length, data.format, dtype, first=data.first
            )
            for a, b, side in zip(found, got, _first_sides(data), strict=True):
                want = np.array(b.astype(mx.float32))
                _put_first(data, want, _saturated(side, dtype))
                assert mx.array_equal(a, mx.array(want).astype(dtype), equal_nan=True)
        if data.tail is not None:
            n = min(data.tail.shape[2], data.case.length)
            last = np.array(data.tail[:, :, data.tail.shape[2] - n :].astype(mx.float32))
            last = mx.array(_saturated(last, dtype)).astype(dtype)
            ends = last[..., : data.case.dims[0]], last[..., data.case.dims[0] :]
            found = calls.dequantize(
                backend, buffer, data.case.length, data.format, dtype, data.tail
            )
            for a, b, end in zip(found, got, ends, strict=True):
                b[:, :, b.shape[2] - n :] = end
                assert mx.array_equal(a, b, equal_nan=True), f"dequantize to {dtype} with a tail"


def _first_sides(data: _Data) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of the exact first tokens, fp32."""
    assert data.first is not None
    array, D = np.array(data.first.array.astype(mx.float32)), data.case.dims[0]
    return array[..., :D], array[..., D:]


def _put_first(data: _Data, y: np.ndarray, side: np.ndarray) -> None:
    """In vectors of rows, those of first tokens in place of their own."""
    assert data.first is not None
    places = np.broadcast_to(np.array(data.first.at), (len(y),))
    for b, (tokens, place) in enumerate(zip(data.firsts, places, strict=True)):
        y[b][:, tokens] = side[b][:, tokens - place]


def _saturated(x: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """Finite numbers stay finite in fp16."""
    return np.clip(x, -oracle.FP16_MAX, oracle.FP16_MAX) if dtype == mx.float16 else x


def _check_restore(data: _Data, backend, buffer: mx.array, stored) -> None:
    """Out of the rotation, with and without a tail; of a vector, in the Euclidean norm."""
    rounding = {"fp16": 2.0**-11, "bf16": 2.0**-8, "fp32": 0.0}[data.case.dtype]
    rotation, seed, T = data.spec.rotation, data.spec.seed, data.case.length
    sides = (oracle.KEYS, data.k_params), (oracle.VALUES, data.v_params)
    first = data.first if data.ring is None else None
    for tail in (None,) if data.tail is None else (None, data.tail):
        ends: tuple = (None, None)
        if tail is not None:
            n, D = min(tail.shape[2], T), data.case.dims[0]
            last = np.array(tail[:, :, tail.shape[2] - n :].astype(mx.float32)).astype(np.float64)
            ends = last[..., :D], last[..., D:]
        got = calls.restore(backend, buffer, T, data.format, data.dtype, tail, None, first)
        some = slice(start := int(data.rng.integers(T)), start + int(data.rng.integers(1, 40)))
        chunk = data.k[:, :, some], data.v[:, :, some]
        more = calls.restore(backend, buffer, T, data.format, data.dtype, tail, chunk, first)
        for x, y, z in zip(got, chunk, more, strict=True):
            assert mx.array_equal(mx.concatenate([x, y], axis=2), z, equal_nan=True)
        beginnings = (None, None) if first is None else _first_sides(data)
        for a, y, end, begin, (stream, params) in zip(
            got, stored, ends, beginnings, sides, strict=True
        ):
            if begin is not None:
                y = y.copy()
                _put_first(data, y, begin)
            y = y if end is None else np.concatenate([y[:, :, : T - n], end], axis=2)
            want = oracle.backward(y, rotation, seed, stream, *params)
            want = _saturated(want, data.dtype)
            assert (a.dtype, a.shape) == (data.dtype, want.shape)
            a = np.array(a.astype(mx.float32)).astype(np.float64)
            _, sigma, lam = (
                oracle._per_head(*p) for p in zip(params, (0.0, 1.0, 1.0), strict=True)
            )
            size = np.linalg.norm(y / lam, axis=-1, keepdims=True)
            # Twice SLACK: λ, the way back and σ round one after the other (5.02e-7 was seen). The
            # reference's dense product adds up 256 terms in order, at worst D · 2^-24 = 1.5e-5: of
            # an outlier 2.05e-6 was seen.
            slack = (8 if rotation == "srht" else 2) * SLACK * size * sigma
            slack = slack + rounding * np.abs(want)
            slack = slack + (6e-8 if data.case.dtype == "fp16" else 1e-37) + 2e-7 * np.abs(want)
            whole = np.isfinite(y).all(axis=-1, keepdims=True) & np.ones_like(want, bool)
            assert not np.isfinite(a[np.isnan(want)]).any(), "restore hides damage"
            off = np.abs(a - want)[whole] - slack[whole]
            assert (off <= 0).all(), (
                f"restore is off by {off.max():.2g} more than {slack.max():.2g}"
            )


def _check_tail(data: _Data, backend, rows: mx.array) -> None:
    """Tokens in one chunk, or in two: the same rows, and the newest rotated vectors beside them."""
    (B, H), T, rng, recent = data.case.heads, data.case.length, data.rng, data.case.recent
    first, keeps = int(rng.integers(T + 1)), []
    parts, tail = [], None
    for a, b in ((0, first), (first, T)):
        if a < b:
            # Beyond the first chunk, at most what is there.
            most = recent + 3 if tail is None else tail.shape[2] + b - a
            keeps.append(int(rng.integers(1, most + 1)))
            chunk = data.k[:, :, a:b], data.v[:, :, a:b]
            arguments = *chunk, data.format, tail, keeps[-1]
            if tail is not None and keeps[-1] >= b - a and rng.random() < 0.5:  # packed later
                tail = backend.keep_exact(*arguments)
                part = backend.pack_rotated(tail[:, :, a - b :], data.format)
            elif rng.random() < 0.5:  # with room for more
                room = int(rng.integers(20))
                part, tail = backend.quantize_pack(*arguments, b - a + room)
                assert part.shape[2] == b - a + room and not part[:, :, b - a :].any()
                part = part[:, :, : b - a]
            else:
                part, tail = backend.quantize_pack(*arguments)
            parts.append(part)
            if rng.random() < 0.5 and tail.shape[2] > 1:
                tail = tail[:, :, 1:]  # a view, as where tokens are taken back
    assert mx.array_equal(mx.concatenate(parts, axis=2), rows)
    assert tail.dtype == TAIL_DTYPES[data.case.dtype]
    rounding = 2.0**-8 if TAIL_DTYPES[data.case.dtype] == mx.bfloat16 else 0.0
    got = np.array(tail.astype(mx.float32)).astype(np.float64)
    assert got.shape[:2] == (B, H)
    # What was not kept the first time is gone: zeros come before it.
    n = min(got.shape[2], T)
    assert not got[:, :, : got.shape[2] - n].any()
    for stream, x, params, y in (
        (oracle.KEYS, data.k64, data.k_params, got[..., : data.case.dims[0]]),
        (oracle.VALUES, data.v64, data.v_params, got[..., data.case.dims[0] :]),
    ):
        rotation = data.spec.rotation
        want = oracle.forward(x, rotation, data.spec.seed, stream, *params)[:, :, T - n :]
        mu, sigma, lam = (oracle._per_head(*p) for p in zip(params, (0.0, 1.0, 1.0), strict=True))
        norm = np.linalg.norm(((x - mu) / sigma)[:, :, T - n :], axis=-1, keepdims=True)
        slack = SLACK * norm * np.abs(lam) + rounding * np.abs(want)
        slack = slack + 1e-37
        y = y[:, :, y.shape[2] - n :]
        whole = np.isfinite(want).all(axis=-1, keepdims=True) & np.ones_like(want, bool)
        assert not np.isfinite(y[~whole]).all() or whole.all(), "the tail hides damage"
        assert (np.abs(y - want)[whole] <= slack[whole]).all(), "the tail is off"


def _check_attend(data: _Data, backend, buffer: mx.array, stored, fused) -> dict[str, float]:
    case, Hq = data.case, data.q.shape[1]
    options = data.mask, data.sinks, data.starts, data.window, data.tail, data.ring, data.first
    got = calls.attend(backend, data.q, buffer, case.length, data.format, data.scale, *options)
    assert (got.dtype, got.shape) == (data.dtype, (*data.q.shape[:3], case.dims[1]))
    got = np.array(got.astype(mx.float32)).astype(np.float64)

    sound = [np.nan_to_num(a) for a in stored]
    want = oracle.attend(
        data.q64,
        *sound,
        data.scale,
        rotation=data.spec.rotation,
        seed=data.spec.seed,
        mask=data.mask64,
        sinks=data.sinks64,
        k_params=data.k_params,
        v_params=data.v_params,
        exact=data.exact,
    )
    # Damage shows to every query that sees it, in all channels or in those of a value's group. One
    # that does not see it may show it too, as 0 * NaN in a dense product; nobody else may.
    bad_v = oracle.backward(stored[1], data.spec.rotation, data.spec.seed, 1, *data.v_params)
    bad = np.isnan(stored[0]).any(axis=-1, keepdims=True) | np.isnan(bad_v)  # [B, Hkv, T, Dv]
    bad = oracle._heads(bad, Hq)
    of_rows = data.visible if data.exact is None else data.visible & ~data.exact[2][:, None]
    must = of_rows.astype(np.float32) @ bad.astype(np.float32) > 0
    may = bad.any(axis=(-1, -2), keepdims=True)
    shown = np.isnan(got)
    assert not (must & ~shown).any(), "attend hides damage"
    assert not (shown & ~may).any(), "attend gives NaN without damage"
    want = np.where(shown, 0.0, want)
    got = np.where(shown, 0.0, got)
    if data.sinks is None:  # a query without a position may get anything finite
        want = np.where(data.visible.any(axis=-1, keepdims=True), want, got)
    assert np.isfinite(got).all(), "attend gives an infinity"
    want = _saturated(want, data.dtype)  # one value alone may be beyond it
    if data.exact is not None:
        sound = [np.concatenate(x, axis=2) for x in zip(sound, data.exact[:2], strict=True)]
    noise = _noise(data, *sound)
    if fused:
        tolerance = FUSED_TOLERANCE[case.dtype]
        error = np.linalg.norm(got - want, axis=-1, keepdims=True)
        size = np.linalg.norm(want, axis=-1, keepdims=True)
        if case.data != "normal":
            # What is left of values that cancel (constants, a centre taken off zeros), or of
            # logits a thousand times larger than others (an outlier), is no measure of them.
            noise = noise + _noise(data, *sound, logits=2.0**-12, sums=tolerance / 4)
        limit = tolerance * size + noise * np.sqrt(want.shape[-1])
    else:
        tolerance = TOLERANCE[case.dtype]
        error = np.abs(got - want)
        limit = tolerance * np.abs(want).max(axis=-1, keepdims=True) + noise
    worst = float(np.max(error / np.maximum(limit, 1e-30)))
    assert worst <= 1, f"attend is off by {worst:.3g} times what is allowed"
    return {"attend": worst * tolerance}


def _noise(
    data: _Data, k: np.ndarray, v: np.ndarray, logits: float = 8e-7, sums: float | None = None
) -> np.ndarray:
    """What fp32, or an arithmetic with these relative errors, may be off by in any order of
    operations, [B, Hq, L, 1]: the round-off of the logits, which grows with the vectors, and of the
    sum, which grows with its terms where all are alike, both times the largest value; and the
    smallest step of an fp16 output."""
    Hq, shape = data.q.shape[1], (1, k.shape[1], 1, k.shape[-1])
    mu, sigma, lam = (
        oracle._heads(np.broadcast_to(oracle._per_head(*p), shape), Hq)
        for p in zip(data.k_params, (0.0, 1.0, 1.0), strict=True)
    )
    rotation, seed = data.spec.rotation, data.spec.seed
    q = oracle.rotate(data.q64 * sigma, rotation, seed, oracle.KEYS) / lam
    longest = np.linalg.norm(k, axis=-1).max(axis=-1)[..., None, None]  # [B, Hkv, 1, 1]
    logit = np.linalg.norm(q, axis=-1, keepdims=True) * oracle._heads(longest, Hq)
    if data.sinks is not None:
        logit = logit + np.abs(data.q64 * mu).sum(axis=-1, keepdims=True)
    values = oracle.backward(v, rotation, seed, oracle.VALUES, *data.v_params)
    centred = oracle.backward(v, rotation, seed, oracle.VALUES, None, *data.v_params[1:])
    largest = np.maximum(np.abs(values), np.abs(centred)).max(axis=(-1, -2))[..., None, None]
    step = 6e-8 if data.dtype == mx.float16 else 0.0
    if sums is None:
        sums = max(4e-6, 2.4e-8 * data.case.length)
    return (logits * data.scale * logit + sums) * oracle._heads(largest, Hq) + step
