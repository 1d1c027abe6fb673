"""What a spec does to a model's caches, in one line."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..caches.packed import PackedCache
from ..calibration.set import CalibrationSet
from ..format.format import Format
from ..format.spec import Spec
from ..stock import leaves


@dataclass
class Report:
    """What a spec does to a model's caches.

    Args:
        spec (Spec): What was asked for.
        packed (dict): Layer -> format, for every packed layer.
        left (dict): Layer -> why its cache stays as it is.
        unpacked (list): Packed layers that attend on their own, not through mlx-lm's shared
            function, and get keys and values unpacked for it.
        calibration (CalibrationSet, optional): What the packed layers were calibrated with.
        alone (str): Why the model answers one request at a time: what it raises in a batch.
    """

    spec: Spec
    packed: dict[int, Format] = field(default_factory=dict)
    left: dict[int, str] = field(default_factory=dict)
    unpacked: list[int] = field(default_factory=list)
    calibration: CalibrationSet | None = None
    alone: str = ""

    @property
    def bits_per_value(self) -> float:
        """Stored bits per value over the packed layers, scales included."""
        bits = sum(32 * f.layout.words for f in self.packed.values())
        return bits / sum(f.layout.k_dim + f.layout.v_dim for f in self.packed.values())

    @property
    def compression(self) -> float:
        """fp16 bytes over packed bytes, in the packed layers; the exact tail, a few tokens for each
        sequence, comes to them."""
        return 16 / self.bits_per_value

    def __str__(self) -> str:
        layers = len(set(self.packed) | set(self.left))
        line = (
            f"{self.spec}: packed {len(self.packed)} of {layers} layers, "
            f"{self.bits_per_value:.2f} bits per value, "
            f"{self.compression:.2f}x smaller than fp16, "
        )
        if self.spec.exact:
            line += f"{self.spec.exact} exact, "
        if self.calibration is None:
            line += "not calibrated"
        else:
            line += f"calibrated ({self.calibration.metadata.get('text', 'given')})"
        for bits in dict.fromkeys(f.spec.bits for f in self.packed.values()):
            which = [i for i, f in self.packed.items() if f.spec.bits == bits]
            if bits != self.spec.bits:
                line += f"; {bits} in {layer_ranges(which)}"
        if self.unpacked:
            line += (
                f"; unpacked to attend, without the shared function: {layer_ranges(self.unpacked)}"
            )
        if self.alone:
            line += f"; not in batches, where the model itself raises {self.alone}"
        reasons: dict[str, list[int]] = {}
        for layer, reason in self.left.items():
            reasons.setdefault(reason, []).append(layer)
        for reason, which in reasons.items():
            line += f"; left {layer_ranges(which)}: {reason}"
        return line


def saved(caches: list) -> str:
    """Tokens read and bytes held by packed caches, and what fp16 would hold; "" if none is packed.

    Counts the rows of tokens and those kept exactly, not the room that is kept for more tokens.
    Where that is more than fp16's, says from which context on it is less."""
    tokens = rows = exact = room = fp16 = 0
    for _, c in leaves(caches):
        if isinstance(c, PackedCache) and c.keys is not None:
            (B, H, _, W), lay = c.keys.shape, c.format.layout
            tokens = max(tokens, getattr(c, "offset", 0))
            rows += 4 * B * H * W * c.size()
            room += c.exact_nbytes
            for kept in (c.tail, c.oldest.array):
                if kept is not None:
                    exact += kept.nbytes * min(c.size(), kept.shape[2]) // kept.shape[2]
            fp16 += 2 * B * H * (lay.k_dim + lay.v_dim) * c.size()
    if not fp16:
        return ""
    if rows + exact > fp16:
        least = tokens * room / (fp16 - rows)
        return (
            f"{tokens:,} tokens, most of them kept exactly: {megabytes(rows + exact)}, fp16 "
            f"{megabytes(fp16)}; less than fp16 from about {10 * math.ceil(least / 10):,} tokens on"
        )
    tail = f" ({megabytes(exact)} of it tokens kept exactly)" if exact > rows / 10 else ""
    return f"{tokens:,} tokens: {megabytes(rows + exact)}{tail}, fp16 {megabytes(fp16)}"


def megabytes(n: float) -> str:
    """1.2 MB, 66 MB, 3.4 GB."""
    n, unit = (n / 1e9, "GB") if n >= 1e9 else (n / 1e6, "MB")
    return f"{n:.{0 if n >= 20 else 1 if n >= 1 else 2}f} {unit}"


_of = ""  # of which model the lines are, where there are several


@contextmanager
def about(name: str) -> Iterator[None]:
    """In here every line names a model."""
    global _of
    before, _of = _of, f"{name}: " if name else ""
    try:
        yield
    finally:
        _of = before


def log(line: str) -> None:
    print(f"[mlx_kvq] {_of}{line}", file=sys.stderr)


def layer_ranges(layers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
