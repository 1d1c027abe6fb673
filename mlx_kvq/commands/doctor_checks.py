"""Doctor's cases: every kernel and variant that a model reaches, on random data."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import mlx.core as mx
import numpy as np

from .. import ops
from ..files import failure
from ..format import levels
from ..format.format import Format, make_format
from ..format.spec import Spec
from ..format.transform import Calibration
from . import doctor_exact as exact

# Spec, head size, query heads, KV heads, dtype, calibrated; each in every variant.
EVERY = [
    ("int4-srft", 128, 12, 2, mx.bfloat16, True),
    ("int4-srft", 128, 12, 2, mx.float16, False),
    ("int4-srft", 256, 4, 1, mx.bfloat16, True),
    ("int8-srft", 64, 8, 8, mx.float16, True),
    ("k8v4-srft", 128, 12, 2, mx.bfloat16, False),
]
# Other formats, in the variants of FEW.
FORMATS = [
    ("int4-srft", 64, 14, 2),
    ("int4-srft", 80, 8, 2),
    ("int4-srft", 96, 6, 1),
    ("int4-srft", 112, 4, 4),
    ("int4-srft:group_size=64", 128, 32, 8),
    ("int4-srht", 128, 8, 1),
    ("int4-none", 128, 8, 1),
    ("int8-srft", 128, 12, 2),
    ("int4-srft:scale=absmax", 128, 16, 1),
    ("int4-srft:scale=paper", 128, 8, 2),
    ("int4-srft", 192, 4, 2),
    ("int3-srft", 128, 12, 2),
    ("int3-srft", 80, 8, 2),
    ("k4v3-srft", 256, 4, 1),
    ("k5v4-srft", 128, 12, 2),
    ("int5-srft", 80, 8, 2),
    ("int4-srft:group_size=64", 256, 8, 4),
    ("int4-srft:rounding=feedback", 128, 12, 2),
]
MORE = [(*case, mx.bfloat16, "feedback" in case[0]) for case in FORMATS]
FEW = {"pack, first tail", "attend, splits", "attend, L=8", "dequantize", "restore, tail, chunk"}
TOKENS = 1000  # in a cache
SHORT = 37  # one split
QUERIES = 8  # of a draft, say
REPEATS, SECONDS = 20, 0.1  # at most, of the calls that are timed
CODES = 1e-3  # part of the codes that may differ from the reference, by one step
FED_BACK = 5e-3  # with feedback, where a code changes later ones; a wrong kernel changes a tenth
RELATIVE = {mx.float16: 3e-3, mx.bfloat16: 1e-2}


@dataclass
class Result:
    """One row of the table: an operation on one case."""

    op: str
    case: str
    error: float
    limit: float
    microseconds: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        return not self.failure and self.error <= self.limit


def number(cases: list, variants: set[str] | None = None) -> int:
    return len(cases) * len(variants or _Case(*cases[0]).variants())


def check(seed: int, cases: list, variants: set[str] | None = None) -> Iterator[Result]:
    """Every variant, or some of them, on every case."""
    mx.random.seed(seed)
    for case in cases:
        yield from _Case(*case).results(variants)


class _Case:
    """The operations on random data of one shape, two sequences."""

    def __init__(self, text: str, D: int, Hq: int, Hkv: int, dtype: mx.Dtype, calibrated: bool):
        spec = Spec.parse(text)
        assert spec is not None
        self.backend = ops.BACKENDS["plain" if ops.language() is None else "gpu"]
        self.name = f"{text} D={D} heads={Hq}/{Hkv} {str(dtype).rpartition('.')[2]}"
        self.name += " calibrated" if calibrated else ""
        self.dtype, self.limit, self.heads = dtype, RELATIVE[dtype], (Hq, Hkv)
        self.limit_of_kept = RELATIVE[ops.tail_dtype(dtype)]
        keys, values = (_calibration(Hkv, D) if calibrated else None for _ in "kv")
        if keys is not None and spec.rounding == "feedback":
            keys = replace(keys, metric=_metric(Hkv, D))
        self.fmt: Format = make_format(spec, D, keys=keys, values=values)
        self.calibrated = calibrated

    def data(self) -> None:
        (Hq, Hkv), D = self.heads, self.fmt.layout.k_dim
        k, v = (mx.random.normal((2, Hkv, TOKENS, D)) for _ in "kv")
        k[:, :, ::7] *= 20  # outliers
        sides = (k, self.fmt.keys), (v, self.fmt.values)
        self.k, self.v = (_around(x, s.calibration).astype(self.dtype) for x, s in sides)
        self.q = mx.random.normal((2, Hq, QUERIES, D)).astype(self.dtype)
        size = self.fmt.recent + QUERIES - 1
        with mx.stream(mx.cpu):  # in full fp32: MLX rounds fp32 products to TF32 on CUDA
            rows, tail = ops.BACKENDS["plain"].quantize_pack(self.k, self.v, self.fmt, None, size)
            begin = self.k[:, :, :4], self.v[:, :, :4], self.fmt, None, 4
            first = ops.BACKENDS["plain"].quantize_pack(*begin)[1]
        self.rows, self.tail, self.first = rows, tail, first
        mx.eval(self.k, self.v, self.q, rows, tail, first)

    def results(self, chosen: set[str] | None) -> Iterator[Result]:
        self.data()
        for op, (limit, compare, call) in self.variants().items():
            if chosen is not None and op not in chosen:
                continue
            try:
                yield Result(op, self.name, compare(), limit, _microseconds(call))
            except Exception as error:
                nan = float("nan")
                yield Result(op, self.name, nan, limit, nan, failure(error, 200))

    def variants(self) -> dict[str, tuple[float, Callable[[], float], Callable]]:
        """Name -> limit of the error, what finds the error, what is timed."""
        found: dict[str, tuple[float, Callable[[], float], Callable]] = {}
        codes = FED_BACK if self.fmt.kind.feedback else CODES
        for name, tokens, kept in (
            ("pack", TOKENS, False),
            ("pack, first tail", TOKENS, True),
            ("pack, chunk", QUERIES + 1, True),
        ):
            pack = partial(self.pack, tokens, kept, name == "pack, first tail")
            found[name] = codes, partial(self.packed, pack), lambda pack=pack: pack(self.backend)
        found["keep, token"] = self.limit_of_kept, self.kept, self.keep
        again = partial(self.rotated, self.backend)
        found["pack, from the tail"] = codes, self.packed_from_tail, again
        for name, given in self.attentions().items():
            # A query that sees few values, which cancel, is off by more of their sum.
            limit = self.limit * (1 if given.get("L", 1) == 1 else 4)
            found[name] = limit, partial(self.attended, **given), partial(self.attend, **given)
        for with_tail, name in ((False, ""), (True, ", tail")):
            call = partial(self.backend.dequantize, dtype=self.dtype)
            taken = partial(self.unpacked, call, exact.rotated, with_tail)
            found[f"dequantize{name}"] = self.limit, taken, partial(self.held_by, call, with_tail)
            for chunk in (False, True):
                call = partial(self.restore, chunk=chunk)
                taken = partial(self.unpacked, call, partial(self.exact, chunk=chunk), with_tail)
                label = f"restore{name}{', chunk' if chunk else ''}"
                found[label] = self.limit, taken, partial(self.held_by, call, with_tail)
        call = partial(self.restore, chunk=True)
        taken = partial(self.unpacked, call, partial(self.exact, chunk=True), False, True)
        again = partial(self.held_by, call, False, True)
        return found | {"restore, first, chunk": (self.limit, taken, again)}

    # ---- packing ------------------------------------------------------------------------------
    def pack(self, tokens: int, kept: bool, first: bool, backend) -> tuple:
        k, v = self.k[:, :, -tokens:], self.v[:, :, -tokens:]
        before = None if first or not kept else self.tail
        size = 0 if not kept else self.tail.shape[2] if first else self.fmt.recent
        return *backend.quantize_pack(k, v, self.fmt, before, size), k, v, before, size

    def keep(self) -> mx.array:
        k, v = self.k[:, :, -1:], self.v[:, :, -1:]
        return self.backend.keep_exact(k, v, self.fmt, self.tail, self.fmt.recent)

    def kept(self) -> float:
        """Error of the exact tail."""
        k, v = self.k[:, :, -1:], self.v[:, :, -1:]
        return _relative(self.keep(), exact.tail(k, v, self.fmt, self.tail, self.fmt.recent))

    def rotated(self, backend) -> mx.array:
        return backend.pack_rotated(self.tail, self.fmt)

    def packed(self, pack: Callable) -> float:
        """Part of the codes that are not the reference's, after a look at the tail."""
        rows, kept, k, v, before, size = pack(self.backend)
        if size:
            off = _relative(kept, exact.tail(k, v, self.fmt, before, size))
            if off > self.limit_of_kept:
                raise RuntimeError(f"the exact tail is off by {off:.1e}")
        return self.apart(rows, lambda backend: pack(backend)[0])

    def packed_from_tail(self) -> float:
        return self.apart(self.rotated(self.backend), self.rotated)

    def apart(self, rows: mx.array, pack: Callable) -> float:
        """Part of the codes in ``rows`` that are not those that ``pack`` makes by the reference."""
        lay = self.fmt.layout
        with mx.stream(mx.cpu):
            wanted = pack(ops.BACKENDS["plain"])
        sides = zip(levels.split(rows, lay), levels.split(wanted, lay), strict=True)
        apart = [
            levels.unpack_codes(a, bits) != levels.unpack_codes(b, bits)
            for (a, b), bits in zip(sides, (lay.wide.k_bits, lay.wide.v_bits), strict=False)
        ]
        return max(cast(float, d.astype(mx.float32).mean().item()) for d in apart)

    # ---- attention ----------------------------------------------------------------------------
    def attentions(self) -> dict[str, dict[str, Any]]:
        Hq = self.heads[0]
        starts = mx.array([0, 3], mx.int32)
        allowed = mx.arange(TOKENS) % 5 != 0
        added = mx.where(allowed, 0.5, -3.0)[None]
        cases: dict[str, dict[str, Any]] = {
            "attend, one split": {"T": SHORT, "parts": 1},
            "attend, splits": {"parts": 4},
            "attend, no tail": {"T": SHORT, "parts": 1, "tail": False},
            "attend, splits, no tail": {"parts": 4, "tail": False},
            "attend, L=8": {"L": QUERIES, "mask": ops.CAUSAL},
            "attend, L=8, one split": {"L": QUERIES, "mask": ops.CAUSAL, "parts": 1},
            "attend, starts": {"mask": ops.Mask(starts=starts)},
            "attend, L=8, starts, window": {"L": QUERIES, "mask": ops.Mask(True, 90, starts)},
            "attend, boolean mask": {"mask": ops.Mask(array=allowed)},
            "attend, float mask": {"mask": ops.Mask(array=added)},
            "attend, ring": {"ring": (4, TOKENS // 3)},
            "attend, first": {"first": 0},
            "attend, starts, first": {"mask": ops.Mask(starts=starts), "first": starts},
            "attend, ring, first": {"ring": (4, TOKENS // 3), "first": 0},
        }
        if not self.calibrated:
            sinks = {"sinks": mx.linspace(-2, 3, Hq)}
            cases["attend, sinks"] = sinks
            cases["attend, sinks, one split"] = {**sinks, "parts": 1}
        return cases

    def arguments(
        self, L=1, T=None, mask=ops.EVERY, sinks=None, tail=True, ring=None, first=None
    ) -> tuple:
        begin = None if first is None else ops.First(self.first, 4, first)
        end = self.tail if tail else None
        held = ops.Packed(self.rows, T or TOKENS, self.fmt, end, ring, begin)
        # Less than a model's scale: with outliers in keys one key would have all the weight, and
        # the kernels' fp16 queries turn logits of 60 by 0.03, as they may.
        return self.q[:, :, :L], held, self.q.shape[3] ** -0.5 / 8, mask, sinks

    def attend(self, parts: int | None = None, **given) -> mx.array:
        more = () if parts is None or ops.language() is None else (parts,)
        return self.backend.attend(*self.arguments(**given), *more)

    def attended(self, parts: int | None = None, **given) -> float:
        return _relative(self.attend(parts, **given), exact.attend(*self.arguments(**given)))

    # ---- and back -----------------------------------------------------------------------------
    def held_by(self, call: Callable, with_tail: bool, with_first: bool = False) -> Any:
        first = ops.First(self.first, 4) if with_first else None
        tail = self.tail if with_tail else None
        return call(ops.Packed(self.rows, TOKENS, self.fmt, tail, None, first))

    def restore(self, held: ops.Packed, chunk: bool) -> tuple:
        new = (self.k[:, :, :9], self.v[:, :, :9]) if chunk else None
        return self.backend.restore(held, self.dtype, new)

    def exact(self, held: ops.Packed, chunk: bool) -> list[np.ndarray]:
        both = zip(exact.restored(held), (self.k, self.v), strict=True)
        if not chunk:
            return [old for old, _ in both]
        return [np.concatenate([old, exact.of(new[:, :, :9])], axis=2) for old, new in both]

    def unpacked(self, call: Callable, wanted: Callable, *kept: bool) -> float:
        pairs = zip(self.held_by(call, *kept), self.held_by(wanted, *kept), strict=True)
        return max(_relative(a, b) for a, b in pairs)


def _calibration(H: int, D: int) -> Calibration:
    return Calibration(
        mu=3 * mx.random.normal((H, D)),
        sigma=mx.exp(0.5 * mx.random.normal((H, D))),
        lam=mx.exp(0.2 * mx.random.normal((H, D))),
    )


def _metric(H: int, D: int) -> mx.array:
    """Of queries with a few strong directions."""
    strong = 4 * mx.random.normal((H, D, D // 4))
    return strong @ strong.swapaxes(-1, -2) / D + mx.eye(D)


def _around(x: mx.array, c: Calibration) -> mx.array:
    """Standard normal numbers as a model's would be that has this calibration."""
    if c.mu is None or c.sigma is None:
        return x
    return x * c.sigma[:, None] + c.mu[:, None]


def _relative(got: mx.array, expected: np.ndarray) -> float:
    """Largest difference in a vector, relative to the vector's largest channel."""
    apart = np.abs(exact.of(got) - expected).max(axis=-1)
    found = float((apart / np.maximum(np.abs(expected).max(axis=-1), 1e-30)).max())
    return found if found == found else float("inf")


def _microseconds(call: Callable) -> float:
    """Median wall-clock time of one evaluated call, launch and synchronization included."""
    mx.eval(call())
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < SECONDS:
        start = time.perf_counter()
        mx.eval(call())
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)
