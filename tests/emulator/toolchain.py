"""clang and lld from PyPI's ``ziglang``, and a cache of what they made."""

import ctypes
import hashlib
import os
import platform
import re
import subprocess
import sys
import tempfile
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

from .arithmetic import count_blocks
from .errors import KernelError, metal_names
from .instrument import instrument, name_traps
from .source import Kernel

_HERE = Path(__file__).parent
_COMMON = ["-O2", "-fPIC", "-fno-exceptions", "-fno-rtti", "-ffp-contract=off", "-fsigned-char"]
# Undefined behaviour is an error, and a variable nobody set holds a pattern (NaN for floats).
_CHECKS = [
    "-fsanitize=array-bounds,shift-exponent,integer-divide-by-zero,float-cast-overflow",
    "-ftrivial-auto-var-init=pattern",
]
_BOUNDS = ["-fsanitize=local-bounds", "-fno-sanitize-merge=local-bounds"]
# A lane's stack has 128 KB (runtime.cpp). clang warns when it makes the object.
_FRAME = "-Wframe-larger-than=65536"
# For counting arithmetic: the kernel's own, and scalar as a GPU's.
_PLAIN = ["-fno-vectorize", "-fno-slp-vectorize", "-mllvm", "-disable-vector-combine"]
_KERNEL = [
    "-std=c++14",
    "-fno-math-errno",
    "-gline-tables-only",
    "-Xclang",
    "-disable-llvm-passes",
    "-Xclang",
    "-ffloat16-excess-precision=none",
    "-Xclang",
    "-fbfloat16-excess-precision=none",
    "-Wall",
    "-Wno-unused",
    "-Wno-unknown-attributes",
    "-Wno-duplicate-decl-specifier",
    "-Wno-c++17-extensions",
    "-Wno-user-defined-literals",
    "-Werror=uninitialized",
    "-Werror=sometimes-uninitialized",
    "-Werror=return-type",
    "-fno-caret-diagnostics",
]


