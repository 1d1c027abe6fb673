"""The fused backend: the operations as Metal kernels, or the same sources on CUDA.

Same contract as :mod:`mlx_kvq.ops.plain`. Kernels compile once per kind of format: lengths,
numbers of heads and of splits are run-time values.
"""

from .attention import attend
from .keep import keep_exact
from .machine import why_not
from .quantize import pack_rotated, quantize_pack
from .unpack import dequantize, restore

__all__ = [
    "attend",
    "dequantize",
    "keep_exact",
    "pack_rotated",
    "quantize_pack",
    "restore",
    "why_not",
]
