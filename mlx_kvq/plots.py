"""The plot of ``mlx_kvq evaluate``: quality against bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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


def quality(evaluation: "Evaluation", path: str) -> None:
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
