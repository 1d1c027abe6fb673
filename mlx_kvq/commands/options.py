"""What commands take for a cache and for a number: short names, hints, 32K."""

import argparse
import re
from collections.abc import Callable, Iterable

from ..format.spec import BITS, OFF, ROTATIONS, Spec

# What others call theirs -> ours. The first that matches.
ELSEWHERE = {
    "int4-srft": r"4|(i?q|kv|k|int|fp|nf|tq|turbo)_?4\w*|4_?bits?|turboquant.*|kivi.*|polarquant",
    "int3-srft": r"3|(i?q|kv|k|int|tq|turbo)_?3\w*|3_?bits?",
    "int5-srft": r"5|(i?q|kv|k|int|tq|turbo)_?5\w*|5_?bits?",
    "int8-srft": r"8|(q|kv|k|int|fp|tq|turbo)_?8\w*|8_?bits?",
    OFF: r"16|b?f16|bfp?16|b?float16|none|off|no|false",
}
NAMES = f"{OFF}\n" + "\n".join(" ".join(f"{b}-{r}" for r in ROTATIONS) for b in BITS)


def cache(*others: str) -> Callable[[str], str]:
    """For ``type=`` of an option that takes a spec, or one of ``others``."""

    def parse(text: str) -> str:
        name = text.strip().lower()
        if name in others:
            return name
        try:
            return str(Spec.parse(name) or OFF)
        except ValueError as error:
            name = name.partition(":")[0]
            raise argparse.ArgumentTypeError(_explained(name, str(error), others)) from None

    return parse


def _explained(name: str, error: str, others: Iterable[str]) -> str:
    said, known, _ = error.partition(f" Known: {OFF}, ")
    if not known:  # the name is right
        return error
    for ours, theirs in ELSEWHERE.items():
        if re.fullmatch(theirs, name):
            said = f"there is no {name!r} here. The nearest is '{ours}'."
            break
    return "\n".join([said, "Known:", NAMES, *filter(None, [" ".join(others)])])


def length(text: str) -> int:
    """A whole number; ``32K`` is 32 times 1024."""
    if not (found := re.fullmatch(r"([+-]?[0-9]+)(k?)", text.strip().lower().replace("_", ""))):
        said = f"it is a whole number such as 4096 or 32K (32 times 1024), got {text!r}"
        raise argparse.ArgumentTypeError(said)
    return int(found[1]) * (1024 if found[2] else 1)


def size(text: str) -> int:
    """Bytes: ``16GB`` are 16 times 1024³, as the memory of a computer is sold."""
    if not (found := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)i?b?", text.strip().lower())):
        raise argparse.ArgumentTypeError(f"memory is written like 16GB, got {text!r}")
    return int(float(found[1]) * 1024 ** ("kmgt".find(found[2] or "g") + 1))
