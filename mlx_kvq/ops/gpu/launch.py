"""A launch: everything a call of a kernel needs but its arrays."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from .. import memo
from . import jit
from .tuning import replays

Shape = tuple[int, ...]
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Launch:
    """One kernel at one size.

    Args:
        machine (str): ``"metal"`` or ``"cuda"``.
        name (str): Of the kernel, in ``jit.KERNELS``.
        constants (tuple): Its compile-time constants.
        grid (tuple), threadgroup (tuple): Threads.
        shapes (tuple), dtypes (tuple): Of the outputs.
        used (int): How many of the outputs anybody reads, the first ones.
    """

    machine: str
    name: str
    constants: jit.Constants
    grid: Size
    threadgroup: Size
    shapes: tuple[Shape, ...]
    dtypes: tuple[mx.Dtype, ...]
    used: int = 1

    def prepared(self, like: tuple) -> Callable:
        """The launch for inputs of these shapes and dtypes: as it is, or traced once by MLX and
        replayed. Calling a kernel builds its source text and hashes it, replaying a trace does not
        (H100: 12 to 20 µs of the host's time a launch before; scripts/studies/speed.md). A trace
        for each set of shapes: MLX looks through a function's traces one by one."""
        if replays(self.machine):
            return memo.launch((self, like), lambda: mx.compile(self._bound()))
        return memo.launch((self,), self._bound)

    def _bound(self) -> Callable:
        kernel = jit.kernel(self.machine, self.name, self.constants)
        shapes, dtypes, used = list(self.shapes), list(self.dtypes), self.used

        def launch(*inputs: mx.array) -> mx.array | tuple[mx.array, ...]:
            made = kernel(
                inputs=list(inputs),
                grid=self.grid,
                threadgroup=self.threadgroup,
                output_shapes=shapes,
                output_dtypes=dtypes,
            )
            return made[0] if used == 1 else tuple(made[:used])

        return launch


def like(*arrays: mx.array | None) -> tuple:
    """Shapes and dtypes, for a key."""
    return tuple(None if a is None else (a.shape, a.dtype) for a in arrays)
