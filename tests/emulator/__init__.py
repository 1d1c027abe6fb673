"""A CPU that runs MLX's Metal kernels; README.md tells how."""

from .counters import Counters
from .errors import KernelError
from .execute import run
from .standin import Emulated, emulated, metal_kernel

__all__ = ["Counters", "Emulated", "KernelError", "emulated", "metal_kernel", "run"]
