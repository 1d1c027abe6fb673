"""A kernel with one fault. ``// here`` in its source marks the line that must be blamed."""

from dataclasses import dataclass

import mlx.core as mx

from .counters import Counters
from .standin import Emulated, metal_kernel

# What every body may use.
_NAMES = """
  const uint i = thread_position_in_grid.x;
  const uint t = thread_position_in_threadgroup.x;
  const uint lane = thread_index_in_simdgroup;
"""


@dataclass(frozen=True)
class Fault:
    """A kernel on ``a``, 128 floats, that writes ``o``, 128 floats, in 2 threadgroups of 64.

    Args:
        what (str): The fault, for a reader.
        kind (str): The error's kind.
        body (str): Kernel body, after ``_NAMES``.
        header (str): Text before the kernel.
        threadgroup (int): Threads of a threadgroup.
        threads (int): Threads in all.
        or_kind (str): What is reported when the threads run in another order.
        init_value: What ``o`` holds before.
    """

    what: str
    kind: str
    body: str
    header: str = ""
    threadgroup: int = 64
    threads: int = 128
    or_kind: str = ""
    init_value: float | None = None

    def run(self, mode: str = "checked", seed: int = 0) -> Counters:
        """Runs it; raises the ``KernelError``."""
        seen = Emulated()
        kernel = metal_kernel(
            "planted",
            ["a"],
            ["o"],
            _NAMES + self.body + "\n",
            self.header,
            mode=mode,
            seed=seed,
            seen=seen,
        )
        kernel(
            inputs=[mx.arange(128, dtype=mx.float32)],
            output_shapes=[(128,)],
            output_dtypes=[mx.float32],
            grid=(self.threads, 1, 1),
            threadgroup=(self.threadgroup, 1, 1),
            init_value=self.init_value,
        )
        return seen.counters[0]
