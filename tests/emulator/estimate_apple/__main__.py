"""An ESTIMATE of the kernels' time on Apple GPUs, where nothing has been measured yet."""

import argparse
from pathlib import Path

import mlx.core as mx

from mlx_kvq.format.spec import Spec

from . import figures, published, tables
from .counting import free_widening
from .kvq_kernels import KvqKernels
from .mlx_attention import MlxAttention
from .models import MODELS


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.emulator.estimate_apple", description=__doc__
    )
    parser.add_argument("--spec", default="int4-srft")
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192, 32768])
    parser.add_argument("--sweep", action="store_true", help="only numbers of splits")
    parser.add_argument("--check", action="store_true", help="only beside published times")
    parser.add_argument("--json", type=Path, help="only figures for scripts/scale.py, to this file")
    args = parser.parse_args()
    mx.random.seed(0)
    spec = Spec.parse(args.spec)
    assert spec is not None
    print("ESTIMATES from counted instructions and nominal bandwidth; nothing here was measured.")
    with free_widening():
        if args.check:
            return published.check()
        if args.json:
            return figures.write(spec, args.json)
        for model in MODELS:
            kvq = KvqKernels(spec, *model.heads)
            if args.sweep:
                tables.splits_table(kvq, args.contexts)
                continue
            mlx = MlxAttention(*model.heads)
            tables.decoding_table(model, kvq, mlx, args.contexts)
            tables.storing_table(model, kvq, mlx)


if __name__ == "__main__":
    main()
