"""Kernels from their sources: Metal, or the same sources on CUDA."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import mlx.core as mx

from .. import cubins, memo
from . import arguments, handover
from .helpers import needed
from .sources import kernel_source, kernels_path
from .tuning import TUNING

# Arrays that a launch may do without -> the constant that says whether it has them. Each costs
# the host time at every launch.
REGISTERS = 65536  # of a processor of NVIDIA's
OPTIONAL = {
    "starts": "STARTS",
    "mask": "MASK",
    "sinks": "SINKS",
    "tail": "TAIL",
    "first": "FIRST",
    "first_at": "PLACES",
    "keep": "KEEPS",
    "kept": "KEEPS",
    "feedback": "FEEDBACK",
    "new_k": "CHUNK",
    "new_v": "CHUNK",
}
# name -> files of the header ("whole" is "narrow" where codes have 3 or 5 bits, "nearest" is
# "feedback" where keys are rounded with it), files of the body ("attend_matrix" is "attend_vector"
# where the constant ROWS says so), inputs, outputs
_ATTEND = ("q", "rows", "info", "starts", "mask", "tail", "first", "first_at", "tables")
KERNELS: dict[str, tuple[tuple[str, ...], ...]] = {
    "quantize_pack": (
        ("rotate", "levels", "whole", "vectors", "quantize", "nearest"),
        ("row", "quantize_pack"),
        ("k", "v", "tables", "feedback", "keep", "tail"),
        ("rows", "kept"),
    ),
    "keep_exact": (
        ("rotate", "levels", "vectors"),
        ("keep_exact",),
        ("k", "v", "tables", "keep", "tail"),
        ("kept",),
    ),
    "attend_finish": (
        ("rotate", "levels", "whole", "vectors", "tokens", "tile", "dots"),
        ("row", "attend_begin", "attend_matrix", "attend_finish"),
        (*_ATTEND, "sinks"),
        ("out",),
    ),
    "attend_store": (
        ("rotate", "levels", "whole", "vectors", "tokens", "tile", "dots"),
        ("row", "attend_begin", "attend_matrix", "attend_store"),
        _ATTEND,
        ("partial",),
    ),
    # CUDA only
    "attend_join": (
        ("rotate", "levels", "whole", "vectors", "tokens", "tile", "dots"),
        ("row", "attend_begin", "attend_matrix", "attend_store", "attend_join.cuh"),
        (*_ATTEND, "sinks", "arrivals"),
        ("out", "partial"),
    ),
    "combine": (
        ("rotate", "levels", "vectors"),
        ("combine",),
        ("q", "info", "partial", "tables", "sinks"),
        ("out",),
    ),
    "dequantize": (
        ("levels", "whole"),
        ("row", "dequantize"),
        ("rows", "info", "tail", "first", "first_at"),
        ("keys", "values"),
    ),
    "restore": (
        ("rotate", "levels", "whole", "vectors", "restore"),
        ("row", "restore_rows"),
        ("rows", "info", "tail", "first", "first_at", "new_k", "new_v", "tables"),
        ("keys", "values"),
    ),
}
Constants = tuple[tuple[str, Any], ...]  # compile-time constants of a kernel
# Given each kernel that is made, its name and its constants; what it gives back is called instead.
observer: Callable[[str, Constants, Any], Any] | None = None


@lru_cache(maxsize=64)
def _source(name: str) -> str:
    """A kernel source without comments and indentation: MLX copies and hashes the text of a
    kernel at every launch."""
    text = re.sub(r"//.*", "", kernel_source(name if "." in name else f"{name}.metal"))
    return "\n".join(line for raw in text.splitlines() if (line := raw.strip())) + "\n"


def kernel(machine: str, name: str, constants: Constants):
    """A kernel with its compile-time constants. They stand in its source and not in ``template``,
    which MLX would convert and format again at every call, a few microseconds of decoding."""

    def make():
        made = _kernel(machine, name, constants)
        return made if observer is None else observer(name, constants, made)

    return memo.kernel((machine, name, constants), make)


@dataclass(frozen=True)
class Text:
    """What MLX is given of a kernel, and the hash of it all that is in the kernel's name."""

    header: str
    body: str
    inputs: list[str]
    outputs: list[str]
    digest: str


def text(machine: str, name: str, constants: Constants) -> Text:
    key = ("text", machine, name, constants)
    return memo.kernel(key, lambda: _text(machine, name, constants))


