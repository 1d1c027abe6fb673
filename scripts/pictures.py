"""Draws the pictures of README.md and docs/, and the table in docs/memory.md, from docs/pictures/.

    python scripts/pictures.py            # draw, and write the table
    python scripts/pictures.py --check    # say which are not current; CI runs the same as a test

- ``configs.json``: configs of real models and the memory they are to fit into; ``memory.png``.
- ``real_models.json``: rows of several runs of ``scripts/studies/real_models.py``, those of
  docs/quality.md; without options a cache is rounded as on a GPU; ``real_models.png``.
- ``scale.json``: see ``scripts/scale.py``; ``scale.png``.

A picture carries a hash of its JSON, of this file, of scale.py and of the colors in its metadata.
A change of the JSON that is not drawn, and a picture that something else drew, is found by that.
"""

import argparse
import hashlib
import json
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scale
from configs import Model

from mlx_kvq.commands import fit
from mlx_kvq.commands.options import size
from mlx_kvq.measure.plots import COLORS, FLOOR, color_of, style_of
from mlx_kvq.measure.rivals import label

ROOT = Path(__file__).resolve().parents[1]
DATA, IMAGES = ROOT / "docs" / "pictures", ROOT / "docs" / "images"
KEY = "mlx_kvq"  # of the hash in a picture's metadata
SIZES = ("16GB", "24GB", "32GB", "64GB")
BESIDE = 1.02  # factor between caches of the same size in a panel
CALLED = {  # a name for caches whose options a reader need not know
    "kv8": "kv8 of mlx-lm",
    "kv4": "kv4 of mlx-lm",
    "kivi:first=4": "KIVI-like, 4 bits (fake-quantized)",
    "kvarn:first=4": "KVarN-like, 4 bits (fake-quantized)",
    "int4-srft:group_size=64,scale=paper,calibrate=off,recent=0,first=0": "the paper's rule",
}
BEGIN, END = "<!-- fits -->\n", "<!-- /fits -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="Draw nothing.")
    if parser.parse_args().check:
        sys.exit("\n".join(stale()) or 0)
    for name, (draw, data) in PICTURES.items():
        draw(json.loads((DATA / data).read_text()), IMAGES / name)
        stamp(IMAGES / name, digest(data))
        print(IMAGES / name)
    page = ROOT / "docs" / "memory.md"
    page.write_text(with_table(page.read_text(), fits_table()))


def digest(data: str) -> str:
    """What a picture of this JSON depends on."""
    code = Path(__file__).read_bytes() + Path(scale.__file__).read_bytes()
    text = (DATA / data).read_bytes() + code + repr(COLORS).encode()
    return hashlib.sha256(text).hexdigest()[:24]


def stale() -> list[str]:
    """The pictures that are not current, and those that nothing here draws."""
    found = [
        f"docs/images/{name} is not that of docs/pictures/{data}: python scripts/pictures.py"
        for name, (_, data) in PICTURES.items()
        if not (IMAGES / name).exists() or stamped(IMAGES / name) != digest(data)
    ]
    others = {p.name for p in IMAGES.iterdir()} - set(PICTURES)
    return found + [f"docs/images/{name} is drawn by nothing here" for name in sorted(others)]


def chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    """Type and content of every chunk of a PNG file."""
    found, at = [], 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        found.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def stamp(path: Path, text: str) -> None:
    """Put a text chunk behind the header of a PNG file; others go, as they name versions."""
    png = path.read_bytes()
    kept = [c for c in chunks(png) if c[0] != b"tEXt"]
    kept.insert(1, (b"tEXt", f"{KEY}\0{text}".encode()))
    with open(path, "wb") as file:
        file.write(png[:8])
        for kind, data in kept:
            crc = struct.pack(">I", zlib.crc32(kind + data))
            file.write(struct.pack(">I", len(data)) + kind + data + crc)


