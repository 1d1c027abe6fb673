"""Tokens per second and context per GB for 1 to 64 sequences, on paper.

    python scripts/scale.py --write docs/performance.md

Bytes are counted by the package, as ``mlx_kvq fit`` does: weights in 4 bits, rows, exact tokens, a
reserve. Times of attention are docs/pictures/scale.json's: of Apple GPUs an estimate
(tests/emulator/estimate_apple), of an H200 from measured rates. Nothing was measured end to end.

A step of B sequences takes its weights, read once or, where products of B rows take longer, by
operations; attention of B sequences; and on Apple GPUs each layer's fixed part and the tokens
stored, on an H200 no less than the host takes.
"""

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from configs import Model

from mlx_kvq.commands import fit
from mlx_kvq.commands.options import size

DATA = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "scale.json"
CACHES = ("fp16", "int4-srft")
BATCHES, CONTEXTS = (1, 4, 16, 64), (4096, 32768, 131072)
BEGIN, END = "<!-- scale -->\n", "<!-- /scale -->"
GB = 1 << 30


@dataclass(frozen=True)
class Row:
    """Tokens a second of all sequences together, at least and at most; ``None`` if they do not
    fit."""

    machine: str
    model: str
    cache: str
    tokens: int
    sequences: int
    rate: tuple[float, float] | None


def limit(machine: str, memory: str) -> int:
    """Bytes for weights, caches and the reserve: a GPU of its own may use all of its memory."""
    return size(memory) if machine == "H200" else fit.wired(size(memory))[0]


def apple(machine: dict, heads: str, cache: str, tokens: int, B: int) -> tuple[float, float]:
    """Seconds of a layer's attention and its new tokens, at best and at worst."""
    given = machine["heads"][heads]
    low, high = given[f"{B} x {tokens}"][:2] if cache == "fp16" else given[f"{B} x {tokens}"][2:4]
    stored = (0, 0) if cache == "fp16" else given[f"{B} x {tokens} stored"]
    return (low + stored[0]) / 1e6, (high + stored[1]) / 1e6


def h200(machine: dict, heads: str, cache: str, held: float) -> tuple[float, float]:
    """Likewise, of so many bytes."""
    given = machine["heads"][heads]
    fp16, slow, fast = given["rates"]
    rates = (fp16, fp16) if cache == "fp16" else (fast, slow)
    floor = given["floor"][cache != "fp16"] / 1e6
    return max(floor, held / rates[0]), max(floor, held / rates[1])


def seconds(data: dict, name: str, heads: str, model: Model, cache: str, T: int, B: int):
    """Of a step, at best and at worst."""
    machine = data["apple"].get(name, data["h200"])
    layers, plan = len(model.layers), model.plan(cache)
    operations = 2 * B * model.weights * 8 / 4.5  # 4.5 bits are a weight
    times = [max(model.weights / machine["bandwidth"], operations / machine["flops"])] * 2
    for (token, _, window), count in Counter(plan.layers).items():
        seen = min(T, window or T)
        if name in data["apple"]:
            layer = apple(machine, heads, cache, seen, B)
        else:
            layer = h200(machine, heads, cache, B * seen * token)
        times = [a + count * b for a, b in zip(times, layer, strict=True)]
    if name in data["apple"]:
        return tuple(t + layers * machine["layer"] for t in times)
    return tuple(max(t, layers * machine["host"]) for t in times)


def rows(data: dict) -> list[Row]:
    found = []
    for name, memory in data["memory"].items():
        for label, given in data["models"].items():
            model = Model(label, given["config"], data["weight_bits"])
            left = limit(name, memory) - model.weights - fit.RESERVE
            for cache in CACHES:
                for T in CONTEXTS:
                    for B in BATCHES:
                        best, worst = seconds(data, name, given["heads"], model, cache, T, B)
                        fits = model.plan(cache).bytes(T, B) <= left
                        rate = (B / worst, B / best) if fits else None
                        found.append(Row(name, label, cache, T, B, rate))
    return found


def text(rate: tuple[float, float] | None) -> str:
    if rate is None:
        return "no room"
    low, high = (f"{x:.1f}" if x < 10 else f"{x:,.0f}" for x in rate)
    return low if low == high else f"{low}–{high}"


def tables(data: dict) -> str:
    lines = []
    cells = {(r.machine, r.model, r.cache, r.tokens, r.sequences): r.rate for r in rows(data)}
    for name, memory in data["memory"].items():
        many = " | ".join(f"{b} at once" for b in BATCHES)
        lines.append(f"| {name}, {memory[:-2]} GB | tokens each | {many} |")
        lines.append("|---" * 2 + "|--:" * len(BATCHES) + "|")
        for label in data["models"]:
            for T in CONTEXTS:
                pairs = [[text(cells[name, label, c, T, B]) for c in CACHES] for B in BATCHES]
                joined = " | ".join(a if a == b else f"{a}; **{b}**" for a, b in pairs)
                lines.append(f"| {label} | {T // 1024}K | {joined} |")
        lines.append("")
    return "\n".join([*lines, *density(data), ""])


def density(data: dict) -> list[str]:
    """Tokens of context in a GB of cache."""
    heads = " | ".join(f"{T // 1024}K" for T in CONTEXTS)
    lines = [f"| thousand tokens in a GB | fp16 | `int4`, of {heads} |"]
    lines.append("|---|--:" + "|--:" * len(CONTEXTS) + "|")
    for label, given in data["models"].items():
        model = Model(label, given["config"], data["weight_bits"])
        of = {c: [model.plan(c).bytes(T, 64) / 64 / T for T in CONTEXTS] for c in CACHES}
        per = {c: [GB / 1000 / x for x in of[c]] for c in CACHES}
        fp16 = " to ".join(dict.fromkeys(f"{x:.3g}" for x in (per["fp16"][0], per["fp16"][-1])))
        lines.append(f"| {label} | {fp16} | {' | '.join(f'{x:.3g}' for x in per['int4-srft'])} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="PAGE", help="Put the tables into a page.")
    page, made = parser.parse_args().write, tables(json.loads(DATA.read_text()))
    if page is None:
        return print(made)
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{before}{BEGIN}{made}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
