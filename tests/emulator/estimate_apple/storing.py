"""Time of storing tokens, with keys rounded to the nearest level or with feedback."""

import functools

from mlx_kvq.caches.rows import WAITING
from mlx_kvq.ops.gpu.plan import plan

from .chips import Chip
from .counting import SHUFFLE
from .kvq_kernels import KvqKernels
from .work import Work

# Cycles from an instruction to one that needs it, at little occupancy (metal-benchmarks, "raw").
LATENCY = {"fma": 3.9, "select": 6.4, "round": 5.4, "shuffle": 5.5, "sum": 29.0, "root": 10.7}
MISSED = 350e-9  # seconds of a load that no cache has; a guess, nothing is published


def chain(D: int, group: int) -> tuple[float, int]:
    """Cycles from one instruction to the next that one key with feedback takes
    (kernels/feedback.metal), and how often it waits for a block of the matrix."""
    t, own = LATENCY, group // 32 if group % 32 == 0 else -(-D // 32)
    pick = (own - 1) * t["select"]  # of_slice

    def spread(slices: float) -> float:
        """Errors go to eight lanes by as many shuffles, and are added to slices in two sums."""
        return t["shuffle"] + 7 * SHUFFLE + max(5 * t["fma"], 8 * slices)

    nearest = t["fma"] + t["round"] + 2 * t["select"] + t["fma"]
    block = pick + nearest + t["fma"] + t["select"] + spread(own)
    # Once the group's scale is known, on average to half of the slices.
    again = pick + t["fma"] + t["select"] + spread(D / 64)
    # Largest channel, two scales tried, the scale of the levels' length, damage looked for twice.
    scale = 3 * t["sum"] + 2 * (nearest + 2 * t["sum"]) + 2 * t["root"] + 2 * t["shuffle"]
    blocks, groups = D // 8, D // group
    waits = blocks + blocks - group // 8  # the first group has none before it
    return blocks * block + (waits - blocks) * again + groups * scale, waits


def feedback_seconds(chip: Chip, D: int, group: int) -> tuple[float, float]:
    """What feedback adds to the write of a key: at best its loads are hidden, at worst not."""
    cycles, waits = chain(D, group)
    best = cycles / (chip.clock * 1e9)
    return best, best + waits * MISSED


@functools.cache
def counted(kernels: KvqKernels, T: int) -> tuple[Work, Work]:
    """A token kept in a context of T, and the packing of those that waited."""
    return kernels.token(T), kernels.packing()


def token_nearest(kernels: KvqKernels, chip: Chip, T: int, B: int = 1) -> tuple[float, float]:
    """Microseconds of storing a token of each of B sequences, at best and at worst: it is kept, and
    one of as many as are packed together."""
    kept, packed = (work.times(B) for work in counted(kernels, T))
    best = kept.best(chip) + packed.best(chip) / WAITING
    return 1e6 * best, 1e6 * (kept.worst(chip) + packed.worst(chip) / WAITING)


def token_feedback(kernels: KvqKernels, chip: Chip, T: int, B: int = 1) -> tuple[float, float]:
    """The same, keys with feedback: a SIMD group packs one after the other of its set."""
    best, worst = token_nearest(kernels, chip, T, B)
    more = feedback_seconds(chip, kernels.D, kernels.fmt.layout.k_group)
    each = 1e6 * plan(kernels.fmt.kind).pack_set / WAITING
    return best + each * more[0], worst + each * more[1]


def prompt_seconds(kernels: KvqKernels, work: Work, chip: Chip, L: int) -> tuple[float, float]:
    """Of storing a prompt with feedback: by instructions, or by the chain of as many keys at a time
    as there are SIMD groups for keys, half of those that a core holds."""
    best, worst = feedback_seconds(chip, kernels.D, kernels.fmt.layout.k_group)
    keys = kernels.Hkv * L / chip.cores
    best, worst = keys / 12 * best, keys / (work.resident / 2) * worst
    return max(work.best(chip), best), max(work.worst(chip), worst)