def stamped(path: Path) -> str:
    """The hash in a picture, "" without one."""
    for kind, data in chunks(path.read_bytes()):
        if kind == b"tEXt" and data.startswith(f"{KEY}\0".encode()):
            return data.partition(b"\0")[2].decode()
    return ""


def models() -> dict[str, Model]:
    data = json.loads((DATA / "configs.json").read_text())
    return {n: Model(n, m["config"], data["weight_bits"]) for n, m in data["models"].items()}


def fits_table() -> str:
    """Tokens of context of one request in fp16 and int4, over the memory of the machine."""
    head = f"| weights in 4 bits | cache | {' | '.join(s[:-2] + ' GB' for s in SIZES)} |\n"
    lines = [head, f"|---|---|{'--:|' * len(SIZES)}\n"]
    for name, model in models().items():
        for cache in ("fp16", "int4-srft"):
            cells = [model.cell(cache, s) or "–" for s in SIZES]
            lines.append(f"| {name} | `{cache}` | {' | '.join(cells)} |\n")
    return "".join(lines)


def with_table(page: str, table: str) -> str:
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}{table}{END}{rest.partition(END)[2]}"


def draw_memory(data: dict, path: Path) -> None:
    """Memory over the context of one request, and where 16 GB end."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    name, given = next(iter(data["models"].items()))
    model = Model(name, given["config"], data["weight_bits"])
    limit, before = fit.wired(size(given["memory"]))[0], model.weights + fit.RESERVE
    most = model.most or 1 << 17
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for cache in ("fp16", "int8-srft", "int4-srft"):
        x = [most * i // 64 for i in range(65)]
        plan = model.plan(cache)
        y = [(before + plan.bytes(t, 1)) / (1 << 30) for t in x]
        color = color_of(cache, [cache])
        axes.plot(x, y, color=color, lw=2, label=cache)
        end = min(plan.context(limit - before, 1), most)
        axes.plot(end, (before + plan.bytes(end, 1)) / (1 << 30), "o", color=color)
        axes.annotate(
            f"{end / 1024:.0f}K", (end, limit / (1 << 30)), (0, 6), textcoords="offset points",
            ha="right" if end > most / 2 else "center", color=color,
        )  # fmt: skip
    text = f"what macOS lets a process wire of {given['memory'][:-2]} GB"
    axes.axhline(limit / (1 << 30), color="0.4", lw=0.8, ls="--", label=text)
    axes.set_ylim(0, 1.6 * limit / (1 << 30))
    axes.set_xlim(0, most)
    axes.set_xticks(range(0, most + 1, 16384))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda t, _: f"{t / 1024:.0f}K"))
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("GB: weights, reserve, cache")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    axes.set_title(f"{name}, weights in {data['weight_bits']} bits: computed by mlx_kvq fit")
    figure.savefig(path, dpi=150)


def draw_real_models(data: dict, path: Path) -> None:
    """KL as decoding reads over bytes per token; a line for each model."""
    from matplotlib.figure import Figure

    rows = [r for r in data["rows"] if r["kind"] == "quality" and "decode" in r]
    names = list(dict.fromkeys(r["cache"] for r in rows))
    models = {
        r["model"]: sorted({s["context"] for s in rows if s["model"] == r["model"]}) for r in rows
    }
    most = max(map(len, models.values()))
    wide = max(8, 1 + 4 * most)
    columns = max(1, int(wide // (0.6 + 0.07 * max(len(_called(n)) for n in names))))
    deep = 0.6 + 3.6 * len(models) + 0.17 * -(-len(names) // columns)
    figure = Figure(figsize=(wide, deep), layout="constrained")
    grid = figure.subplots(len(models), most, squeeze=False, sharey="row")
    shown: dict = {}
    for (model, contexts), line in zip(models.items(), grid, strict=True):
        line[0].set_ylabel("KL from the model's own cache, nats per token", fontsize=9)
        for axes in line[len(contexts) :]:
            axes.set_visible(False)
        for context, axes in zip(contexts, line, strict=False):
            here = [r for r in rows if (r["model"], r["context"]) == (model, context)]
            shown |= _panel(axes, here, names)
            axes.set_title(f"{model}, {context:,} tokens", fontsize=10)
            axes.set_xlabel("bytes per token, all that is kept exactly counted", fontsize=9)
    where: Any = {"loc": "outside lower center", "ncols": columns}
    figure.legend(list(shown.values()), list(shown), fontsize=8, frameon=False, **where)
    record = data["record"]
    made_by = f"{record['device']}, mlx {record['mlx']}, mlx_kvq {record['commit']}"
    figure.suptitle(f"As decoding reads; lines: 95 % intervals\n{made_by}", fontsize=9)
    figure.savefig(path, dpi=150)


def _called(cache: str) -> str:
    return CALLED.get(cache, label(cache).replace("-srft", ""))


def _panel(axes, rows: list[dict], names: list[str]) -> dict:
    """Draw the rows of one model and context; label -> what stands for it in the legend."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    shown, sizes = {}, [r["bytes_per_token"] for r in rows]
    for i, r in enumerate(rows):
        style, kl = style_of(r["cache"], names), r["decode"]["kl"]
        low, middle, high = (max(kl[k], FLOOR) for k in ("low", "mean", "high"))
        x = sizes[i] * BESIDE ** (sizes[:i].count(sizes[i]) - (sizes.count(sizes[i]) - 1) / 2)
        axes.plot([x, x], [low, high], color=style["color"], lw=1.2, alpha=0.6)
        under = {"marker": "v"} if middle == FLOOR else {}
        (shown[_called(r["cache"])],) = axes.plot(x, middle, ls="", ms=6, **style | under)
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    return shown


