"""The plot of ``mlx_kvq benchmark``: time relative to fp16 over context, a panel per model."""

from collections import defaultdict

from .plots import check

__all__ = ["check", "draw"]
TICKS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50)


def draw(results: list[dict], path: str, paper: list[dict]) -> None:
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
