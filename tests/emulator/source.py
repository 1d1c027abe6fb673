"""The Metal source that MLX generates, made ready for clang without moving a line."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .errors import KernelError

# MLX gives these to a body that names them.
ATTRIBUTES = {
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_size": "uint3",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}
_FIELD = {"grid_size": "threads_per_grid"}
_WIDTH = ("thread_execution_width", "threads_per_simdgroup")

_KERNEL = re.compile(r"\[\[kernel\]\]\s+void\s+(\w+)\s*\(")
_PARAMETER = re.compile(
    r"^(?P<type>.*?[\s*&])(?P<name>\w+)\s*(?:\[\[(?P<attribute>\w+)(?:\(\d+\))?\]\])?$", re.S
)
# A threadgroup variable, not a pointer into threadgroup memory.
_VARIABLE = re.compile(
    r"\bthreadgroup(?=\s+(?:alignas\s*\([^)]*\)\s*)?(?:const\s+)?[A-Za-z_][\w:]*"
    r"(?:\s*<[^;<>(){}]*>)?\s+[A-Za-z_]\w*\s*(?:\[[^\]]*\]\s*)*[;,])"
)

# C++ that Metal does not have.
_FORBIDDEN = re.compile(
    r"\b(asm|atomic\w*|catch|dynamic_cast|delete|goto|long\s+double|new|noexcept|register|"
    r"thread_local|throw|try|typeid|virtual|__builtin_(?!ctz\b)\w+|emu_\w+)\b"
)


@dataclass(frozen=True)
class Buffer:
    """A buffer parameter: ``type`` is as declared, with its ``*`` or ``&``."""

    name: str
    type: str

    @property
    def is_output(self) -> bool:
        return not {"const", "constant"} & set(self.type.split())

    @property
    def element(self) -> str:
        """The element type, for example ``"float16_t"``."""
        words = self.type.replace("*", " ").replace("&", " ").split()
        return [w for w in words if w not in ("const", "constant", "device")][0]


@dataclass(frozen=True)
class Kernel:
    """One generated kernel: its name, its buffers in order, and C++ with the same lines."""

    name: str
    buffers: tuple[Buffer, ...]
    text: str
    code: str


def _closing(text: str, start: int, pair: str) -> int:
    """The position of the bracket that closes the one at ``start``."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == pair[0]) - (text[i] == pair[1])
        if depth == 0:
            return i
    raise KernelError("compile", f"the {pair[0]} at character {start} is never closed")


def _blank_comments(text: str) -> str:
    """Spaces for every comment, so that brackets and words in them count for nothing, and for
    includes of Metal's own headers."""
    removed = r"//[^\n]*|/\*.*?\*/|#include <metal_\w+>"
    return re.sub(removed, lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.S)


def _split(code: str, start: int, end: int) -> Iterator[tuple[int, str]]:
    """The parameters between two positions, each with where it starts."""
    depth = 0
    for i in range(start, end + 1):
        if i == end or (code[i] == "," and depth == 0):
            part = code[start:i]
            yield start + len(part) - len(part.lstrip()), part.strip()
            start = i + 1
        depth += (code[i] in "(<[") - (code[i] in ")>]")


def _attribute(name: str, type_: str) -> str:
    """What a kernel gets for a thread attribute that it declares as ``type_``."""
    if name in _WIDTH:
        return "32u"
    field = f"info->{_FIELD.get(name, name)}"
    if ATTRIBUTES[name] == "uint":
        return field
    components = int(type_[-1]) if type_[-1].isdigit() else 1
    values = ", ".join(f"{field}[{d}]" for d in range(components))
    return f"uint{components}{{{values}}}" if components > 1 else values


def parse(text: str) -> Kernel:
    """Reads a generated source.

    Raises:
        KernelError: If it holds no kernel, or a parameter nobody could pass.
    """
    code = _blank_comments(text)
    forbidden = _FORBIDDEN.search(code)
    if forbidden:
        line = code.count("\n", 0, forbidden.start()) + 1
        raise KernelError("not allowed", f"{forbidden.group()!r} in a kernel", line, text)
    match = _KERNEL.search(code)
    if match is None:
        raise KernelError("compile", "the source has no '[[kernel]] void name(' in it")
    name = match.group(1)
    open_at = match.end() - 1
    close_at = _closing(code, open_at, "()")
    body_at = code.index("{", close_at)
    body_end = _closing(code, body_at, "{}")
    buffers: list[Buffer] = []
    arguments = []
    for start, part in _split(code, open_at + 1, close_at):
        parameter = _PARAMETER.match(part)
        line = code.count("\n", 0, start) + 1
        if parameter is None:
            raise KernelError("compile", f"cannot read the parameter {part!r}", line, text)
        type_, attribute = " ".join(parameter["type"].split()), parameter["attribute"]
        if attribute in (None, "buffer"):
            pointer = type_.rstrip("&* ") + "*"
            argument = f"({pointer})(unsigned long)args[{len(buffers)}]"
            arguments.append(f"*{argument}" if "&" in type_ else argument)
            buffers.append(Buffer(parameter["name"], type_))
        elif attribute in ATTRIBUTES:
            arguments.append(_attribute(attribute, type_))
        else:
            raise KernelError("compile", f"no such thread attribute: {attribute}", line, text)
    body = _VARIABLE.sub("EMU_THREADGROUP_VARIABLE", code[body_at : body_end + 1])
    rest = code[body_end + 1 :]
    instance = re.search(r"decltype\(\s*" + name + r"\s*(<.*?>)\s*\)\s*" + name, rest, re.S)
    call = name + (instance.group(1) if instance else "")
    head = code[:body_at]
    code = (
        '#include "metal.h"\n#line 1 "kernel.metal"\n'
        + head
        + body
        + '\n#line 1 "entry"\n#include "entry.h"\n'
        + f"EMU_ENTRY {{ {call}({', '.join(arguments)}); }}\n"
    )
    return Kernel(name, tuple(buffers), text, code)
