"""What reading each header costs NVRTC, in a kernel that does nothing; no GPU is needed.

    python scripts/studies/nvrtc_headers.py LIBNVRTC INCLUDE [INCLUDE …]

LIBNVRTC is libnvrtc.so.12 or .13, an INCLUDE the folder of cuda_fp16.h, and that of cuda/std: of
NVIDIA's packages or, as in the table, of MLX's CUDA wheel (mlx/include/cccl).
"""

import argparse
import ctypes
import time
from pathlib import Path
from unittest import mock

from mlx_kvq.ops.gpu import nvrtc

KERNEL = "\n__global__ void nothing(int* x) { x[0] = 1; }\n"
# MLX 0.32.4 puts all of the lower ones before a custom kernel; the package needs two of them.
HEADERS = {
    "none": [],
    "cuda_fp16.h, cuda_bf16.h": ["cuda_fp16.h", "cuda_bf16.h"],
    "cuda/std/array": ["cuda/std/array"],
    "cuda/std/limits": ["cuda/std/limits"],
    "cuda/std/tuple": ["cuda/std/tuple"],
    "cuda/std/type_traits": ["cuda/std/type_traits"],
    "cuda/std/complex": ["cuda/std/complex"],
    "cooperative_groups.h": ["cooperative_groups.h"],
}
EVERY = [header for headers in HEADERS.values() for header in headers]


def seconds(headers: list[str], repetitions: int) -> float:
    source = "".join(f"#include <{header}>\n" for header in headers) + KERNEL
    found = []
    for _ in range(repetitions):
        start = time.perf_counter()
        nvrtc.compiled(source, "nothing", "sm_90a")
        found.append(time.perf_counter() - start)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("include", type=Path, nargs="+")
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    library = ctypes.CDLL(str(args.library))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    with (
        mock.patch.object(nvrtc, "_nvrtc", lambda: library),
        mock.patch.object(nvrtc, "includes", lambda: tuple(args.include)),
    ):
        print("| headers | s |\n|---|--:|")
        for name, headers in [*HEADERS.items(), ("all of them", EVERY)]:
            print(f"| {name} | {seconds(headers, args.repetitions):.3f} |", flush=True)


if __name__ == "__main__":
    main()
