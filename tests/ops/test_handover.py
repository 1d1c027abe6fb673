"""CUDA kernels compiled once, without a GPU: a stand-in writes what MLX writes, and NVRTC compiles
it where it is installed (``pip install nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-cccl``).

That MLX takes what it is handed is checked on a GPU, by tests/support/check_gpu.py.
"""

import ctypes
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_kvq import ops
from mlx_kvq.format.format import make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.ops import cubins, memo, trial
from mlx_kvq.ops.gpu import handover, jit, machine, nvrtc
from tests.support import calls
from tests.support.feedback import weighted

WORDS = {
    mx.bool_: "bool", mx.int32: "int32_t", mx.uint32: "uint32_t", mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16", mx.float32: "float",
}  # fmt: skip
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX compiles")


class CudaKernel:
    """As what ``mx.fast.cuda_kernel`` returns; outputs are zeros."""

    def __init__(
        self, name, input_names, output_names, header, source, ensure_row_contiguous,
        shared_memory,
    ):  # fmt: skip
        self.name, self.inputs, self.outputs = f"custom_kernel_{name}", input_names, output_names
        self.header, self.body = header, source

    def __call__(self, *, inputs, output_shapes, output_dtypes, grid, threadgroup):
        pairs = zip(output_shapes, output_dtypes, strict=True)
        return [mx.zeros(shape, dtype) for shape, dtype in pairs]

    def text(self, inputs, sizes) -> tuple[str, str]:
        given = []
        for name, x in zip(self.inputs, inputs, strict=True):
            given.append(f"const {WORDS[x.dtype]}* {name}")
            for kind in ("Shape", "Strides"):
                if f"{name}_{kind.lower()}" in self.body:
                    given.append(f"const __grid_constant__ {kind} {name}_{kind.lower()}")
        for name, dtype in zip(self.outputs, sizes["output_dtypes"], strict=True):
            given.append(f"{WORDS[dtype]}* {name}")
        return self.name, (
            f"{handover.BEFORE}{self.header}namespace mlx::core::cu {{\n\n"
            f"namespace cg = cooperative_groups;\n\n__global__ void {self.name}("
            f"{', '.join(given)}) {{\n{self.body}\n}}\n\n}} // namespace mlx::core::cu\n"
        )


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    """A GPU that is not there; what is compiled is in ``.compiled``, where it ends up in ``.kept``
    and ``.handed``."""
    compiled = []

    def nvrtc_compiled(source, kernel, architecture):
        compiled.append(kernel.removeprefix("mlx::core::cu::"))
        return cubins.Cubin(f"_Z{kernel}", f"\x7fELF of {source}".encode() + b"\n\0\xff")

    def made(**keywords):
        return CudaKernel(**keywords)

    monkeypatch.setattr(mx.fast, "cuda_kernel", made)
    monkeypatch.setattr(machine, "language", lambda: "cuda")
    monkeypatch.setattr(trial, "works", lambda *_: True)
    monkeypatch.setattr(nvrtc, "compiled", nvrtc_compiled)
    monkeypatch.setattr(nvrtc, "architecture", lambda: "sm_90a")
    monkeypatch.setattr(nvrtc, "machine", lambda: ("sm_90a", "NVRTC 13.0", "driver 13000", "/x"))
    monkeypatch.setattr(handover, "text", lambda kernel, *given: kernel.text(*given))
    monkeypatch.setattr(handover, "_said", set())
    monkeypatch.setattr(cubins, "record", cubins.Record())
    monkeypatch.setenv("MLX_KVQ_REPLAY", "0")
    monkeypatch.delenv("MLX_KVQ_COMPILED", raising=False)
    monkeypatch.setenv("MLX_KVQ_CACHE", str(tmp_path / "kept"))
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path / "ptx"))
    ops.forget()
    yield SimpleNamespace(compiled=compiled, kept=tmp_path / "kept", handed=tmp_path / "ptx")
    ops.forget()


def process(dtype=mx.float16, spec="int4-srft:recent=16", D=64):
    """A prompt, a token and what it reads, in a new process: three kernels."""
    ops.forget()
    fmt, k = make_format(Spec.parse(spec), D), mx.zeros((1, 2, 20, D), dtype)
    q = mx.zeros((1, 4, 1, D), dtype)
    rows, tail = ops.quantize_pack(k, k, fmt, None, 16)
    calls.attend(ops, q, rows, 20, fmt, 0.125, tail=tail)
    calls.restore(ops, rows, 20, fmt, dtype, tail)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- what MLX calls it ------------------------------------------------------------------------
