"""The cases of the op matrix (``op_matrix.py``): which formats, shapes and data are tried."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import astuple, dataclass

FACTORS: dict[str, list] = {
    "dims": [(64, 64), (80, 80), (96, 96), (112, 112), (128, 128), (192, 192), (256, 256)]
    + [(192, 128), (64, 128), (256, 64)],
    "group": [None, 8, 16, 24, 32, 40, 56, 64, 96, 128, "D"],  # None: the default; "D": one scale
    "bits": ["int4", "int8", "k8v4", "int3", "k4v3", "k5v4", "int5"],
    "rotation": ["srft", "srht", "none"],
    "rule": ["search", "absmax", "paper"],
    "dtype": ["fp16", "bf16", "fp32"],
    "heads": [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (1, 3)],  # B, Hkv
    "gqa": [1, 2, 4, 6, 8, 16],
    "length": [1, 2, 3, 7, 31, 32, 33, 255, 257, 1000],
    "queries": [1, 2, 3, 4, 5, 6, 7, 8],
    "mask": [None, "causal", "bool T", "bool LT", "bool B11T", "bool BHLT"]
    + ["add LT", "add 1H1T", "add BHLT"],
    "sinks": [False, True],
    "starts": [False, True],
    "window": [None, 1, 5, 40, 2000],
    "recent": [None, 1, 5, 16, 300],  # tokens read from the exact tail; None: there is none
    "first": [None, 1, 4, 20],  # tokens at the begin that are kept exactly; None: there are none
    # Which of μ, σ, λ are calibrated, and on which side; every head has its own.
    "calibration": ["", "mu", "sigma", "lam", "mu sigma lam", "keys mu sigma", "values mu lam"],
    "data": ["normal", "zeros", "outlier", "constant", "tiny", "subnormal", "large", "nan", "inf"]
    + ["small", "signs", "aligned", "full", "channel"],
}


@dataclass(frozen=True)
class Case:
    dims: tuple[int, int]  # Dk, Dv
    group: int | str | None
    bits: str
    rotation: str
    rule: str
    dtype: str
    heads: tuple[int, int]  # B, Hkv
    gqa: int
    length: int
    queries: int
    mask: str | None
    sinks: bool
    starts: bool
    window: int | None
    recent: int | None
    first: int | None
    calibration: str
    data: str

    @property
    def possible(self) -> bool:
        """Whether the format exists, and the oracle's float64 arrays stay small."""
        (Dk, Dv), (B, Hkv) = self.dims, self.heads
        return (
            (self.group in (None, "D") or Dk % self.group == 0 == Dv % self.group)
            and (type(self.group) is not int or self.group % 16 == 0 or not self.is_narrow)
            and (self.rotation != "srht" or Dk & (Dk - 1) == 0 == Dv & (Dv - 1))
            and (self.mask != "causal" or self.length >= self.queries)
            and B * Hkv * max(self.gqa, 2) * self.length * max(Dk, Dv) <= 2_200_000
        )

    @property
    def is_narrow(self) -> bool:
        """Whether a side has codes of 3 or 5 bits."""
        return "3" in self.bits or "5" in self.bits

    def __str__(self) -> str:
        return "-".join(
            str(x).strip("()").replace(", ", "x").replace(" ", "_") for x in astuple(self)
        )


def _draw(rng: random.Random, **fixed) -> Case | None:
    """A random possible case; None where there seems to be none."""
    for _ in range(200):
        case = Case(**{name: rng.choice(values) for name, values in FACTORS.items()} | fixed)
        if case.possible:
            return case
    return None


def pairs(case: Case) -> set:
    """Every pair of (factor, value)s of the case."""
    return set(itertools.combinations(zip(FACTORS, astuple(case), strict=True), 2))


def _covering(count: int) -> list[Case]:
    """Greedy pairwise sampling: of some random cases always the one with the most new pairs."""
    rng = random.Random(1)
    groups = FACTORS["group"] * 200  # drawn evenly, or rare groups would meet little
    pool = {case: pairs(case) for case in (_draw(rng, group=group) for group in groups)}
    cases: list[Case] = []
    seen: set = set()
    while len(cases) < count:
        best = max(rng.sample(list(pool), 100), key=lambda case: len(pool[case] - seen))
        seen |= pool.pop(best)
        cases.append(best)
    return cases


CASES = _covering(288)


def product() -> Iterator[Case]:
    """Every dims x group x bits x rotation x rule x dtype; the other factors at random."""
    rng = random.Random(2)
    names = ("dims", "group", "bits", "rotation", "rule", "dtype")
    for values in itertools.product(*(FACTORS[name] for name in names)):
        if case := _draw(rng, **dict(zip(names, values, strict=True))):
            yield case
