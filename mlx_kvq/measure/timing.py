"""Side-by-side timing: dependent chains, warm-up, interleaved rounds, medians."""

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np


class Spread(NamedTuple):
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float


def spread(values: list[float]) -> Spread:
    return Spread(*np.quantile(values, (0.5, 0.25, 0.75)).tolist())


def speedup(base: list[float], own: list[float]) -> Spread:
    """How many times faster ``own`` is than ``base``: quotients round by round, because a machine
    that is slow for a while is slow for both."""
    return spread([b / o for b, o in zip(base, own, strict=False)])


def speedups(key: str, times: dict[str, list[float]], name: str, bases) -> dict[str, list[float]]:
    """``f"{key}_{base}"`` -> median and quartiles of the speedup of ``name``, for the ``bases``
    that were timed."""
    timed = [base for base in bases if base in times]
    return {f"{key}_{base}": list(speedup(times[base], times[name])) for base in timed}


def interleave(
    chains: dict[str, Callable[[int], None]],
    *,
    steps: int = 32,
    rounds: int = 7,
    warm_up: float = 0.3,
    longest: float = 0.2,
    seconds: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call, by contender and round. Contenders are timed in turn, so that a drifting
    clock meets all of them.

    Args:
        chains (dict): Name -> runs and evaluates so many calls, each of which depends on the one
            before, as the steps of decoding do.
        steps (int): Calls in a chain; fewer where a chain would take more than ``longest`` seconds.
        rounds (int): Timed passes; a contender stops after three once it has had ``seconds``.
        warm_up (float): Seconds of untimed calls first, at least two each.
        clock: ``time.process_time`` leaves out other processes on a shared CPU.
    """
    lengths, turns = {}, {}
    start = clock()
    for name, chain in chains.items():
        chain(1)
        once = _timed(chain, 1, clock)
        lengths[name] = max(1, min(steps, int(longest / once)))
        turns[name] = max(3, min(rounds, int(seconds / (once * lengths[name]))))
    while clock() - start < warm_up:
        for name, chain in chains.items():
            chain(lengths[name])
    taken: dict[str, list[float]] = {name: [] for name in chains}
    for r in range(rounds):
        for name, chain in chains.items():
            if r < turns[name]:
                taken[name].append(_timed(chain, lengths[name], clock) / lengths[name])
    return taken


def _timed(chain: Callable[[int], None], steps: int, clock: Callable[[], float]) -> float:
    mx.synchronize()
    start = clock()
    chain(steps)
    mx.synchronize()
    return clock() - start


def copy_bandwidth(megabytes: int) -> float:
    """Bytes read and written per second by an elementwise pass over a large array."""
    x = mx.zeros((megabytes << 18,), mx.float32)
    mx.eval(x)

    def chain(steps: int) -> None:
        y = x
        for _ in range(steps):
            y = y + 1.0
        mx.eval(y)

    return 2 * x.nbytes / spread(interleave({"copy": chain}, steps=8)["copy"]).median


def memory_limit() -> int:
    """Bytes that a benchmark may hold on the default device, as far as MLX says."""
    if mx.default_device().type == mx.DeviceType.gpu:
        info = mx.device_info()
        for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
            if key in info:
                return int(0.8 * int(info[key]))
        return 1 << 62  # then an allocation that fails says so
    return int(0.6 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
