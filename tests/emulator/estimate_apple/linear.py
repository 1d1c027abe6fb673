"""Work of launches of any length, from two or three that were counted."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .work import Work


@dataclass
class Linear:
    """Work of a launch that is so much for each part, each key and each exact token.

    Args:
        part (Work): Of one part (a split), without keys.
        key, exact (np.ndarray): Counts (``Work.counts``) of a key and of an exact token.
        spilled (float): Cycles of spills and fills of a key.
    """

    part: Work
    key: np.ndarray
    exact: np.ndarray
    spilled: float

    @classmethod
    def fit(
        cls, at: Callable[..., Work], short: int, long: int, parts: int, exact: tuple = ()
    ) -> "Linear":
        """``at(keys, parts)`` at two lengths; ``at(keys, parts, n)`` for two numbers ``exact``."""
        few, many = exact or (0, 0)
        work = at(short, parts, *exact[:1])
        key = (at(long, parts, *exact[:1]).counts - work.counts) / (long - short)
        each = np.zeros(3)
        if exact:
            each = (at(short, parts, many).counts - work.counts) / (many - few)
        part = work.with_counts((work.counts - short * key - few * each) / parts)
        part = replace(part, threadgroups=work.threadgroups / parts, spilled=0.0)
        return cls(part, key, each, work.spilled)

    def __call__(self, keys: float, parts: float, bytes_: float, exact: float = 0) -> Work:
        work = self.part.times(parts)
        work = work.with_counts(work.counts + keys * self.key + exact * self.exact)
        return replace(work, spilled=keys * self.spilled, bytes=bytes_)


def between(counted: dict[int, Work], size: float) -> Work:
    """Counts on the line through those of two sizes; all else as in the first."""
    (n, a), (m, b) = counted.items()
    return a.with_counts(a.counts + (size - n) * ((b.counts - a.counts) / (m - n)))
