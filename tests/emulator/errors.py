"""The one error of the emulator."""

import re

_SPACES = {"1": "device", "2": "constant", "3": "threadgroup"}


def metal_names(message: str) -> str:
    """A message with Metal's address spaces for clang's attributes."""
    attribute = r"(?:const )?__attribute__\(\(address_space\((\d)\)\)\)"
    return re.sub(attribute, lambda m: _SPACES[m.group(1)], message)


class KernelError(RuntimeError):
    """A fault in a kernel.

    Args:
        kind (str): What was found, for example ``"data race"``.
        detail (str): Who did what, in one sentence.
        line (int): Line of the generated source, from 1; 0 when no line is to blame.
        source (str): The generated source.
        note (str): What to print below, for example the compiler's output.
    """

    def __init__(self, kind: str, detail: str, line: int = 0, source: str = "", note: str = ""):
        lines = source.splitlines()
        self.kind = kind
        self.detail = detail
        self.line = line
        self.text = lines[line - 1].strip() if 0 < line <= len(lines) else ""
        where = f" (line {line} of the generated source)\n    {line}: {self.text}" if line else ""
        super().__init__(f"{kind}: {detail}{where}" + (f"\n{note}" if note else ""))
