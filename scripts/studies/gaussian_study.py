"""Which two scales to try for a group: squared error of pairs of fractions on Gaussian groups.

Of every pair on a grid the codes with the smaller angle are kept, and a scale that keeps the
group's length, as ``mlx_kvq.format.levels`` does. Errors are relative to the best pair's:

    python scripts/studies/gaussian_study.py --bits 3
"""

import argparse
from itertools import combinations

import numpy as np

from mlx_kvq.format.levels import tried

GRIDS = {
    3: np.arange(56, 105, 2) / 100,
    4: np.arange(56, 105, 2) / 100,
    5: np.arange(84, 107) / 100,
}
GROUPS = (16, 32, 48, 64, 80, 112, 128, 256)


def cosines(y: np.ndarray, bits: int, fraction: float) -> np.ndarray:
    """Of the angles between groups [n, g] and their levels under this fraction of abs-max."""
    middle = 1 << (bits - 1)
    step = fraction * np.abs(y).max(axis=1, keepdims=True) / (middle - 0.5)
    levels = np.clip(np.floor(y / step), -middle, middle - 1) + 0.5
    lengths = np.linalg.norm(y, axis=1) * np.linalg.norm(levels, axis=1)
    return (y * levels).sum(axis=1) / lengths


def errors(group: int, bits: int, n: int) -> dict[tuple[float, ...], float]:
    """Fractions -> squared error, relative to that of zeros; also of one and of the whole grid."""
    y = np.random.default_rng(0).standard_normal((n, group))
    shipped, grid = tried(group, bits), GRIDS[bits].tolist()
    found = {c: cosines(y, bits, c) for c in {*grid, *shipped}}
    squares = (y**2).sum(axis=1)
    sets = [(c,) for c in grid] + list(combinations(grid[::-1], 2))
    return {
        some: float((squares * (2 - 2 * np.max([found[c] for c in some], axis=0))).mean())
        / float(squares.mean())
        for some in [*sets, shipped, tuple(grid)]
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bits", type=int, default=3, choices=(3, 4, 5))
    parser.add_argument("--count", type=int, default=20000, help="groups of each size")
    args = parser.parse_args()
    print("| group | best two | error | as shipped | best one | all |\n|--:|---|--:|---|---|--:|")
    for group in GROUPS:
        found = errors(group, args.bits, args.count)
        one, two = (
            min((s for s in found if len(s) == count), key=found.__getitem__) for count in (1, 2)
        )
        cells = [
            " ".join(f"{c:.2f}" for c in some) + f" ({found[some] / found[two]:.3f})"
            for some in (tried(group, args.bits), one)
        ]
        every = found[tuple(GRIDS[args.bits].tolist())] / found[two]
        best = " ".join(f"{c:.2f}" for c in two)
        print(f"| {group} | {best} | {found[two]:.4f} | {cells[0]} | {cells[1]} | {every:.3f} |")


if __name__ == "__main__":
    main()