def test_the_name_is_the_one_that_mlx_looks_for():
    """The text of a kernel, and the file that MLX CUDA 0.32.4 looked for."""
    source = (
        '\n#include "mlx/backend/cuda/device/utils.cuh"\n\n#include <cooperative_groups.h>\n\n'
        "// header\nnamespace mlx::core::cu {\n\nnamespace cg = cooperative_groups;\n\n"
        "__global__ void custom_kernel_kvq_test(\n    const float* a,\n"
        "    const __grid_constant__ Shape a_shape,\n"
        "    const __grid_constant__ Strides a_strides,\n    const __half* b,\n"
        "    float* o) {\n// a_shape a_strides\n o[0]=a[0]+b[0]+a_strides[0];\n}\n\n"
        "} // namespace mlx::core::cu\n"
    )
    name = "custom_kernel_kvq_test"
    assert handover.module(name, source) == "custom_kernel_kvq_test_ab0e8eff2b70abdb"


def test_mlx_gives_the_text_of_a_kernel():
    """Of a Metal kernel here: the file of an exported function has both alike."""
    kernel = mx.fast.metal_kernel(
        name="kvq_test", input_names=["a"], output_names=["o"], source="o[0] = a[0];"
    )
    sizes = {
        "grid": (1, 1, 1), "threadgroup": (1, 1, 1), "output_shapes": [(1,)],
        "output_dtypes": [mx.float32],
    }  # fmt: skip

    def text(*inputs):
        return handover.text(kernel, list(inputs), sizes)

    name, source = text(mx.zeros((3, 4), mx.float16))
    assert name.startswith("custom_kernel_kvq_test") and f"void {name}(" in source
    assert "float16_t* a [[buffer(0)]]" in source and "o[0] = a[0];" in source
    traced = []  # as it is called while mx.compile traces a launch
    mx.eval(mx.compile(lambda x: traced.append(text(x)) or x + 1)(mx.zeros((3, 4), mx.float16)))
    assert traced == [(name, source)]


# ---- what the next process does ---------------------------------------------------------------
def test_the_next_process_compiles_nothing(cuda, capsys):
    process()
    assert len(cuda.compiled) == len(set(cuda.compiled)) == 3
    assert {c.rpartition("_sm_90a")[0].rpartition("_")[0] for c in cuda.compiled} == {
        "custom_kernel_kvq_quantize_pack", "custom_kernel_kvq_attend_finish",
        "custom_kernel_kvq_restore",
    }  # fmt: skip
    kept, handed = names(cuda.kept), names(cuda.handed)
    assert len(kept) == 3 and len(handed) == 6
    for file in cuda.handed.glob("*.txt"):
        kernel, symbol = file.read_text().rstrip("\n").split("\t")
        assert kernel == f"mlx::core::cu::{file.stem.rpartition('_')[0]}"
        assert symbol == f"_Z{kernel}"
        code = file.with_suffix(".ptx").read_bytes()
        assert code.startswith(b"\x7fELF of") and code.endswith(b"\n\0\xff")
    cuda.compiled.clear()
    process()
    assert cuda.compiled == [] and (names(cuda.kept), names(cuda.handed)) == (kept, handed)
    assert (cubins.record.read, cubins.record.compiled) == (3, 3)
    for file in cuda.handed.iterdir():  # the system's folder of temporary files is emptied
        file.unlink()
    process()
    assert cuda.compiled == [] and names(cuda.handed) == handed
    assert not capsys.readouterr().err


def test_each_set_of_dtypes_is_a_kernel(cuda):
    process(mx.float16)
    process(mx.bfloat16)
    assert len(cuda.compiled) == 6 and len(names(cuda.kept)) == 6


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]\n", b"{}\nx", b"\xff", b"[" * 9999 + b"\n", None]
)
def test_a_damaged_file_is_made_again(cuda, damage, capsys):
    process()
    files = {file: file.read_bytes() for file in cuda.kept.iterdir()}
    for file, content in files.items():
        file.write_bytes(content[:-1] if damage is None else damage)
    cuda.compiled.clear()
    process()
    assert len(cuda.compiled) == 3 and not capsys.readouterr().err
    assert {file: file.read_bytes() for file in cuda.kept.iterdir()} == files


