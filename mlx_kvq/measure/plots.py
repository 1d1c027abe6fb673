"""Plots of quality against bytes, of speed, and of a calibration."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..calibration.set import NAMES, CalibrationSet
from .evaluate import Evaluation
from .rivals import label

# Of caches, in every picture; a cache's options change the marker, not the color.
COLORS = {
    "fp16": "black", "kv8": "C7", "kv4": "C1", "int8-srft": "C2", "k8v4-srft": "C4",
    "int4-srft": "C0", "k4v3-srft": "C9", "int3-srft": "C6", "kivi": "C3", "kvarn": "C5",
    "k5v4-srft": "gold", "int5-srft": "indigo",
}  # fmt: skip
OTHERS = ("C8", "navy", "darkgreen", "0.5")  # for caches that are not of these
SYMBOLS = {"mu": "μ", "sigma": "σ", "lam": "λ"}
FLOOR = 1e-5  # nats; a smaller KL is drawn there, as a triangle
APART = 1.008  # factor between results of the same size, so that they are beside each other


def color_of(name: str, names: Sequence[str]) -> str:
    """The color of a cache among ``names``; one with options has that of its kind."""
    kind = name.partition(":")[0]
    rest = [n for n in dict.fromkeys(x.partition(":")[0] for x in names) if n not in COLORS]
    return COLORS[kind] if kind in COLORS else OTHERS[rest.index(kind) % len(OTHERS)]


def check(path: str) -> None:
    """Raise ValueError if matplotlib is missing or does not write files like ``path``."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib.") from None
    known = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix.lstrip(".").lower() not in known:
        raise ValueError(f"{path}: a plot is one of {', '.join(sorted(known))}.")


