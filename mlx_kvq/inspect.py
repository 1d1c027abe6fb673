"""``mlx_kvq inspect``: what a converted repository brings along, without its weights.

From a hub only ``config.json`` and its like and ``kv_cache.safetensors`` are fetched. The model
is built from them, but nothing of it is computed, to see whether the cache fits it.
"""

import argparse
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm import utils

from . import plots, repository
from .calibration import NAMES, CalibrationSet
from .files import line, quoted, size
from .loading import code_allowed, code_options
from .model import Report, _ranges, packable
from .repository import FILE, KEY, Repository

LAYERS = 10_000  # of a model, at most: each is made, before any weight


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repository", help="A local repository, or one of the hub.")
    parser.add_argument("--revision", help="Of the hub's repository.")
    parser.add_argument(
        "--plot", metavar="FILE", help="Draw the calibration, layer by layer (.png, .svg)."
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="Build a model of the repository's own."
    )


def run(args: argparse.Namespace) -> None:
    if args.plot:
        plots.check(args.plot)
    source = find(args.repository, args.revision)
    model = build(source, args.trust_remote_code)
    if (report := repository.apply(model, verbose=False)) is None:
        raise ValueError(f"The '{KEY}' of '{args.repository}' is not mlx_kvq's.")
    section, calibration = source.section, source.calibration
    for label, text in describe(source, report, packable(model)[1]):
        print(f"{label:<12} {text}")
    if calibration is not None:
        print()
        print("\n".join(ranges(calibration)))
    if args.plot:
        if calibration is None:
            raise ValueError(f"There is nothing to plot: {section.spec} is not calibrated.")
        plot(calibration, f"{Path(args.repository).name}: {section.spec}", args.plot)


def find(name: str, revision: str | None = None) -> Repository:
    """The repository of a local folder, or of the hub, from where its small files are fetched.

    Raises:
        ValueError: If there is none, or it has no section of ours.
    """
    try:
        folder = utils._download(name, revision=revision, allow_patterns=["*.json", FILE])
    except Exception as error:
        raise ValueError(
            f"'{name}' is no local repository, and not to be had: {line(error)}"
        ) from error
    config = repository.read_config(folder)
    if KEY not in config:
        raise ValueError(
            f"'{name}' has no '{KEY}' in its config.json: mlx_kvq convert adds one, in place with "
            f"'mlx_kvq convert --mlx-path {name}'."
        )
    text = config.get("text_config")
    for key, value in (config | (text if isinstance(text, dict) else {})).items():
        if "layer" in key and type(value) is int and value > LAYERS:
            raise ValueError(
                f"config.json of '{name}' says {quoted(value)} for {quoted(key)}: no model has "
                f"more than {LAYERS} layers."
            )
    return Repository(folder, config[KEY], name, revision)


def build(source: Repository, trust: bool = False):
    """The model as it is made from ``config.json``, with weights that are not computed.

    Raises:
        ValueError: If mlx-lm cannot build it.
    """
    try:
        code = code_options(utils.load_model, trust)
        with code_allowed(trust):
            model, _ = utils.load_model(source.folder, lazy=True, strict=False, **code)
    except Exception as error:
        raise ValueError(f"The model of '{source.name}' cannot be built: {line(error)}") from error
    model._mlx_kvq_repository = source
    return model


def describe(source: Repository, report: Report, shapes: dict) -> list[tuple[str, str]]:
    """(label, text) of every line above the table of ranges."""
    section = source.section
    made, recent = dict(section.made), section.spec.recent
    fp16 = sum(2 * H * (Dk + Dv) for H, Dk, Dv in shapes.values())
    packed = sum(
        4 * report.packed[p[0]].layout.words * H if p in section.layers else 2 * H * (Dk + Dv)
        for p, (H, Dk, Dv) in shapes.items()
    )
    bits = {b: [p[0] for p, c in section.layers.items() if c == b] for b in section.layers.values()}
    lines = [
        ("cache", f"{section.spec}, seed {section.spec.seed}, format {repository.VERSION}"),
        ("layers", "; ".join(f"{b} in {_ranges(layers)}" for b, layers in bits.items())),
        ("left", "; ".join(f"{layer}: {why}" for layer, why in report.left.items())),
        ("token", f"{packed} bytes in all layers, fp16 {fp16}: {fp16 / packed:.2f} times fewer"),
        ("exact", f"the newest {recent} tokens, beside the others" if recent else ""),
        ("sizes", ", ".join(f"{line(p.name)} {size(p)}" for p in _files(source.folder))),
    ]
    if source.calibration is not None:
        text = f"{made.pop('text', '?')}, {made.pop('tokens', '?')} tokens in windows of "
        text += (
            f"{made.pop('length', '?')}; SHA-256 {(section.sha256 or '')[:16]}…, as it should be"
        )
        lines.append(("calibration", text))
    lines.append(("made by", ", ".join(f"{k} {v}" for k, v in made.items())))
    return [(label, text) for label, text in lines if text]


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name == FILE)


def ranges(calibration: CalibrationSet) -> list[str]:
    """A table: least and largest μ, σ, λ of the keys and values of each layer."""
    rows = [["layer", "", "heads x D", *NAMES]]
    for path, layer in sorted(calibration.layers.items()):
        for side, c in (("keys", layer.keys), ("values", layer.values)):
            arrays = [getattr(c, name) for name in NAMES]
            shape = next((" x ".join(map(str, a.shape)) for a in arrays if a is not None), "-")
            rows.append([".".join(map(str, path)), side, shape, *map(_range, arrays)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _range(a: mx.array | None) -> str:
    return "-" if a is None else f"{a.min().item():.3g} to {a.max().item():.3g}"


def plot(calibration: CalibrationSet, title: str, path: str) -> None:
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
