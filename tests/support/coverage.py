"""Writes docs/coverage.md: what int4 packs in every family of mlx-lm, on tiny random models.

    python -m tests.support.coverage [--check]

``--check`` writes nothing and fails if the table is another; so does, family by family,
``tests/model/test_families.py``, but for the errors, which depend on the machine.
"""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from mlx_kvq.model.report import layer_ranges
from tests.support.families import LAYERS, Coverage, examine, families
from tests.support.family_settings import NO_BATCH, NOT_TRIED

TARGET = Path(__file__).resolve().parents[2] / "docs" / "coverage.md"
HEAD = """\
# Model families of mlx-lm {version}

Written by `python -m tests.support.coverage`: every model class of `mlx_lm.models` (a family's
name is its `model_type`), built small ({layers} layers) with random weights and run in fp32 on CPU
through a prompt, a second chunk and single tokens, past the sliding windows, then in a batch of
three prompts of different lengths.

- *caches*: what mlx-lm makes for the family; `KVCache` grows, `RotatingKVCache` is a sliding
  window, both are packed. A `CacheList` is packed where its parts are.
- *int8*, *int4*: error of the logits after the first chunk against the model's own cache,
  relative, the median over the tokens. Random weights say that a family works, not how good its
  text is.
- *batch*: "yes" if each sequence gets the logits that it gets alone (to 1e-4; on a CPU the
  difference is 0). Where not, the model's own cache fails as well, and the reason is mlx-lm's.
- "as arrays": the family computes its attention itself (Gemma 2 caps its logits), so keys and
  values are unpacked for it, one layer at a time; they stay packed in memory.

| family | packed | caches | int8 | int4 | batch | notes |
|---|---|---|---|---|---|---|
"""


def cells(name: str, found: Coverage) -> list[str]:
    """The table's row."""
    if found.refusal:
        return [name, "none", "–", "–", "–", "–", found.refusal]
    notes = []
    if found.sinks:
        notes.append("attention sinks")
    if found.unpacked:
        notes.append("as arrays")
    reasons: dict[str, list[int]] = {}
    for layer, reason in found.left.items():
        reasons.setdefault(reason, []).append(layer)
    notes += [f"left {layer_ranges(which)}: {reason}" for reason, which in reasons.items()]
    batch = "yes"
    if found.batch:
        batch = f"no, {found.batch}: {NO_BATCH[name]}"
    errors = [f"{found.errors[bits]:.4f}" for bits in ("int8", "int4")]
    packed = f"{found.packed} of {found.layers}"
    return [name, packed, ", ".join(found.caches), *errors, batch, "; ".join(notes)]


def documented() -> dict[str, list[str]]:
    """Family -> its row as it stands in the file."""
    lines = TARGET.read_text().splitlines()
    rows = [line[2:-2].split(" | ") for line in lines if line.startswith("| ")][1:]
    return {row[0]: row for row in rows}


def table() -> str:
    rows = []
    for name in tqdm(sorted({*families(), *NOT_TRIED}), unit="family"):
        if name in NOT_TRIED:
            rows.append([name, "not tried", "–", "–", "–", "–", NOT_TRIED[name]])
        else:
            rows.append(cells(name, examine(name)))
    refused = sum(row[1] == "none" for row in rows)
    foot = (
        f"\n{len(rows) - refused - len(NOT_TRIED)} families packed, {refused} with nothing to "
        f"pack, which is refused with the reason given, {len(NOT_TRIED)} not tried here.\n"
    )
    head = HEAD.format(version=version("mlx-lm"), layers=LAYERS)
    return head + "".join(f"| {' | '.join(row)} |\n" for row in rows) + foot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail if the file is not up to date")
    check = parser.parse_args().check
    made = table()
    if not check:
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text(made)
    elif made != TARGET.read_text():
        sys.exit(f"docs/{TARGET.name} is not what python -m tests.support.coverage writes: run it")


if __name__ == "__main__":
    main()