def draw_scale(data: dict, path: Path) -> None:
    """Tokens a second over the sequences of one model, a panel for each machine."""
    from matplotlib.figure import Figure

    name, tokens = "Llama-3.1-8B", 32768
    found = [r for r in scale.rows(data) if (r.model, r.tokens) == (name, tokens)]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    grid = figure.subplots(1, len(data["memory"]))
    for axes, (machine, memory) in zip(grid, data["memory"].items(), strict=True):
        for cache in scale.CACHES:
            rows = [r for r in found if (r.machine, r.cache) == (machine, cache) and r.rate]
            x, (low, high) = [r.sequences for r in rows], zip(*(r.rate for r in rows), strict=True)
            color = color_of(cache, [cache])
            axes.fill_between(x, low, high, color=color, alpha=0.25, lw=0)
            axes.vlines(x, low, high, color=color, alpha=0.4)
            axes.plot(x, low, "o-", color=color, ms=4, label=f"{cache}, at least")
            if x[-1] < scale.BATCHES[-1]:
                text = f"{cache}: no room\nfor {scale.BATCHES[len(x)]}"
                axes.annotate(
                    text, (x[-1], low[-1]), (8, -2), textcoords="offset points", fontsize=8,
                    color=color, va="top",
                )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xlim(0.8, 160)
        axes.set_xticks(scale.BATCHES, [str(b) for b in scale.BATCHES])
        axes.set_ylim(0, 1.15 * max(r.rate[1] for r in found if r.machine == machine and r.rate))
        kind = "an estimate" if machine in data["apple"] else "from measured rates"
        axes.set_title(f"{machine}, {memory[:-2]} GB: {kind}", fontsize=10)
        axes.set_xlabel("requests at once")
        axes.grid(alpha=0.25)
    grid[0].set_ylabel("tokens per second, all together")
    grid[-1].legend(frameon=False, fontsize=8, loc="upper left")
    figure.suptitle(f"On paper: {name}, weights in 4 bits, {tokens:,} tokens each", fontsize=10)
    figure.savefig(path, dpi=150)


PICTURES: dict[str, tuple[Callable[[dict, Path], None], str]] = {
    "memory.png": (draw_memory, "configs.json"),
    "real_models.png": (draw_real_models, "real_models.json"),
    "scale.png": (draw_scale, "scale.json"),
}


if __name__ == "__main__":
    main()