def test_what_mlx_would_be_handed_is_looked_at(cuda):
    """A file of that name that says something else is replaced."""
    process()
    files = {file: file.read_bytes() for file in cuda.handed.iterdir()}
    for file in files:
        file.write_bytes(b"something else")
    cuda.compiled.clear()
    process()
    assert cuda.compiled == [] and {f: f.read_bytes() for f in cuda.handed.iterdir()} == files


@pytest.mark.parametrize("part", range(4))
def test_another_machine_compiles_anew(cuda, part, monkeypatch):
    process()
    other = list(nvrtc.machine())
    other[part] = "another"
    monkeypatch.setattr(nvrtc, "machine", lambda: tuple(other))
    process()
    assert len(cuda.compiled) == 6 and len(names(cuda.kept)) == 6


@pytest.mark.parametrize("version", ["mlx", "mlx_kvq"])
def test_another_version_compiles_anew(cuda, version, monkeypatch):
    process()
    if version == "mlx":
        monkeypatch.setattr("mlx.core.__version__", "0.0.1")
    else:
        monkeypatch.setattr(handover, "__version__", "0.0.1")
    process()
    assert len(cuda.compiled) == 6


# ---- where it cannot be -----------------------------------------------------------------------
def test_where_nothing_can_be_kept_it_is_compiled_each_time(cuda, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_KVQ_CACHE", str(tmp_path / "file" / "below"))
    process()
    process()
    assert len(cuda.compiled) == 6 and len(names(cuda.handed)) == 6

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cubins, "kept_folder", nowhere)
    process()
    assert len(cuda.compiled) == 9 and not capsys.readouterr().err


def breaks(what):
    def broken(*_):
        raise what

    return broken


def file_in_place(cuda, monkeypatch):
    cuda.handed.write_text("")


BROKEN = {
    "MLX's folder is a file": file_in_place,
    "no compiler": lambda _, m: m.setattr(nvrtc, "machine", breaks(FileNotFoundError("none"))),
    "no GPU that is known": lambda _, m: m.setattr(nvrtc, "architecture", breaks(KeyError("x"))),
    "it does not compile": lambda _, m: m.setattr(nvrtc, "compiled", breaks(RuntimeError("no"))),
    "another text": lambda _, m: m.setattr(handover, "text", lambda *_: (cubins.OURS, "x")),
    "another name": lambda _, m: m.setattr(handover, "text", lambda *_: ("a", handover.BEFORE)),
    "another file": lambda _, m: m.setattr(handover, "text", breaks(ValueError("subsection"))),
    "another C++ library": lambda _, m: m.setattr(handover, "module", breaks(OSError("none"))),
}  # fmt: skip


