"""The plot of ``mlx_kvq benchmark``: time relative to fp16 over context, a panel per model."""

from collections import defaultdict

from .plots import check

__all__ = ["check", "draw"]


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
    from matplotlib.ticker import FuncFormatter, NullFormatter

    panels: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        for row in result["rows"]:
            if "x_fp16" not in row or row.get("op", "attend") != "attend":
                continue
            name = row.get("model") or f"attention, {row['heads']}"
            T = row["context"] if "model" in row else row["tokens"]
            middle, low, high = (100 * (1 / x - 1) for x in row["x_fp16"])
            panels[f"{name}, batch {row['batch']}"][row["cache"]].append((T, middle, high, low))
    if not panels:
        raise ValueError("Nothing to draw: no row stands beside one of fp16.")
    names = list(dict.fromkeys(cache for panel in panels.values() for cache in panel))
    wide = min(3, len(panels))
    deep = -(-len(panels) // wide)
    figure = Figure(figsize=(1 + 4.6 * wide, 0.9 + 3.6 * deep), layout="constrained")
    grid = figure.subplots(deep, wide, squeeze=False).flat
    for axes, (title, caches) in zip(grid, panels.items(), strict=False):
        for cache, points in caches.items():
            T, middle, low, high = zip(*sorted(points), strict=True)
            color = "black" if cache == "fp16" else f"C{names.index(cache)}"
            style = "-" if "-" in cache else "--"
            axes.fill_between(T, low, high, color=color, alpha=0.15, lw=0)
            axes.plot(T, middle, style, marker="o", ms=3.5, color=color, label=cache)
        for row in paper:
            if title.startswith(row["model"]):
                low, high = (100 * change for change in row["change"])
                axes.axhspan(low, high, color="0.6", alpha=0.35, lw=0, label=row["cache"])
        axes.set_title(title, fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_yscale("symlog", linthresh=20, linscale=1.5)
        axes.set_xticks(sorted({p[0] for points in caches.values() for p in points}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:+.0f}"))
        axes.set_xlabel("context, tokens")
        axes.grid(alpha=0.25)
    for axes in list(grid)[len(panels) :]:
        axes.set_visible(False)
    figure.supylabel("time per token against fp16, % (below 0 is faster)", fontsize=10)
    handles: dict = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=8, fontsize=8,
        frameon=False,
    )  # fmt: skip
    record = results[0]["record"]
    figure.suptitle(
        f"{record['device']}, mlx {record['mlx']}, mlx_kvq {record['commit']}; "
        "bands: quartiles over rounds",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)


def _short(tokens: float) -> str:
    return f"{tokens / 1024:.0f}K" if tokens >= 1024 else f"{tokens:.0f}"