def draw_quality(evaluation: Evaluation, path: str) -> None:
    """Draw mean and 99th-percentile KL, and the change of perplexity, against bytes per token."""
    from matplotlib.figure import Figure

    results = evaluation.results[1:]
    s = evaluation.setting
    sizes, names = [r.bytes_per_token for r in results], [r.name for r in results]
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, r in enumerate(results):
        style = style_of(r.name, names)
        x = r.bytes_per_token
        x *= APART ** (sizes[:i].count(x) - (sizes.count(x) - 1) / 2)
        kl, high = max(r.kl.mean, FLOOR), max(r.kl_p99, FLOOR)
        ends = [max(v, FLOOR) for v in (r.kl.low, r.kl.high) if not np.isnan(v)]
        left.plot([x] * len(ends), ends, **style | {"lw": 2.5, "marker": "", "alpha": 0.5})
        left.plot([x, x], [kl, high], **style | {"lw": 0.8, "marker": ""})
        left.plot(x, high, **style | {"marker": "_"})
        left.plot(x, kl, **style if kl > FLOOR else style | {"marker": "v"})
        change, low, high = (100 * v for v in (r.change.mean, r.change.low, r.change.high))
        right.plot([x, x], [low, high], **style | {"lw": 0.8, "marker": "_"})
        right.plot(x, change, ls="", label=f"{label(r.name)}  ({r.bytes_per_token:.0f})", **style)
    left.set_yscale("log")
    left.set_ylabel("KL, nats per token: mean with its 95 % interval, and 99th percentile (–)")
    right.set_ylabel("change of perplexity, %, with its 95 % interval")
    right.axhline(0, color="0.6", lw=0.8)
    for axes in (left, right):
        _log2_axis(axes, "bytes per token, all layers", _apart(sizes), "{x:.0f}".format)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(
        f"{s['model']} against its own cache in {s['dtype']}: "
        f"{s['windows']} windows of {s['tokens']} tokens in chunks of {s['chunk']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


MARKERS = "oDv^<>phXP*d"  # of a cache's options


def style_of(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Color and marker of a cache among ``names``."""
    style = {"color": color_of(name, names), "marker": "o" if "-" in name else "s"}
    if ":" in name:
        style |= {"mfc": "white", "marker": MARKERS[_variant(name, names) % len(MARKERS)]}
    return style


def _variant(name: str, names: Sequence[str]) -> int:
    """The how manieth with options of its kind this is."""
    kind = name.partition(":")[0]
    return [n for n in names if n.startswith(f"{kind}:")].index(name)


def _log2_axis(axes, label: str, ticks: list, text: Callable[..., str]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_xscale("log", base=2)
    axes.set_xlabel(label)
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: text(x=x)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)


def _apart(sizes: Sequence[float]) -> list[float]:
    """The sizes without those that are too close to a smaller one for their ticks."""
    ticks: list[float] = []
    for size in sorted(sizes):
        if not ticks or size > 1.12 * ticks[-1]:
            ticks.append(size)
    return ticks


def draw_speed(results: list[dict], path: str, paper: list[dict]) -> None:
    """Draw ms per token (or µs per attention) against fp16's, after Figure 1 of the paper, with
    its ranges as bands. ``results`` as ``--json`` writes them. Raises ValueError without a row
    of fp16."""
    from matplotlib.figure import Figure

    panels = _panels(results)
    if not panels:
        raise ValueError("Nothing to draw: no row stands beside one of fp16.")
    names = list(dict.fromkeys(cache for panel in panels.values() for cache in panel))
    wide = min(3, len(panels))
    deep = -(-len(panels) // wide)
    figure = Figure(figsize=(1.6 + 4.6 * wide, 0.9 + 3.6 * deep), layout="constrained")
    grid = list(figure.subplots(deep, wide, squeeze=False).flat)
    for axes, (title, caches) in zip(grid, panels.items(), strict=False):
        bands = [row for row in paper if title.startswith(row["model"])]
        _draw_panel(axes, title, caches, names, bands)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.supylabel("time per token, fp16 = 1 (lower is faster)", fontsize=10)
    handles: dict = {}
    for axes in grid:
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(text, handle)
    shown, labels = list(handles.values()), list(handles)
    where: Any = {"loc": "outside lower center", "ncols": 4 * wide}
    figure.legend(shown, labels, fontsize=8, frameon=False, **where)
    record = results[0]["record"]
    figure.suptitle(
        f"{record['device']}, mlx {record['mlx']}, mlx_kvq {record['commit']}\n"
        "bands: quartiles over rounds",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)


def _panels(results: list[dict]) -> dict[str, dict[str, list]]:
    """Title -> cache -> (tokens, median, low, high) of the time relative to fp16."""
    panels: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for row in (row for result in results for row in result["rows"]):
        if "x_fp16" in row and row.get("op", "attend") == "attend":
            name = row.get("model") or f"attention, {row['heads']}"
            T = row["context"] if "model" in row else row["tokens"]
            middle, high, low = (1 / x for x in row["x_fp16"])
            panels[f"{name}, batch {row['batch']}"][row["cache"]].append((T, middle, low, high))
    return panels


TICKS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50)
FINE = (0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.2, 1.5)  # too close together on a wide axis


def _draw_panel(axes, title: str, caches: dict[str, list], names: list[str], bands: list) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    for cache, points in caches.items():
        T, middle, low, high = zip(*sorted(points), strict=True)
        color = color_of(cache, names)
        style = "-" if "-" in cache else "--"
        if cache != "fp16":
            axes.fill_between(T, low, high, color=color, alpha=0.15, lw=0)
        axes.plot(T, middle, style, marker="o", ms=3.5, color=color, label=cache)
    for row in bands:
        low, high = (1 + change for change in row["change"])
        axes.axhspan(low, high, color="0.6", alpha=0.35, lw=0, label=row["cache"])
    axes.set_title(title, fontsize=10)
    contexts = sorted({point[0] for points in caches.values() for point in points})
    _log2_axis(axes, "context, tokens", contexts, _short)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    wide = high / low > 4
    shown = [y for y in TICKS if low <= y <= high and not (wide and y in FINE)]
    axes.yaxis.set_major_locator(FixedLocator(shown))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def _short(x: float) -> str:
    return f"{x / 1024:.0f}K" if x >= 1024 else f"{x:.0f}"


def draw_calibration(calibration: CalibrationSet, title: str, path: str) -> None:
    """Draw every channel's μ and σ (and λ) over the layers, with the middle half of each layer."""
    from matplotlib.figure import Figure

    panels: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    for side, name in itertools.product(("keys", "values"), NAMES):
        for i, (_, layer) in enumerate(sorted(calibration.layers.items())):
            if (a := layer.sides()[side].arrays().get(name)) is not None:
                panels[f"{SYMBOLS[name]} of the {side}"][i] = np.array(a).ravel()
    names = [".".join(map(str, path)) for path in sorted(calibration.layers)]
    figure = Figure(figsize=(1 + 4 * len(panels), 3.6), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (heading, layers) in zip(grid, panels.items(), strict=True):
        for i, values in layers.items():
            spread = np.linspace(-0.25, 0.25, values.size)
            axes.plot(i + spread, values, ".", ms=3, color="C0", alpha=0.6, mew=0)
            low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
            axes.plot([i, i], [low, high], lw=2, color="C1")
            axes.plot(i, middle, "o", ms=3, color="C1")
        axes.set_title(heading, fontsize=10)
        axes.set_xlabel("layer")
        step = -(-len(names) // 12)
        axes.set_xticks(range(0, len(names), step), names[::step])
        if heading.startswith(SYMBOLS["mu"]):
            axes.axhline(0, color="0.6", lw=0.6)
        else:
            axes.set_yscale("log")
            every = np.concatenate(list(layers.values()))
            ticks = np.geomspace(every.min(), every.max(), 5)
            axes.set_yticks(ticks, [f"{t:.3g}" for t in ticks])
            axes.set_yticks([], minor=True)
        axes.grid(alpha=0.25)
    figure.suptitle(
        f"{title}\neach dot a channel, in order within its layer; median and middle half",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)
