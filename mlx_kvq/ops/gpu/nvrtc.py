"""NVIDIA's run-time compiler, the one that MLX has loaded, and the headers that it reads."""

import ctypes
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import mlx.core as mx

from ..cubins import Cubin


@lru_cache(maxsize=1)
def library() -> Path:
    """The file of the compiler in this process.

    Raises:
        OSError: If there is none, or the system does not say.
    """
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and Path(parts[5]).name.startswith("libnvrtc.so"):
            return Path(parts[5])
    raise FileNotFoundError("MLX has loaded no libnvrtc")


@lru_cache(maxsize=1)
def _nvrtc() -> ctypes.CDLL:
    found = ctypes.CDLL(str(library()))
    found.nvrtcGetErrorString.restype = ctypes.c_char_p
    return found


@lru_cache(maxsize=1)
def machine() -> tuple[str, ...]:
    """What a compiled kernel depends on apart from its text: GPU, compiler, driver, headers."""
    driver = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(driver))
    versions = "NVRTC {}.{}".format(*version()), f"driver {driver.value}"
    return architecture(), *versions, *map(str, includes())


def version() -> tuple[int, int]:
    """Of the compiler. Raises RuntimeError if it is older than 12."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    if major.value < 12:
        raise RuntimeError(f"NVRTC {major.value}.{minor.value} is older than 12")
    return major.value, minor.value


@lru_cache(maxsize=1)
def architecture() -> str:
    """``"sm_90a"``: MLX asks for the features of that architecture alone where there are any."""
    info = mx.device_info()
    major, minor = (int(info[f"compute_capability_{part}"]) for part in ("major", "minor"))
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


@lru_cache(maxsize=1)
def includes() -> tuple[Path, ...]:
    """Folders of headers, those that MLX gives to the compiler.

    Raises:
        FileNotFoundError: If CUDA's are in none of them.
    """
    mlx = Path(mx.__file__).parent
    cuda = next(
        (folder for folder in _cuda(mlx.parent) if (folder / "cuda_fp16.h").is_file()), None
    )
    if cuda is None:
        raise FileNotFoundError("cuda_fp16.h is nowhere: set CUDA_HOME")
    return mlx / "include", mlx / "include" / "cccl", cuda


def _cuda(packages: Path) -> Iterator[Path]:
    """Where CUDA's headers may be, in MLX's order, and last beside the compiler."""
    name = "cuda_runtime" if version()[0] == 12 else f"cu{version()[0]}"
    yield packages / "nvidia" / name / "include"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    yield Path(home) / "include"
    yield library().parent.parent / "include"


def compiled(source: str, kernel: str, architecture: str) -> Cubin:
    """The kernel of this name in the source, compiled for an architecture (``"sm_90a"``).

    Raises:
        RuntimeError: If it does not compile; the message is the compiler's.
    """
    options = ["--device-as-default-execution-space", f"--gpu-architecture={architecture}"]
    options += [f"--include-path={folder}" for folder in includes()]
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    here = ctypes.byref(program)
    _check(nvrtc.nvrtcCreateProgram(here, source.encode(), b"kvq.cu", 0, None, None))
    try:
        _check(nvrtc.nvrtcAddNameExpression(program, kernel.encode()))
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), given):
            raise RuntimeError(_bytes(program, "ProgramLog").rstrip(b"\0").decode())
        symbol = ctypes.c_char_p()
        _check(nvrtc.nvrtcGetLoweredName(program, kernel.encode(), ctypes.byref(symbol)))
        return Cubin((symbol.value or b"").decode(), _bytes(program, "CUBIN"))
    finally:
        nvrtc.nvrtcDestroyProgram(here)


def _bytes(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(_nvrtc(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    content = ctypes.create_string_buffer(size.value)
    _check(getattr(_nvrtc(), f"nvrtcGet{what}")(program, content))
    return content.raw


def _check(result: int) -> None:
    if result:
        raise RuntimeError((_nvrtc().nvrtcGetErrorString(result) or b"NVRTC failed").decode())
