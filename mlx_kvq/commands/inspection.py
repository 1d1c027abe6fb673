"""``mlx_kvq inspect``: what a converted repository brings along, without its weights."""

import argparse
from pathlib import Path

from ..measure import plots
from ..measure.plots import draw_calibration
from ..repositories import repository
from ..repositories.section import KEY
from ..repositories.summary import build, describe, find, ranges
from ..stock import packable


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
        draw_calibration(calibration, f"{Path(args.repository).name}: {section.spec}", args.plot)
