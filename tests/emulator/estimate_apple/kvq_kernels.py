"""Work of our kernels, counted by the emulator."""

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx

from mlx_kvq import ops
from mlx_kvq.caches.rows import WAITING
from mlx_kvq.format.format import Format, make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.format.transform import Calibration
from mlx_kvq.ops import gpu, plain
from mlx_kvq.ops.gpu import attention, tuning
from tests.emulator import Counters, emulated
from tests.support import calls

from .counting import normal, work_of
from .linear import Linear, between
from .work import Registers, Work

TILE = 16  # keys
CHUNK = 512  # tokens of a counted prompt


def calibrated(spec: Spec, Hkv: int, D: int, window: int | None = None) -> Format:
    """As of a model: with a centre and scales of channels."""
    given = Calibration(mx.zeros((Hkv, D)), mx.ones((Hkv, D)))
    return make_format(spec, D, keys=given, values=given, window=window)


def with_feedback(fmt: Format) -> Format:
    """The same format with keys rounded with feedback; for counting any metric will do."""
    heads, D = fmt.heads or 1, fmt.layout.k_dim
    given = fmt.keys.calibration
    keys = replace(given, metric=mx.broadcast_to(mx.eye(D), (heads, D, D)))
    spec = replace(fmt.spec, rounding="feedback")
    return make_format(spec, D, keys=keys, values=fmt.values.calibration, window=fmt.window)


class KvqKernels:
    """Our kernels for one format and its heads, as models launch them: calibrated, with exact
    newest and first tokens; in layers that see all tokens, or ``window``."""

    def __init__(self, spec: Spec, Hq: int, Hkv: int, D: int, window: int | None = None):
        self.fmt, self.Hq, self.Hkv, self.D = calibrated(spec, Hkv, D, window), Hq, Hkv, D
        self._windows: dict[int | None, KvqKernels] = {}
        exact = (64, 256)
        self.finish = Linear.fit(self._attention_work("attend_finish"), 512, 1024, 1, exact)
        self.store = Linear.fit(self._attention_work("attend_store"), 1024, 2048, 2, exact)
        self.combine = {parts: self._combine_work(parts) for parts in (2, 16)}

    def within(self, window: int | None) -> "KvqKernels":
        """Those of layers with this window; the same where rows and exact tokens are."""
        fmt, D = self.fmt, self.D
        other = make_format(fmt.spec, D, window=window)
        if (other.layout, other.recent) == (fmt.layout, fmt.recent):
            return self
        if window not in self._windows:
            self._windows[window] = KvqKernels(fmt.spec, self.Hq, self.Hkv, D, window)
        return self._windows[window]

    def attend(self, T: int, B: int = 1, parts: int | None = None) -> list[Work]:
        """The launches of one token's attention over T keys, of B sequences; in as many parts (the
        splits of keys) as Metal is given, or in so many."""
        parts = parts or self.parts(T, B)
        exact = self.fmt.recent_at(T) + self.fmt.first
        rows = B * self.Hkv * (4.0 * self.fmt.layout.words * T + 4 * self.D * exact)
        if parts == 1:
            return [self.finish(B * T, B, rows, B * exact)]
        partial = 4.0 * self.Hq * self.D * parts
        last = replace(between(self.combine, parts), bytes=partial).times(B)
        return [self.store(B * T, B * parts, rows + last.bytes, B * exact), last]

    def parts(self, T: int, B: int = 1) -> int:
        with emulated():  # the launch sizes of Metal
            q = mx.zeros((B, self.Hq, 1, self.D))
            rows = mx.zeros((B, self.Hkv, T, self.fmt.layout.words), mx.uint32)
            return attention.grid(q, ops.Packed(rows, T, self.fmt)).parts(T, 1, None, True)

    def _count_attention(self, T: int, parts: int, exact: int = 64) -> list[Counters]:
        """Of each launch, with ``exact`` newest tokens and the first four."""
        kv = (1, self.Hkv, T, self.D)
        rows = calls.quantize_pack(plain, normal(*kv), normal(*kv), self.fmt)
        q = normal(1, self.Hq, 1, self.D)
        tail, first = normal(1, self.Hkv, exact, 2 * self.D), normal(1, self.Hkv, 4, 2 * self.D)
        mx.eval(rows, q, tail, first)
        packed = ops.Packed(rows, T, self.fmt, tail, first=ops.First(first, 4), recent=exact)
        with emulated("counted") as e:
            mx.eval(gpu.attend(q, packed, self.D**-0.5, parts=parts))
        return e.counters

    def _attention_work(self, kernel: str) -> Callable[..., Work]:
        """Of the kernel's launch, as a function of keys, parts and exact tokens."""
        heads = self.Hq // self.Hkv
        rows = tuning.vector_rows(self.fmt.layout, tuning.TUNING["metal"], heads, 1)
        said = f", {rows} heads" if rows else ""
        registers = Registers.of(kernel, self.D, f"calibrated, tail, first{said}")
        blocks = -(-heads // 8) * self.Hkv  # of eight query heads

        def at(T: int, parts: int, exact: int) -> Work:
            c = next(c for c in self._count_attention(T, parts, exact) if kernel in c.kernel)
            # A tile is one SIMD group's: 16 keys share its spills.
            return work_of(c, 0).with_registers(registers, blocks / TILE)

        return at

    def _combine_work(self, parts: int) -> Work:
        c = self._count_attention(64 * parts, parts)[-1]
        registers = Registers.of("combine", self.D, "calibrated, tail, first")
        return work_of(c, 4.0 * self.Hq * self.D * parts).with_registers(registers)

    def token(self, T: int) -> Work:
        """keep_exact of one token of a context of T."""
        size = self.fmt.recent_at(T)
        x, tail = normal(1, self.Hkv, 1, self.D), normal(1, self.Hkv, size, 2 * self.D)
        mx.eval(x, tail)
        with emulated("counted") as e:
            mx.eval(gpu.keep_exact(x, x, self.fmt, tail, size))
        registers = Registers.of("keep_exact", self.D, "calibrated, L=1")
        return work_of(e.counters[0], self.Hkv * size * 8 * self.D).with_registers(registers)

    def packing(self) -> Work:
        """pack_rotated of the tokens that waited, keys to the nearest level."""
        y = normal(1, self.Hkv, WAITING, 2 * self.D)
        mx.eval(y)
        with emulated("counted") as e:
            mx.eval(gpu.pack_rotated(y, self.fmt))
        return self._pack_work(e.counters[0], WAITING, "calibrated, rotated, L=16")

    def prompt(self, L: int, feedback: bool = False) -> Work:
        """quantize_pack of L tokens; keys to the nearest level, or with feedback."""
        kv = (1, self.Hkv, CHUNK, self.D)
        k, v = normal(*kv), normal(*kv)
        fmt = with_feedback(self.fmt) if feedback else self.fmt
        mx.eval(k, v, fmt.arrays)
        with emulated("counted") as e:
            mx.eval(calls.quantize_pack(gpu, k, v, fmt))
        return self._pack_work(e.counters[0], CHUNK, "calibrated, tail, L=512").times(L / CHUNK)

    def _pack_work(self, c: Counters, tokens: int, variant: str) -> Work:
        bytes_ = self.Hkv * (4 * self.D + 4 * self.fmt.layout.words) * tokens
        registers = Registers.of("quantize_pack", self.D, variant)
        # A SIMD group packs a set of four vectors or more at a time.
        return work_of(c, bytes_).with_registers(registers, 2 * self.Hkv * tokens / 4)
