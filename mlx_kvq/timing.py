"""Side-by-side timing: dependent chains, warm-up, interleaved rounds, medians."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx


@dataclass
class Timing:
    """Seconds per call: the median over rounds, and the middle half of them."""

    median: float
    low: float
    high: float


def interleave(
    chains: dict[str, Callable[[], int]], rounds: int = 7, warm_up: float = 0.3
) -> dict[str, Timing]:
    """Time several contenders in turn, so that a drifting clock meets all of them.

    Args:
        chains (dict): Name -> a function that runs, evaluates and counts a chain of calls, each
            of which depends on the one before, as the steps of decoding do.
        rounds (int): Timed passes over all contenders.
        warm_up (float): Seconds of untimed passes first (at least one): compilation, clocks.
    """
    start = time.perf_counter()
    while True:
        for chain in chains.values():
            chain()
        if time.perf_counter() - start > warm_up:
            break
    seconds: dict[str, list[float]] = {name: [] for name in chains}
    for _ in range(rounds):
        for name, chain in chains.items():
            mx.synchronize()
            start = time.perf_counter()
            calls = chain()
            mx.synchronize()
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: summarize(values) for name, values in seconds.items()}


def summarize(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return Timing(median, low, high)


def copy_bandwidth(megabytes: int) -> float:
    """Bytes read and written per second by an elementwise pass over a large array."""
    x = mx.zeros((megabytes << 18,), mx.float32)
    mx.eval(x)

    def chain() -> int:
        y = x
        for _ in range(8):
            y = y + 1.0
        mx.eval(y)
        return 8

    return 2 * x.nbytes / interleave({"copy": chain})["copy"].median
