"""Plots of quality against bytes, of speed, and of a calibration."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..calibration.set import NAMES, CalibrationSet

if TYPE_CHECKING:
    from .evaluate import Evaluation


FLOOR = 1e-5  # nats; whatever is nearer to the baseline is drawn there, as a triangle
APART = 1.008  # between results of the same size, so that they are beside each other


def check(path: str) -> None:
    """
    Raises:
        ValueError: If matplotlib is missing or does not write files like ``path``.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib.") from None
    known = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix.lstrip(".").lower() not in known:
        raise ValueError(f"{path}: a plot is one of {', '.join(sorted(known))}.")


def draw_quality(evaluation: "Evaluation", path: str) -> None:
    """Draw mean and 99th-percentile KL, and the change of perplexity, against bytes per token."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    results = evaluation.results[1:]
    s = evaluation.setting
    sizes = [r.bytes_per_token for r in results]
    colors = colormaps["tab10"].colors + colormaps["Dark2"].colors  # type: ignore[attr-defined]
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, r in enumerate(results):
        color, marker = colors[i % len(colors)], "o" if "-" in r.name else "s"
        x = r.bytes_per_token
        x *= APART ** (sizes[:i].count(x) - (sizes.count(x) - 1) / 2)
        kl, high = max(r.kl.mean, FLOOR), max(r.kl_p99, FLOOR)
        left.plot([x, x], [kl, high], lw=0.8, color=color)
        left.plot(x, high, marker="_", color=color)
        left.plot(x, kl, marker=marker if kl > FLOOR else "v", color=color)
        change, low, high = (100 * v for v in (r.change.mean, r.change.low, r.change.high))
        right.plot([x, x], [low, high], lw=0.8, marker="_", color=color)
        label = f"{r.name}  ({r.bytes_per_token:.0f})"
        right.plot(x, change, ls="", marker=marker, color=color, label=label)
    left.set_yscale("log")
    left.set_ylabel("KL, nats per token: mean, and 99th percentile (–)")
    right.set_ylabel("change of perplexity, %, with its 95 % interval")
    right.axhline(0, color="0.6", lw=0.8)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("bytes per token, all layers")
        axes.set_xticks(_apart(sizes))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(
        f"{s['model']} against its own cache in {s['dtype']}: "
        f"{s['windows']} windows of {s['tokens']} tokens in chunks of {s['chunk']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


def _apart(sizes: Sequence[float]) -> list[float]:
    """The sizes without those that are too close to a smaller one for their ticks."""
    ticks: list[float] = []
    for size in sorted(sizes):
        if not ticks or size > 1.12 * ticks[-1]:
            ticks.append(size)
    return ticks


TICKS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50)


def draw_speed(results: list[dict], path: str, paper: list[dict]) -> None:
    """Draw ms per token (or µs per attention) against fp16's, after Figure 1 of the paper.

    Args:
        results (list): What ``--json`` writes, of one or several runs.
        path (str): Where to; the suffix says which kind of file.
        paper (list): The paper's own range of a model, drawn as a band.

    Raises:
        ValueError: If there is nothing to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    panels: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        for row in result["rows"]:
            if "x_fp16" not in row or row.get("op", "attend") != "attend":
                continue
            name = row.get("model") or f"attention, {row['heads']}"
            T = row["context"] if "model" in row else row["tokens"]
            middle, high, low = (1 / x for x in row["x_fp16"])
            panels[f"{name}, batch {row['batch']}"][row["cache"]].append((T, middle, low, high))
    if not panels:
        raise ValueError("Nothing to draw: no row stands beside one of fp16.")
    names = list(dict.fromkeys(cache for panel in panels.values() for cache in panel))
    wide = min(3, len(panels))
    deep = -(-len(panels) // wide)
    figure = Figure(figsize=(1.6 + 4.6 * wide, 0.9 + 3.6 * deep), layout="constrained")
    grid = figure.subplots(deep, wide, squeeze=False).flat
    for axes, (title, caches) in zip(grid, panels.items(), strict=False):
        for cache, points in caches.items():
            T, middle, low, high = zip(*sorted(points), strict=True)
            color = "black" if cache == "fp16" else f"C{names.index(cache)}"
            style = "-" if "-" in cache else "--"
            if cache != "fp16":
                axes.fill_between(T, low, high, color=color, alpha=0.15, lw=0)
            axes.plot(T, middle, style, marker="o", ms=3.5, color=color, label=cache)
        for row in paper:
            if title.startswith(row["model"]):
                low, high = (1 + change for change in row["change"])
                axes.axhspan(low, high, color="0.6", alpha=0.35, lw=0, label=row["cache"])
        axes.set_title(title, fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        shown = [y for y in TICKS if low <= y <= high]
        # Too close together on a wide axis are those of small differences.
        if high / low > 4:
            shown = [y for y in shown if y not in (0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.2, 1.5)]
        axes.yaxis.set_major_locator(FixedLocator(shown))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(sorted({p[0] for points in caches.values() for p in points}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.set_xlabel("context, tokens")
        axes.grid(alpha=0.25)
    for axes in list(grid)[len(panels) :]:
        axes.set_visible(False)
    figure.supylabel("time per token, fp16 = 1 (lower is faster)", fontsize=10)
    handles: dict = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=4 * wide,
        fontsize=8,
        frameon=False,
    )
    record = results[0]["record"]
    figure.suptitle(
        f"{record['device']}, mlx {record['mlx']}, mlx_kvq {record['commit']}\n"
        "bands: quartiles over rounds",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)


def _short(tokens: float) -> str:
    return f"{tokens / 1024:.0f}K" if tokens >= 1024 else f"{tokens:.0f}"


def draw_calibration(calibration: CalibrationSet, title: str, path: str) -> None:
    """Draw every channel's μ and σ (and λ) over the layers, with the middle half of each layer."""
    from matplotlib.figure import Figure

    panels: list[tuple[str, str, dict[int, np.ndarray]]] = []
    for side in ("keys", "values"):
        for name in NAMES:
            found = {
                i: np.array(a).ravel()
                for i, layer in enumerate(calibration.layers[p] for p in sorted(calibration.layers))
                if (a := getattr(getattr(layer, side), name)) is not None
            }
            if found:
                panels.append((side, name, found))
    names = [".".join(map(str, p)) for p in sorted(calibration.layers)]
    figure = Figure(figsize=(1 + 4 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (side, name, found) in zip(axes, panels, strict=True):
        for i, values in found.items():
            spread = np.linspace(-0.25, 0.25, values.size)
            ax.plot(i + spread, values, ".", ms=3, color="C0", alpha=0.6, mew=0)
            low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
            ax.plot([i, i], [low, high], lw=2, color="C1")
            ax.plot(i, middle, "o", ms=3, color="C1")
        symbol = {"mu": "μ", "sigma": "σ", "lam": "λ"}[name]
        ax.set_title(f"{symbol} of the {side}", fontsize=10)
        ax.set_xlabel("layer")
        step = -(-len(names) // 12)
        ax.set_xticks(range(0, len(names), step), names[::step])
        if name == "mu":
            ax.axhline(0, color="0.6", lw=0.6)
        else:
            ax.set_yscale("log")
            every = np.concatenate(list(found.values()))
            ticks = np.geomspace(every.min(), every.max(), 5)
            ax.set_yticks(ticks, [f"{t:.3g}" for t in ticks])
            ax.set_yticks([], minor=True)
        ax.grid(alpha=0.25)
    figure.suptitle(
        f"{title}\neach dot a channel, in order within its layer; median and middle half",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)
