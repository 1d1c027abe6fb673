"""CUDA kernels compiled once: MLX is handed the code of the kernels that it is about to compile.

MLX compiles a custom kernel anew in every process, and most of that time goes into headers of its
own that no kernel here needs (docs/performance.md). But first it looks for the code in a folder, by
the kernel's name and a hash of the text. So the text, which MLX itself gives, is compiled here with
few headers, kept (:mod:`..cubins`) and put there. Where any of that fails MLX compiles as ever.
"""

import ctypes
import os
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ... import __version__
from ...files import failure
from .. import cubins
from . import nvrtc

# How the text of a custom kernel begins, and what stands there instead: MLX's types of shapes and
# strides are arrays of this size, and nothing else of its headers is used here.
BEFORE = '\n#include "mlx/backend/cuda/device/utils.cuh"\n\n#include <cooperative_groups.h>\n\n'
INSTEAD = """
#include "mlx/backend/cuda/device/config.h"
#include <cuda_bf16.h>
#include <cuda_fp16.h>
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
namespace cooperative_groups {}
namespace mlx::core::cu {
template <typename T>
struct Sizes {
  T of[MAX_NDIM];
  const T& operator[](int axis) const { return of[axis]; }
};
using Shape = Sizes<int32_t>;
using Strides = Sizes<int64_t>;
}
"""
_SEED = 0xC70F6907  # of std::hash<std::string> in libstdc++
_said: set[str] = set()


def mark() -> str:
    """Part of what a kernel's name is made from: what compiles otherwise is tried anew, and has
    another name in MLX's folder."""
    return INSTEAD if cubins.asked() else ""


class Kernel:
    """A kernel as ``mx.fast.cuda_kernel`` makes it, called alike.

    Args:
        make: Makes it with a name.
        name (str): Of the kernel.
    """

    def __init__(self, make: Callable[[str], Any], name: str):
        self.make, self.name = make, name
        self.chosen: dict[tuple, Any] = {}  # MLX makes a text for each set of dtypes

    def __call__(self, *, inputs: list[mx.array], **sizes) -> list[mx.array]:
        kinds = (*((x.dtype, x.ndim > 0) for x in inputs), *sizes["output_dtypes"])
        if (kernel := self.chosen.get(kinds)) is None:
            kernel = self.chosen[kinds] = self._choose(inputs, sizes)
        return kernel(inputs=inputs, **sizes)

    def _choose(self, inputs: list[mx.array], sizes: dict) -> Any:
        try:
            # By architecture: processes on different GPUs share MLX's folder.
            kernel = self.make(f"{self.name}_{nvrtc.architecture()}")
            offer(*text(kernel, inputs, sizes))
        except Exception as error:  # whatever it is, MLX can do without
            cubins.record.failure = failure(error)
            _say(f"CUDA kernels are compiled by MLX, some seconds each: {failure(error)}")
            return self.make(self.name)
        return kernel


def text(kernel: Any, inputs: list[mx.array], sizes: dict) -> tuple[str, str]:
    """Name and text of what MLX will compile, as it writes them to the file of an exported
    function: strings after their lengths."""
    like = [mx.zeros((1,) * x.ndim, x.dtype) for x in inputs]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.mlxfn"
        mx.export_function(str(file), lambda *x: kernel(inputs=list(x), **sizes), *like)
        data = file.read_bytes()
    at, found = data.index(b"CustomKernel") + len(b"CustomKernel"), []
    for _ in range(2):
        (length,) = struct.unpack_from("<Q", data, at)
        found.append(data[at + 8 : at + 8 + length].decode())
        at += 8 + length
    return found[0], found[1]


def module(name: str, source: str) -> str:
    """What MLX calls the code of this text: the name, and ``std::hash`` of the text."""
    hashed = ctypes.CDLL("libstdc++.so.6")._ZSt11_Hash_bytesPKvmm
    hashed.restype = ctypes.c_size_t
    data = source.encode()
    number = hashed(data, ctypes.c_size_t(len(data)), ctypes.c_size_t(_SEED))
    return f"{name}_{number:x}"


def offer(name: str, source: str) -> None:
    """Put the code of this text where MLX will look for it, compiled now or earlier.

    Raises:
        OSError, RuntimeError, ValueError: If that cannot be done.
    """
    if not (name.startswith(cubins.OURS) and source.startswith(BEFORE)):
        raise ValueError("MLX's text of a kernel is not as expected")
    folder = cubins.mlx_folder()
    folder.mkdir(parents=True, exist_ok=True)
    slim, kernel = INSTEAD + source.removeprefix(BEFORE), f"mlx::core::cu::{name}"
    where = nvrtc.machine()
    versions = f"mlx {mx.__version__}", f"mlx_kvq {__version__}"  # type: ignore[attr-defined]
    file = cubins.path([slim, *where, *versions])
    if (kept := cubins.read(file)) is not None:
        cubin = kept[0]
        cubins.record.read += 1
    elif not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is read-only")
    else:
        start = time.perf_counter()
        cubin = nvrtc.compiled(slim, kernel, nvrtc.architecture())
        cubins.record.seconds += time.perf_counter() - start
        cubins.record.compiled += 1
        what = name.removeprefix(cubins.OURS)
        cubins.keep(file, cubin, ", ".join([what, *where[:3], *versions]))
    cubins.hand_over(folder, module(name, source), kernel, cubin)


def _say(line: str) -> None:
    if not _said:
        _said.add(line)
        print(f"[mlx_kvq] {line}", file=sys.stderr)
