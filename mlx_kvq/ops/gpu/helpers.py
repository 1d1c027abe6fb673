"""The part of a kernel's header that its body needs: MLX copies and hashes the text of a kernel at
every launch.

Left out are functions and structures whose name appears neither in the body nor in what is needed
otherwise. A name counts wherever it stands, so more may be kept than needed, never less. What is
not understood (variables, macros, ``enum``) is kept.
"""

import re
from collections.abc import Iterator

_WORD = re.compile(r"[A-Za-z_]\w*")
_NAMESPACE = re.compile(r"\s*namespace \w+ \{")
_TYPE = re.compile(r"\s*struct (\w+)")
_FUNCTION = re.compile(r"[^={(]*?\b(\w+)\s*\(")


def needed(header: str, body: str) -> str:
    """``header``, text without comments, as far as ``body`` needs it."""
    parts = [(_name(part), part) for part in _parts(header)]
    known = set(_WORD.findall(body))
    for name, part in parts:
        if name is None:
            known.update(_WORD.findall(part))
    taken: set[int] = set()
    while new := [i for i, (name, _) in enumerate(parts) if name in known and i not in taken]:
        taken.update(new)
        for i in new:
            known.update(_WORD.findall(parts[i][1]))
    return "".join(part for i, (name, part) in enumerate(parts) if name is None or i in taken)


def _parts(text: str) -> Iterator[str]:
    """The text in pieces: lines of the preprocessor, the bounds of namespaces, and declarations."""
    at = 0
    while at < len(text):
        end = _end(text, at)
        yield text[at:end]
        at = end


def _end(text: str, at: int) -> int:
    """Where the piece ends that begins at ``at``."""
    if found := _NAMESPACE.match(text, at):
        return found.end()
    line = re.compile(r"\s*(#.*|\})?\n?").match(text, at)
    assert line is not None
    if line[1] or line.end() == len(text):
        return line.end()
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] in "({[") - (text[i] in ")}]")
        if depth == 0 and text[i] in ";}":
            rest = re.compile(r"\s*;?\n?" if text[i] == "}" else r"\n?").match(text, i + 1)
            assert rest is not None
            return rest.end()
    return len(text)


def _name(part: str) -> str | None:
    """Of a function or a structure; None for anything else."""
    text = _without_template(part)
    found = _TYPE.match(text) or (None if "#" in part else _FUNCTION.match(text))
    # A variable that a call initializes has its "=" before the parenthesis.
    return found[1] if found else None


def _without_template(part: str) -> str:
    """A declaration without ``template <…>`` before it."""
    found = re.match(r"\s*template\s*<", part)
    if not found:
        return part
    depth, i = 1, found.end()
    while depth and i < len(part):
        depth += (part[i] == "<") - (part[i] == ">")
        i += 1
    return part[i:]
