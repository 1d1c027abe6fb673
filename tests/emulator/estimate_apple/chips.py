"""Apple's chips, and how much of their nominal rates kernels reach."""

from dataclasses import dataclass

# Of nominal bandwidth: 530 of 614 GB/s on M5 Max and 680 of 800 on M1 Ultra (mlx#3837), 266 of 307
# on M5 Pro (mlx#4076), each measured with a plain kernel.
REACHED = 0.86
# Of an Ultra, at worst: 475 of 800 GB/s, by a kernel on M1 Ultra that only loads, launched as an
# attention kernel is (mlx#3837).
APART = 0.59
# Bytes a cycle that a core reads from caches: 64 at best (metal-benchmarks); at worst what
# llama.cpp's attention got from M2 Ultra, 29.8, and from M4 Max and M5 Max, 40 (llama.cpp#23114).
CACHED, CACHED_OLD, CACHED_NEW = 64, 30, 40
FLOPS = 0.62  # of nominal, in large products: 17.4 of 28.3 TFLOP/s on M3 Ultra (Rapid-MLX#258)


@dataclass(frozen=True)
class Chip:
    """Cores, GHz and GB/s as published; ``kind`` is the last letter of Metal's architecture ("d"
    for an Ultra), ``old`` says that caches are those of M1 and M2."""

    name: str
    kind: str
    cores: int
    clock: float
    bandwidth: float
    old: bool = False

    @property
    def bytes_per_second(self) -> float:
        """That a plain kernel reaches."""
        return self.bandwidth * 1e9 * REACHED

    @property
    def flops(self) -> float:
        """Operations a second that large products reach."""
        return self.cores * 256 * self.clock * 1e9 * FLOPS


M1 = Chip("M1", "g", 8, 1.278, 68.3, True)
M1_ULTRA = Chip("M1 Ultra", "d", 64, 1.296, 800, True)
M2_ULTRA = Chip("M2 Ultra", "d", 76, 1.398, 800, True)
M3_ULTRA = Chip("M3 Ultra", "d", 80, 1.38, 819)
M4_MAX = Chip("M4 Max", "s", 40, 1.578, 546)
M5_PRO = Chip("M5 Pro", "s", 20, 1.62, 307)
M5_MAX = Chip("M5 Max", "s", 40, 1.62, 614)
CHIPS = (M1, M2_ULTRA, M3_ULTRA, M4_MAX)  # of the tables
