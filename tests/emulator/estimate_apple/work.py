"""One launch's work, and the time that it takes on a chip."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .chips import APART, CACHED, CACHED_NEW, CACHED_OLD, REACHED, Chip

TABLE = Path(__file__).parents[1] / "agx" / "table.json"
OCCUPANCY = {1: 11.0, 4: 2.75, 8: 1.6, 24: 1.0}  # SIMD groups a core -> cycles, times as many
FILL = 4  # cycles of a spill or fill, a guess


@dataclass(frozen=True)
class Registers:
    """What Mesa's compiler says of a kernel: SIMD groups a core holds, spills and fills."""

    resident: float
    spills: int

    @classmethod
    def of(cls, kernel: str, D: int, variant: str) -> "Registers":
        for row in json.loads(TABLE.read_text()):
            same = (row["kernel"], row["D"], row["dtype"]) == (kernel, D, "float16")
            if same and variant in row["variants"]:
                return cls(row["max_threads"] / 32, row["spills"] + row["fills"])
        raise ValueError(f"agx/table.json has no {kernel}, D = {D}, {variant!r}.")


@dataclass(frozen=True)
class Work:
    """Of one launch: cycles of SIMD groups in either pipeline, bytes, and its size.

    Args:
        main, rest (float): Cycles.
        spilled (float): Cycles of spills and fills, if registers matter.
        bytes (float): Read and written, each once.
        cached (float): Bytes that SIMD groups read, from caches or not.
        threadgroups (float), simd_groups (int): Of the launch, and of a threadgroup.
        resident (float): SIMD groups that a core's registers hold.
    """

    main: float
    rest: float
    bytes: float
    threadgroups: float
    simd_groups: int
    spilled: float = 0.0
    resident: float = 24.0
    cached: float = 0.0

    @property
    def counts(self) -> np.ndarray:
        """``main, rest, cached``: what the emulator counts."""
        return np.array([self.main, self.rest, self.cached])

    def with_counts(self, counts: np.ndarray) -> "Work":
        main, rest, cached = counts.tolist()
        return replace(self, main=main, rest=rest, cached=cached)

    def with_registers(self, registers: Registers, tiles: float = 0) -> "Work":
        """Each of the compiler's spills and fills happens once a tile."""
        spilled = registers.spills * FILL * tiles
        return replace(self, resident=registers.resident, spilled=spilled)

    def times(self, n: float) -> "Work":
        return replace(
            self.with_counts(n * self.counts),
            spilled=self.spilled * n,
            bytes=self.bytes * n,
            threadgroups=self.threadgroups * n,
        )

    def busy_cores(self, chip: Chip) -> float:
        return min(chip.cores, max(1.0, self.threadgroups))

    def seconds(self, chip: Chip, registers: bool = False) -> tuple[float, float]:
        """By instructions, and by bytes."""
        cores = self.busy_cores(chip)
        share = self.threadgroups / cores
        uneven = np.ceil(share) / share if share >= 1 else 1.0
        resident = min(24.0, share * self.simd_groups)
        cycles = max(self.main, self.rest)
        if registers:
            resident = min(resident, self.resident)
            cycles += self.spilled
        slow = np.interp(resident, list(OCCUPANCY), list(OCCUPANCY.values()))
        instructions = cycles * slow * uneven / (4 * cores * chip.clock * 1e9)
        return instructions, self.bytes / chip.bytes_per_second

    def reading(self, chip: Chip, rate: float) -> float:
        """Seconds of what SIMD groups read, at so many bytes a cycle and core."""
        return self.cached / (self.busy_cores(chip) * rate * chip.clock * 1e9)

    def best(self, chip: Chip) -> float:
        """Seconds."""
        return max(*self.seconds(chip), self.reading(chip, CACHED))

    def worst(self, chip: Chip) -> float:
        """Seconds. Where a core holds fewer SIMD groups than fill it its loads are not hidden; nor
        are they on M1 and M2, whose caches are small."""
        instructions, bytes_ = self.seconds(chip, registers=True)
        if chip.kind == "d":
            bytes_ *= REACHED / APART
        reading = max(bytes_, self.reading(chip, CACHED_OLD if chip.old else CACHED_NEW))
        if self.resident < 24 or chip.old:
            return instructions + reading
        return max(instructions, reading)


def estimate(launches: list[Work], chip: Chip) -> tuple[float, float]:
    """Microseconds of launches one after the other, at best and at worst."""
    return 1e6 * sum(w.best(chip) for w in launches), 1e6 * sum(w.worst(chip) for w in launches)


def apart(launches: list[Work], chip: Chip) -> tuple[float, float]:
    """Microseconds by instructions alone and by bytes alone."""
    instructions, bytes_ = zip(*(w.seconds(chip) for w in launches), strict=True)
    return 1e6 * sum(instructions), 1e6 * sum(bytes_)
