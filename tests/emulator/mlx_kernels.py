"""Sources of MLX's own kernels, from the headers in its wheel."""

import re
from pathlib import Path

import mlx.core as mx

KERNELS = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels"


def mlx_source(file: str, name: str, arguments: str, constants: str = "") -> str:
    """One kernel of a header with its helpers and its instantiation; function constants, which
    a custom kernel cannot have, become the given values."""
    text = (KERNELS / file).read_text()
    text = re.sub(r"^#include.*$|^using namespace metal;$", "", text, flags=re.M)
    text = re.sub(r"^constant \w+ \w+ \[\[function_constant\(\d+\)\]\];$", "", text, flags=re.M)
    text = re.sub(r", function_constant\(\w+\)\]\]", "]]", text)
    starts = list(re.finditer(r"template <[^>]*>\s*\[\[kernel\]\] void (\w+)\(", text))
    ends = [*(m.start() for m in starts[1:]), len(text)]
    body = next(
        text[m.start() : end] for m, end in zip(starts, ends, strict=True) if m.group(1) == name
    )
    # As in a generated source, the parameters' types are spelled out.
    head, rest = body.split(") {", 1)
    element = arguments.split(",")[0]
    body = re.sub(r"\bdevice T\*", f"device {element}*", head) + ") {" + rest
    instance = f"template [[kernel]] decltype({name}<{arguments}>) {name}<{arguments}>;\n"
    return constants + text[: starts[0].start()] + body + instance