@cache
def cache_folder() -> Path:
    """Where shared objects are kept: ``MLX_KVQ_EMULATOR_CACHE``, or the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_kvq"
    folder = Path(os.environ.get("MLX_KVQ_EMULATOR_CACHE") or default / "emulator")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@cache
def _zig() -> str:
    import ziglang

    return str(Path(ziglang.__file__).parent / ("zig.exe" if os.name == "nt" else "zig"))


# Neither assembler nor a CPU's own instructions; what other architectures run.
_PORTABLE = bool(os.environ.get("MLX_KVQ_EMULATOR_PORTABLE"))


@cache
def _machine() -> tuple[str, ...]:
    """Half precision by instruction where the CPU has it."""
    if not _PORTABLE and platform.machine() in ("x86_64", "AMD64"):
        info = Path("/proc/cpuinfo")
        flags = info.read_text().split() if info.exists() else []
        return tuple(f"-m{f}" for f in ("f16c", "fma", "avx2") if f in flags)
    return ()


def _call(arguments: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([_zig(), *arguments], cwd=folder, capture_output=True, text=True)


def _must(arguments: list[str], folder: Path) -> None:
    done = _call(arguments, folder)
    if done.returncode:
        raise RuntimeError(f"zig {' '.join(arguments)} failed:\n{done.stderr}")


def _link(objects: list[str], out: str, folder: Path) -> None:
    if sys.platform == "darwin":
        _must(["cc", "-shared", "-undefined", "dynamic_lookup", "-o", out, *objects], folder)
    else:
        _must(["ld.lld", "-shared", "-o", out, *objects], folder)


@cache
def _digest_of_emulator() -> bytes:
    machine = repr([_machine(), version("ziglang"), _PORTABLE])
    digest = hashlib.sha256(machine.encode())
    made_by = ("arithmetic.py", "instrument.py", "toolchain.py")
    for path in sorted(_HERE.iterdir()):
        if path.name in made_by or path.suffix in (".h", ".cpp"):
            digest.update(path.read_bytes())
    return digest.digest()


def _cached(text: str, make) -> Path:
    """The shared object for ``text``, made by ``make(folder, out)`` unless it is there."""
    name = hashlib.sha256(_digest_of_emulator() + text.encode()).hexdigest()[:24] + ".so"
    path = cache_folder() / name
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            make(Path(folder), "out.so")
            os.replace(Path(folder) / "out.so", path)
    return path


@cache
def runtime() -> ctypes.CDLL:
    """The runtime, with its symbols open to the kernels."""

    def make(folder: Path, out: str) -> None:
        define = ["-DEMU_UCONTEXT"] if _PORTABLE else []
        source = str(_HERE / "runtime.cpp")
        options = ["-std=c++17", *_COMMON, *_machine(), *define]
        _must(["clang", "-x", "c++", *options, "-c", source, "-o", "runtime.o"], folder)
        _link(["runtime.o"], out, folder)

    # The mathematics a kernel calls is the C library's.
    ctypes.CDLL("libm.so.6" if sys.platform == "linux" else None, mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(_cached("runtime", make)), mode=ctypes.RTLD_GLOBAL)
    library.emu_place.restype = ctypes.c_uint64
    library.emu_place.argtypes = [ctypes.c_uint32, ctypes.c_uint64]
    return library


_DIAGNOSTIC = re.compile(r"kernel\.metal:(\d+):\d+: (?:fatal )?error: (.*)")
# The first of these that fits clang's message, or the notes below it, names the fault.
_KINDS = (
    (r"address.space|'(const )?(device|threadgroup|constant) |automatic variable", "address space"),
    (r"undeclared identifier|no member named|no template named", "builtin not allowed"),
    (r"uninitialized", "uninitialized variable"),
)


def _compile_error(stderr: str, text: str) -> KernelError:
    found = _DIAGNOSTIC.search(stderr)
    line, message = (int(found.group(1)), found.group(2)) if found else (0, "clang refused it")
    first = stderr[found.start() :].split(" error: ")[1] if found else ""
    kind = next((kind for pattern, kind in _KINDS if re.search(pattern, first)), "compile")
    return KernelError(kind, metal_names(message), line, text, stderr.strip())


def _build(kernel: Kernel, counted: bool, folder: Path, out: str) -> None:
    (folder / "kernel.cpp").write_text(kernel.code)
    options = [
        *_COMMON,
        *_machine(),
        *_KERNEL,
        _FRAME,
        *([] if counted else _CHECKS),
        "-I",
        str(_HERE),
    ]
    emit = ["-S", "-emit-llvm", "-o"]
    done = _call(["clang", "-x", "c++", *options, "kernel.cpp", *emit, "kernel.ll"], folder)
    if done.returncode:
        raise _compile_error(done.stderr, kernel.text)
    ir = instrument((folder / "kernel.ll").read_text(), kernel.text)
    (folder / "checked.ll").write_text(ir)
    options = ["-x", "ir", "-O2", "-fPIC", *_machine(), "-Wno-override-module"]
    extra = _PLAIN if counted else _BOUNDS
    _must(["clang", *options, *extra, "checked.ll", *emit, "optimized.ll"], folder)
    ir = (folder / "optimized.ll").read_text()
    (folder / "final.ll").write_text(count_blocks(ir) if counted else name_traps(ir))
    # Optimized already: machine code alone.
    coded = [*options, "-Xclang", "-disable-llvm-passes", _FRAME]
    done = _call(["clang", *coded, "-c", "final.ll", "-o", "kernel.o"], folder)
    if "stack frame size" in done.stderr:
        detail = "a thread's variables take more than 64 KB"
        raise KernelError("too much thread memory", detail, 0, kernel.text, done.stderr.strip())
    if done.returncode:
        raise RuntimeError(f"clang cannot compile its own output:\n{done.stderr}")
    _link(["kernel.o"], out, folder)


@cache
def load(kernel: Kernel, counted: bool = False) -> ctypes.CDLL:
    """The kernel's shared object; ``counted`` adds counters of arithmetic.

    Raises:
        KernelError: If clang or a rule of Metal refuses the source.
    """
    runtime()
    text = kernel.code + ("// counted" if counted else "")
    return ctypes.CDLL(str(_cached(text, partial(_build, kernel, counted))))
