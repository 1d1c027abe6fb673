"""The plot of ``mlx_kvq evaluate``: quality against bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .evaluate import Evaluation

OURS, OTHERS = ("#1f5fa8", "o"), ("#c05a1a", "s")  # told apart also without colour
LEAST = 1e-8  # of a KL on a logarithmic axis
LINE = 12  # pixels from one label to the next at 100 dpi


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


def quality(evaluation: "Evaluation", path: str) -> None:
    """Draw mean and 99th-percentile KL, and the change of perplexity, against bytes per token."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    results = evaluation.results[1:]
    s = evaluation.setting
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    labels: tuple[list, list] = ([], [])
    for i, r in enumerate(results):
        color, marker = OURS if "-" in r.name else OTHERS
        same = sum(r.bytes_per_token == other.bytes_per_token for other in results[:i])
        x = r.bytes_per_token * 1.015**same  # beside each other, not on top
        kl, high = max(r.kl.mean, LEAST), max(r.kl_p99, LEAST)
        left.plot([x, x], [kl, high], lw=0.8, color=color)
        left.plot(x, high, marker="_", color=color)
        left.plot(x, kl, ls="", marker=marker, color=color)
        change, low, high = (100 * v for v in (r.change.mean, r.change.low, r.change.high))
        right.plot([x, x], [low, high], lw=0.8, marker="_", color=color)
        right.plot(x, change, ls="", marker=marker, color=color)
        labels[0].append((r.name, x, kl, color))
        labels[1].append((r.name, x, change, color))
    left.set_yscale("log")
    left.set_ylabel("KL, nats per token: mean, and 99th percentile (–)")
    right.set_ylabel("change of perplexity, %, with its 95 % interval")
    right.axhline(0, color="0.6", lw=0.8)
    sizes = [r.bytes_per_token for r in results]
    for axes, names in zip((left, right), labels, strict=True):
        axes.set_xscale("log", base=2)
        axes.set_xlim(min(sizes) / 1.1, max(sizes) * 2)  # room for the names
        axes.set_xlabel("bytes per token, all layers")
        axes.set_xticks(_apart(sizes), minor=False)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25)
        figure.draw_without_rendering()  # fixes where things are
        _name_points(axes, names)
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


def _name_points(axes, points: list[tuple[str, float, float, str]]) -> None:
    """Names to the right of their points, moved down where they would cover each other."""
    placed: list[tuple[float, float, float]] = []
    for name, x, y, color in sorted(points, key=lambda p: -p[2]):
        px, py = axes.transData.transform((x, y))
        px, at, width = px + 8, py - 4, 6.5 * len(name)
        while any(l - width < px < r and abs(b - at) < LINE for l, r, b in placed):  # noqa: E741
            at -= 1
        placed.append((px, px + width, at))
        axes.annotate(
            name,
            (x, y),
            xytext=(0.72 * 8, 0.72 * (at - py)),  # pixels to points
            textcoords="offset points",
            fontsize=8,
            color=color,
            va="bottom",
        )
