"""Which kernels a process compiles, and how long that takes: for doctor."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from . import memo
from .gpu import jit

SMALL = 8  # MLX passes inputs of fewer elements by another address space: another compilation


@dataclass
class Compiled:
    """A kernel with its optional parts, and the seconds by which its first call took longer than
    its second."""

    kernel: str
    seconds: float


_APART = ("ROTATED", 1)  # quantize_pack of tokens of a tail


@contextmanager
def noted() -> Iterator[list[Compiled]]:
    """Inside, all kernels are made anew, and each first call is timed; launches must not be
    replayed (``MLX_KVQ_REPLAY=0``)."""
    found: list[Compiled] = []

    def observed(name: str, constants: jit.Constants, kernel: Any) -> Any:
        given = set(jit.OPTIONAL.values())
        parts = [n.lower() for n, on in constants if (on and n in given) or (n, on) == _APART]
        label = " ".join([name, *parts])
        called: set[tuple] = set()

        def call(*, inputs, **sizes) -> list[mx.array]:
            kind = tuple((x.dtype, x.size < SMALL) for x in inputs), tuple(sizes["output_dtypes"])
            if kind in called:
                return kernel(inputs=inputs, **sizes)
            called.add(kind)
            mx.eval(inputs)
            first, made = _timed(kernel, inputs, sizes)
            second, _ = _timed(kernel, inputs, sizes)
            found.append(Compiled(label, max(0.0, first - second)))
            return made

        return call

    outer, jit.observer = jit.observer, observed
    try:
        with memo.apart():
            yield found
    finally:
        jit.observer = outer


def _timed(kernel: Any, inputs: list[mx.array], sizes: dict) -> tuple[float, list[mx.array]]:
    start = time.perf_counter()
    made = kernel(inputs=inputs, **sizes)
    mx.eval(made)
    return time.perf_counter() - start, made
