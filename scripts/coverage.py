"""Writes docs/coverage.md: what int4 packs in every family of mlx-lm, on tiny random models.

PYTHONPATH=. python scripts/coverage.py [--check]
"""

import sys
from importlib.metadata import version
from pathlib import Path

from mlx_lm.models.cache import make_prompt_cache

import mlx_kvq
from mlx_kvq.model import _ranges
from tests.families import LAYERS, build, error, families, logits
from tests.family_settings import NOT_TRIED

TARGET = Path(__file__).resolve().parent.parent / "docs" / "coverage.md"
HEAD = """\
# Model families of mlx-lm {version}

Written by `scripts/coverage.py`: every model class of `mlx_lm.models`, built small ({layers}
layers) with random weights and run in fp32 on CPU through a prompt, a second chunk and single
tokens, past the sliding windows. The error is that of the logits after the first chunk against
the model's own cache, relative, the median over the tokens. Random weights say that a family
works, not how good its text is.

"Unpacked to attend": the family computes its attention itself (Gemma 2 caps its logits), so a
layer's keys and values are unpacked for it, one layer at a time.

| family | packed layers | int8 error | int4 error | left as they are, and why |
|---|---|---|---|---|
"""


def row(name: str) -> str:
    model = build(name)
    expected = logits(model, make_prompt_cache(model))
    errors = []
    for bits in ("int8", "int4"):
        try:
            report = mlx_kvq.enable(model, f"{bits}-srft:calibrate=off", verbose=False)
        except ValueError as refusal:
            reason = str(refusal).partition("of this model: ")[2].rstrip(".")
            return f"| {name} | none | – | – | {reason} |"
        errors.append(f"{error(logits(model, make_prompt_cache(model)), expected):.4f}")
    kinds = dict.fromkeys(type(c).__name__.removeprefix("Packed") for c in make_prompt_cache(model))
    reasons: dict[str, list[int]] = {}
    for layer, reason in report.left.items():
        reasons.setdefault(reason, []).append(layer)
    notes = [f"{_ranges(which)}: {reason}" for reason, which in reasons.items()]
    if report.unpacked:
        notes.append("(unpacked to attend)")
    layers = len(report.packed) + len(report.left)
    packed = f"{len(report.packed)} of {layers} ({', '.join(kinds)})"
    return f"| {name} | {packed} | {' | '.join(errors)} | {'; '.join(notes)} |"


def table() -> str:
    names = sorted({*families(), *NOT_TRIED})
    rows = [
        f"| {n} | not tried | – | – | {NOT_TRIED[n]} |" if n in NOT_TRIED else row(n) for n in names
    ]
    packed = sum("| none |" not in r and "| not tried |" not in r for r in rows)
    refused = sum("| none |" in r for r in rows)
    foot = (
        f"\n{packed} families packed, {refused} refused with the reason given, "
        f"{len(NOT_TRIED)} not tried here.\n"
    )
    head = HEAD.format(version=version("mlx-lm"), layers=LAYERS)
    return head + "\n".join(rows) + "\n" + foot


if __name__ == "__main__":
    made = table()
    if sys.argv[1:] == ["--check"]:
        sys.exit(made != TARGET.read_text() and f"{TARGET.name} is not what the script writes")
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(made)