def _text(machine: str, name: str, constants: Constants) -> Text:
    headers, bodies, inputs, outputs = KERNELS[name]
    chosen = dict(constants)
    bits = chosen.get("KB"), chosen.get("VB")
    if 3 in bits or 5 in bits:
        headers = _with("narrow", "whole", headers)
    if chosen.get("FEEDBACK"):
        headers = _with("feedback", "nearest", headers)
    if chosen.get("ROWS"):
        bodies = _with("attend_vector", "attend_matrix", bodies)
    absent = [n for n in (*inputs, *outputs) if not chosen.get(OPTIONAL.get(n, ""), True)]
    header, body = _choices(machine, name), _constants(constants)
    body += "".join(_absent(n, n in outputs, [*inputs, *outputs], absent) for n in absent)
    if machine == "metal":
        body += "".join(_source(b) for b in bodies)
        body = re.sub(r"tile_memory\((\w+), (.+)\);", r"threadgroup uint4 \1[\2];", body)
        header += needed("".join(_source(h) for h in ("machine", *headers)), body)
    else:
        # Bodies declare threadgroup memory, the header's functions only point to it.
        header += _include("machine.cuh", *headers)
        header += "#undef threadgroup\n#define threadgroup __shared__\n"
        if name.startswith("attend"):
            header += _registers(chosen)
        code = "".join(_source(b) for b in bodies)
        # MLX looks for these words to pass shapes and strides.
        words = sorted(set(re.findall(r"\b\w+_(?:shape|strides|ndim)\b", code)))
        body += f"// {' '.join(words)}\n" + _include(*bodies)
        if "TILE_BYTES" in chosen:
            body += "static_assert((MEMORY + 3) / 4 * 16 <= TILE_BYTES);\n"
    whole = (header + body).replace(kernels_path().as_posix(), "")  # one name in every folder
    if machine == "cuda":
        whole += handover.mark()
    return Text(
        header,
        body,
        [n for n in inputs if n not in absent],
        [n for n in outputs if n not in absent],
        hashlib.sha256(whole.encode()).hexdigest()[:12],
    )


def _with(name: str, other: str, files: Sequence[str]) -> tuple[str, ...]:
    """``files`` with ``name`` in the place of ``other``."""
    return tuple(name if file == other else file for file in files)


def _kernel(machine: str, name: str, constants: Constants):
    made = text(machine, name, constants)
    make: Any = mx.fast.metal_kernel
    if machine == "cuda":
        make = partial(mx.fast.cuda_kernel, shared_memory=dict(constants).get("TILE_BYTES", 0))

    def named(name: str):
        return make(
            name=name,
            input_names=made.inputs,
            output_names=made.outputs,
            header=made.header,
            source=made.body,
            ensure_row_contiguous=False,
        )

    name = f"kvq_{name}_{made.digest}"
    if machine == "cuda" and cubins.asked():
        return handover.Kernel(named, name)
    return named(name)


def _constants(constants: Constants) -> str:
    return "".join(
        f"constexpr {'bool' if isinstance(value, bool) else 'int'} {key} = {str(value).lower()};\n"
        for key, value in constants
    )


# Arrays of one type, of which a launch may have one.
_ALIKE = {"tail": "first", "first": "tail"}


def _absent(name: str, output: bool, names: Sequence[str], absent: Sequence[str]) -> str:
    """Declarations of an array that a launch does without: branches never taken name it."""
    given, alike = OPTIONAL[name], _ALIKE.get(name)
    kind = "float" if output or given in ("CHUNK", "FEEDBACK") else "int"
    if alike in names and alike not in absent:
        text = f"const auto {name} = {alike};\n"
    else:
        text = f"{'' if output else 'const '}device {kind}* {name} = nullptr;\n"
    if given in ("MASK", "TAIL", "FIRST", "CHUNK"):
        text += f"const int64_t {name}_strides[4] = {{0, 0, 0, 0}};\n"
    if given in ("TAIL", "CHUNK"):
        text += f"const int {name}_shape[4] = {{0, 0, 0, 0}};\n"
    return text


def _choices(machine: str, name: str) -> str:
    """How many lanes share a vector, what stays in registers, and the names of integers."""
    wide, tuning = name.startswith(("attend", "combine")), TUNING[machine]
    choices = {
        "WIDE": wide,
        "HOLD_TABLES": wide or tuning.hold_tables,
        "FED_AT_ONCE": tuning.fed_at_once,
        "HOLD_QUERIES": tuning.hold_queries,
        "SLICE_VALUES": tuning.slice_values,
        "PREFETCH": tuning.prefetch,
        "AHEAD": tuning.combine_ahead,
    }
    text = ", ".join(f"{key} = {int(value)}" for key, value in choices.items())
    return f"enum : int {{ {text} }};\n" + arguments.enumeration(name)


def _registers(chosen: dict[str, Any]) -> str:
    """As many threadgroups of attend to a processor as registers allow: left alone, NVIDIA's
    compiler takes a quarter more of them than the loop over tiles needs. MLX writes the line that
    declares a kernel, so its first word says it."""
    threads = 32 * chosen["NSG"]
    groups = REGISTERS // (threads * (128 if chosen["VD"] <= 128 else 256))
    return (
        "#undef __global__\n#define __global__ "
        f"__attribute__((global)) __launch_bounds__({threads}, {groups})\n"
    )


def _include(*names: str) -> str:
    """CUDA reads the files itself: MLX copies and hashes the text it is given at every launch.
    The hash of what they say makes a changed file a new kernel."""
    lines = []
    for name in names:
        path = kernels_path() / (name if "." in name else f"{name}.metal")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        lines.append(f'#include "{path.as_posix()}"  // {digest}\n')
    return "".join(lines)