@pytest.mark.parametrize("why", BROKEN)
def test_where_it_fails_mlx_compiles(cuda, why, monkeypatch, capsys):
    """Under a name for which nothing was ever handed over, and with one line in all."""
    BROKEN[why](cuda, monkeypatch)
    called = []
    monkeypatch.setattr(
        mx.fast, "cuda_kernel", lambda **k: called.append(k["name"]) or CudaKernel(**k)
    )
    process()
    assert not cuda.handed.is_dir() or names(cuda.handed) == []
    assert len([name for name in called if not name.endswith("_sm_90a")]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("[mlx_kvq] CUDA kernels are compiled by MLX, some seconds each: ")
    assert "some by MLX: " in str(cubins.record)


def test_the_switch_leaves_it_to_mlx(cuda, monkeypatch, capsys):
    """Under another name: MLX finds nothing that was handed over before."""
    process()
    on = set(memo_names())
    monkeypatch.setenv("MLX_KVQ_COMPILED", "0")
    cuda.compiled.clear()
    process()
    assert cuda.compiled == [] and not capsys.readouterr().err
    assert len(on) == 3 and on.isdisjoint(memo_names())
    assert str(cubins.record) == "all compiled by MLX"
    monkeypatch.setenv("MLX_KVQ_COMPILED", "yes")
    with pytest.raises(ValueError, match="MLX_KVQ_COMPILED is 0, 1 or unset, got 'yes'"):
        process()


def memo_names() -> list[str]:
    """Digests of the kernels' texts, by which trials are kept too."""
    return [made.digest for made in memo.kernels.values() if isinstance(made, jit.Text)]


def test_on_other_systems_it_is_left_to_mlx(cuda, monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    process()
    assert cuda.compiled == [] and not cuda.handed.exists() and not capsys.readouterr().err


def test_a_read_only_folder_that_has_them_will_do(cuda, monkeypatch, capsys):
    """Of a container, say; where one is missing, MLX compiles it."""
    process()
    monkeypatch.setattr(os, "access", lambda *_: False)
    cuda.compiled.clear()
    process()
    assert cuda.compiled == [] and not capsys.readouterr().err
    process(mx.bfloat16)
    assert cuda.compiled == [] and "is read-only" in capsys.readouterr().err


def test_metal_is_not_concerned(monkeypatch):
    asked = jit._text("metal", "combine", COMBINE)
    monkeypatch.setenv("MLX_KVQ_COMPILED", "0")
    assert jit._text("metal", "combine", COMBINE) == asked
    assert not isinstance(jit._kernel("metal", "combine", COMBINE), handover.Kernel)


# ---- how much of it ---------------------------------------------------------------------------
def test_there_is_an_end_to_it(cuda, monkeypatch):
    """What was unused for longest goes, from both folders; other files stay."""
    for folder in (cuda.kept, cuda.handed):
        folder.mkdir()
    (cuda.kept / "calibration.safetensors").write_bytes(b"x" * 5000)
    (cuda.handed / "gather_float16.ptx").write_bytes(b"x" * 5000)
    cubin = cubins.Cubin("symbol", b"x" * 1000)
    monkeypatch.setattr(cubins, "MOST", 3500)
    files = [cubins.path([str(i)]) for i in range(5)]
    for i, file in enumerate(files):
        cubins.keep(file, cubin, "a kernel")
        cubins.hand_over(cuda.handed, f"{cubins.OURS}{i}", "kernel", cubin)
        for made in (file, cuda.handed / f"{cubins.OURS}{i}.ptx"):
            os.utime(made, (i, i))
        cubins.read(files[0])  # used
    assert [file.exists() for file in files] == [True, False, False, True, True]
    assert names(cuda.handed) == [
        *(f"{cubins.OURS}{i}.{end}" for i in (2, 3, 4) for end in ("ptx", "txt")),
        "gather_float16.ptx",
    ]
    assert (cuda.kept / "calibration.safetensors").exists()
    assert cubins.withdraw() == 3 and names(cuda.handed) == ["gather_float16.ptx"]


def test_where_mlx_looks(monkeypatch):
    for name in ("MLX_PTX_CACHE_DIR", "TMPDIR", "TMP", "TEMP", "TEMPDIR"):
        monkeypatch.delenv(name, raising=False)
    below = Path("mlx", mx.__version__, "ptx")  # type: ignore[attr-defined]
    assert cubins.mlx_folder() == "/tmp" / below
    for name in ("TEMPDIR", "TEMP", "TMP", "TMPDIR"):
        monkeypatch.setenv(name, f"/{name}")
        assert cubins.mlx_folder() == f"/{name}" / below
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", "/own")
    assert cubins.mlx_folder() == Path("/own")


PLACES = ["nvidia/cu13", "nvidia/cuda_runtime", "home", "toolkit"]


@pytest.mark.parametrize(
    "major, there, expected",
    [
        (13, PLACES, "nvidia/cu13"),
        (12, PLACES, "nvidia/cuda_runtime"),
        (13, PLACES[1:], "home"),
        (12, PLACES[3:], "toolkit"),
        (13, [], None),
    ],
)
def test_headers_are_those_that_mlx_takes(major, there, expected, monkeypatch, tmp_path):
    monkeypatch.setattr("mlx.core.__file__", str(tmp_path / "mlx/core.so"))
    monkeypatch.setattr(nvrtc, "library", lambda: tmp_path / "toolkit/lib/libnvrtc.so")
    monkeypatch.setattr(nvrtc, "version", lambda: (major, 0))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    for place in there:
        (tmp_path / place / "include").mkdir(parents=True)
        (tmp_path / place / "include/cuda_fp16.h").write_text("")
    if expected is None:
        with pytest.raises(FileNotFoundError, match="set CUDA_HOME"):
            nvrtc.includes.__wrapped__()
    else:
        own = tmp_path / "mlx/include"
        found = nvrtc.includes.__wrapped__()
        assert found == (own, own / "cccl", tmp_path / expected / "include")


# ---- NVRTC ------------------------------------------------------------------------------------
def installed() -> Path | None:
    """NVIDIA's folder of a Python package, with the compiler and CUDA's headers."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec and spec.submodule_search_locations) or ():
        if list(Path(place).glob("cu13/lib/libnvrtc.so.*")):
            return Path(place) / "cu13"
    return None


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """NVRTC, and MLX's header that CPU versions of MLX do not have."""
    if (found := installed()) is None:
        pytest.skip("nvidia-cuda-nvrtc and nvidia-cuda-runtime are not installed")
    config = tmp_path / "mlx/backend/cuda/device/config.h"
    config.parent.mkdir(parents=True)
    config.write_text("#define MAX_NDIM 10\n")
    library = next(found.glob("lib/libnvrtc.so.*"))
    folders = tmp_path, found / "include", found / "include/cccl"
    monkeypatch.setattr(nvrtc, "_nvrtc", lambda: LIBRARIES.setdefault(library, load(library)))
    monkeypatch.setattr(nvrtc, "includes", lambda: folders)


LIBRARIES: dict[Path, ctypes.CDLL] = {}


def load(library: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(library))
    found.nvrtcGetErrorString.restype = ctypes.c_char_p
    return found


COMBINE = (
    ("VD", 128), ("VB", 4), ("ROTATION", 0), ("V_CALIBRATED", False), ("SINKS", True), ("NSG", 4),
)  # fmt: skip
STEPS: dict[str, tuple[str, int, mx.Dtype, dict]] = {
    "a prompt and tokens": ("int4-srft", 64, mx.float16, {}),
    "bfloat16, three bits": ("k4v3-srft:rounding=feedback", 64, mx.bfloat16, {}),
    "five bits": ("k5v4-srft:rounding=feedback", 128, mx.bfloat16, {}),
    "wide heads": ("int4-srft:rounding=feedback", 256, mx.float16, {}),
    "a batch": ("int8-srht", 64, mx.float32, {"starts": mx.array([0, 1], mx.int32)}),
    "a mask": ("int4-none", 64, mx.float16, {"mask": "seen"}),
    "sinks": ("int4-srft", 64, mx.bfloat16, {"sinks": mx.zeros((4,), mx.bfloat16)}),
}


@pytest.mark.parametrize("step", STEPS)
def test_what_is_compiled_is_valid(compiler, step, monkeypatch):
    """With few headers, for the oldest GPUs that are supported and for a new one."""
    spec, D, dtype, options = STEPS[step]
    texts = {}

    class Noted(CudaKernel):
        def __call__(self, *, inputs, output_dtypes, **sizes):
            name, source = self.text(inputs, {"output_dtypes": output_dtypes})
            texts[name, source] = handover.INSTEAD + source.removeprefix(handover.BEFORE)
            return super().__call__(inputs=inputs, output_dtypes=output_dtypes, **sizes)

    monkeypatch.setattr(mx.fast, "cuda_kernel", Noted)
    monkeypatch.setattr(machine, "language", lambda: "cuda")
    monkeypatch.setattr(trial, "works", lambda *_: True)
    monkeypatch.setattr(nvrtc, "architecture", breaks(OSError("no GPU")))
    monkeypatch.setenv("MLX_KVQ_REPLAY", "0")
    ops.forget()
    name = spec.removesuffix(":rounding=feedback")
    fmt = make_format(Spec.parse(spec), D) if name == spec else weighted(name, D)
    for L in (20, 600):
        k, q = mx.zeros((2, 2, L, D), dtype), mx.zeros((2, 4, 1, D), dtype)
        rows, tail = ops.quantize_pack(k, k, fmt, None, fmt.recent_at(L))
        seen = {"mask": mx.ones((1, L), mx.bool_)} if "mask" in options else options
        calls.attend(ops, q, rows, L, fmt, 0.125, tail=tail, **seen)
        calls.restore(ops, rows, L, fmt, dtype, tail)
        calls.dequantize(ops, rows, L, fmt, dtype, tail)
    ops.forget()
    assert len(texts) >= 4
    for (name, _), source in texts.items():
        for architecture in ("sm_75", "sm_90a") if step == "sinks" else ("sm_90a",):
            made = nvrtc.compiled(source, f"mlx::core::cu::{name}", architecture)
            assert name in made.symbol and made.image.startswith(b"\x7fELF")


def test_what_does_not_compile_says_why(compiler):
    with pytest.raises(RuntimeError, match='identifier "nothing" is undefined'):
        nvrtc.compiled("__global__ void f() { nothing; }", "f", "sm_90a")
