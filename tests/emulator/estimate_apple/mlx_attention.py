"""Work of MLX's attention in fp16, counted by the emulator."""

from dataclasses import replace

import mlx.core as mx
import numpy as np

from tests.emulator import run
from tests.emulator.mlx_kernels import mlx_source

from .chips import Chip
from .counting import contracted, normal
from .linear import Linear, between
from .work import Work


class MlxAttention:
    """MLX's attention in fp16 for a number of heads, of one query."""

    def __init__(self, Hq: int, Hkv: int, D: int):
        self.Hq, self.Hkv, self.D = Hq, Hkv, D
        self.single = Linear.fit(self._single, 512, 1024, 1)
        self.first = Linear.fit(self._first, 1024, 2048, 32)
        self.second = {blocks: self._second(blocks) for blocks in (32, 64)}

    def attend(self, T: int, chip: Chip, B: int = 1) -> list[Work]:
        """The launches of one token's attention over T keys, of B sequences."""
        bytes_ = 4.0 * self.D * self.Hkv * T * B
        if not (blocks := self.blocks(T, chip)):
            return [self.single(B * T, B, bytes_)]
        partial = 2.0 * self.Hq * self.D * blocks
        last = replace(between(self.second, blocks), bytes=partial).times(B)
        return [self.first(B * T, B * blocks, bytes_ + last.bytes), last]

    def blocks(self, T: int, chip: Chip) -> int:
        """As in mlx/backend/metal/scaled_dot_product_attention.cpp, 0 for a single pass."""
        group = self.Hq // self.Hkv
        if not (chip.kind in "sd" and T >= 1024) and not (group > 1 and T >= 4096):
            return 0
        if chip.kind == "s":
            sizes = ((1024, 64), (8192, 128), (32768, 256), (65536, 512))
            return next((b for n, b in sizes if n >= T), 1024) if group > 4 else 64
        if chip.kind == "d":
            if group <= 2 and T > 8192:
                return 256
            return 128 if group < 6 or T < 16384 else 512 if T < 65536 else 1024
        return 64 if group >= 4 else 32

    def _source(self, name: str, blocks: int = 32) -> str:
        flags = ("has_mask", "bool_mask", "float_mask", "has_sinks")
        names = (*flags, "query_transposed", "do_causal")
        constants = "".join(f"constant bool {n} = false;\n" for n in names)
        constants += f"constant int blocks = {blocks};\n"
        return mlx_source("sdpa_vector.h", name, f"float16_t, {self.D}", constants)

    def _arrays(self, T: int) -> list:
        q, k, v = (normal(1, h, n, self.D) for h, n in ((self.Hq, 1), (self.Hkv, T), (self.Hkv, T)))
        mx.eval(q, k, v)
        strides = [np.uint64(s) for s in (T * self.D, self.D, T * self.D, self.D)]
        none = np.int32(0)
        rest = [mx.zeros(8, mx.bool_), mx.zeros(8, mx.float16), none, none, none]
        return [q, k, v, np.int32(T), *strides, np.float32(self.D**-0.5), *rest]

    def _single(self, T: int, parts: int) -> Work:
        source = self._source("sdpa_vector")
        q, k, v, n, *rest = self._arrays(T)
        inputs = [q, k, v, np.int32(self.Hq // self.Hkv), n, *rest, mx.zeros(8, mx.float16)]
        inputs.append(np.int32(0))
        _, c = run(
            source, inputs, [q.shape], [mx.float16], (self.Hq * 1024, 1, 1), (1024, 1, 1),
            mode="counted", max_threads=1024,
        )  # fmt: skip
        return contracted(c, 0)

    def _first(self, T: int, blocks: int) -> Work:
        source = self._source("sdpa_vector_2pass_1", blocks)
        group = self.Hq // self.Hkv
        shapes = [(self.Hq, blocks, self.D), (self.Hq, blocks), (self.Hq, blocks)]
        _, c = run(
            source, [*self._arrays(T), mx.zeros(8, mx.float16)], shapes,
            [mx.float16, mx.float32, mx.float32],
            (self.Hkv * 32, group, blocks), (32, group, 1), mode="counted",
        )  # fmt: skip
        return contracted(c, 0)

    def _second(self, blocks: int) -> Work:
        source = self._source("sdpa_vector_2pass_2", blocks)
        inputs = [normal(self.Hq, blocks, self.D), mx.zeros((self.Hq, blocks))]
        inputs += [mx.zeros((self.Hq, blocks)), np.int32(blocks)]
        mx.eval(inputs[:3])
        _, c = run(
            source, inputs, [(1, self.Hq, 1, self.D)], [mx.float16], (self.Hq * 1024, 1, 1),
            (1024, 1, 1), mode="counted", max_threads=1024,
        )  # fmt: skip
        return contracted(c, 2.0 * self.Hq * self.D * blocks)
