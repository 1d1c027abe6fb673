"""Format: a spec made concrete for one layer, and its signature in saved caches."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import mlx.core as mx
import numpy as np

from ..files import quoted
from . import feedback, rotation
from .layout import MAX_DIM, RowLayout, choose_group
from .spec import Spec
from .transform import Calibration, Transform

GROWTH = 128  # times the exact tail, a context has a longer one
VERSION = 1  # of the packed row; a saved cache of another version is refused


@dataclass(frozen=True, eq=False)
class Kind:
    """What formats have in common that differ in the numbers of a calibration alone: what kernels
    are compiled for. One object for all of them.

    Args:
        layout (RowLayout), rotation (str), scale (str), recent (int): Of the format.
        heads (int, optional): KV heads that it is calibrated for.
        feedback (bool): Whether keys are rounded with feedback.
        keys (tuple), values (tuple): Whether there are μ, σ and λ.
    """

    layout: RowLayout
    rotation: str
    scale: str
    recent: int
    heads: int | None
    feedback: bool
    keys: tuple[bool, bool, bool]
    values: tuple[bool, bool, bool]


_kind = lru_cache(maxsize=None)(Kind)


def recent_at(least: int, tokens):
    """Newest tokens kept exactly in a context of ``tokens`` (int or integer array), of which
    ``least`` are in a short one.

    They are at most a 64th of the context, or ``least``. Real models gain more by them than by
    anything else that costs as many bytes: 256 instead of 64 halve the error at 8K
    (scripts/studies/quality.md).
    """
    return least * (1 + (tokens >= GROWTH * least) + 2 * (tokens >= 2 * GROWTH * least))


def _present(side: Transform) -> tuple[bool, bool, bool]:
    c = side.calibration
    return c.mu is not None, c.sigma is not None, c.lam is not None


@dataclass(frozen=True, eq=False)
class Format:
    """How one layer's keys and values become rows: layout, transforms, scale rule; ``window``:
    tokens that a layer sees, ``None`` for all, as it was made."""

    spec: Spec
    layout: RowLayout
    keys: Transform
    values: Transform
    window: int | None = None

    @property
    def scale(self) -> str:
        return self.spec.scale

    @cached_property
    def recent(self) -> int:
        """Tokens before a query, its own included, that it reads from the tail in a short
        context; see :meth:`recent_at`."""
        return self.spec.recent_in(self.window)

    def in_window(self, window: int | None) -> "Format":
        """The same for a layer that sees so many tokens."""
        return self if window == self.window else replace(self, window=window)

    def recent_at(self, tokens: int) -> int:
        """Newest tokens that the last of ``tokens`` reads exactly: ``recent``, twice as many where
        that is a 64th of them, and four times as many."""
        return recent_at(self.recent, tokens)

    @property
    def grows(self) -> tuple[int, int]:
        """Tokens from which on a context reads more of them."""
        return GROWTH * self.recent, 2 * GROWTH * self.recent

    @cached_property
    def first(self) -> int:
        """First tokens of a sequence that are kept exactly."""
        return self.spec.first_in(self.window)

    @cached_property
    def heads(self) -> int | None:
        """KV heads of the calibration; ``None`` without one."""
        return next(iter(_heads(self.keys.calibration, self.values.calibration)), None)

    @cached_property
    def kind(self) -> Kind:
        """What kernels are compiled for."""
        sides = _present(self.keys), _present(self.values)
        spec = self.spec
        return _kind(
            self.layout, spec.rotation, spec.scale, self.recent, self.heads, self._weighted, *sides
        )

    @cached_property
    def signature(self) -> str:
        """Identifies the content of a cache, how new rows are made and what is kept exactly."""
        return self._signature(self.first)

    @cached_property
    def of_rows(self) -> str:
        """The part of the signature that caches must have in common to share a batch: first tokens
        that were not kept exactly can be taken from rows."""
        return self._signature(0)

    def _signature(self, first: int) -> str:
        lay, spec = self.layout, self.spec
        text = (
            f"mlx_kvq/{VERSION};{spec.bits}-{spec.rotation};scale={spec.scale};seed={spec.seed};"
            f"dims={lay.k_dim},{lay.v_dim};groups={lay.k_group},{lay.v_group}"
        )
        rounding = spec.rounding if self._weighted else ""
        more = {
            "recent": self.recent, "first": first, "rounding": rounding, "calibration": self._digest
        }  # fmt: skip
        return text + "".join(f";{name}={value}" for name, value in more.items() if value)

    @cached_property
    def arrays(self) -> tuple[mx.array | None, ...] | None:
        """μ, σ, λ of keys, then of values, then the metric of the keys if their codes are chosen by
        it; ``None`` if nothing is calibrated."""
        k, v = self.keys.calibration, self.values.calibration
        metric = (k.metric,) if self._weighted else ()
        arrays = (k.mu, k.sigma, k.lam, v.mu, v.sigma, v.lam, *metric)
        return None if all(a is None for a in arrays) else arrays

    @property
    def _weighted(self) -> bool:
        """Whether the metric of the calibration chooses the codes of keys."""
        feedback = self.spec.rounding == "feedback" and self.layout.k_bits != 8
        return feedback and self.keys.calibration.metric is not None

    @cached_property
    def feedback(self) -> mx.array | None:
        """The matrix of ``mlx_kvq.format.feedback`` for keys, fp32 [Hkv, Dk, Dk]; ``None`` where
        each channel goes to its nearest level."""
        return feedback.matrix(self.keys) if self._weighted else None

    def differences(self, wanted: "Format") -> str:
        """The options with other values than in ``wanted``, in words; empty if there is none."""
        found = [
            f"{name} {own}, asked for {wanted._options[name]}"
            for name, own in self._options.items()
            if own != wanted._options[name]
        ]
        if self._digest and wanted._digest and self._digest != wanted._digest:
            found.append("another calibration")
        return "; ".join(found)

    @cached_property
    def _options(self) -> dict[str, object]:
        """The content of the signature, in a user's words."""
        lay, spec = self.layout, self.spec
        return {
            "bits": spec.bits, "rotation": spec.rotation, "scale": spec.scale, "seed": spec.seed,
            "head size": _one_or_two(lay.k_dim, lay.v_dim),
            "group_size": _one_or_two(lay.k_group, lay.v_group), "recent": self.recent,
            "first": self.first,
            "rounding": spec.rounding if self._weighted else "nearest",
            "calibration": "on" if self._digest else "off",
        }  # fmt: skip

    @cached_property
    def _digest(self) -> str:
        """Hash of :attr:`arrays`, 16 hex digits; empty if nothing is calibrated."""
        if self.arrays is None:
            return ""
        digest = hashlib.sha256()
        for a in self.arrays:
            digest.update(b"-" if a is None else np.array(a, dtype=np.float32).tobytes())
        return digest.hexdigest()[:16]

    def __deepcopy__(self, memo) -> "Format":
        return self  # immutable, and shared by every cache of a layer


def _one_or_two(keys: int, values: int) -> str:
    return str(keys) if keys == values else f"{keys} and {values}"


def _heads(*calibrations: Calibration) -> set[int]:
    return {a.shape[0] for c in calibrations for a in c.arrays().values()}


def _fitting(side: str, calibration: Calibration | None, D: int) -> Calibration:
    """The calibration in fp32, if its arrays are [Hkv, D] (the metric [Hkv, D, D])."""
    given = {} if calibration is None else calibration.arrays()
    heads = {a.shape[0] for a in given.values() if a.ndim}
    for name, a in given.items():
        want = (D, D) if name == "metric" else (D,)
        if a.shape[1:] != want or a.ndim != 1 + len(want) or len(heads) > 1:
            raise ValueError(
                f"The calibration of the {side} has {name} {a.shape}; for head size {D} and one "
                f"number of KV heads it is [Hkv, {', '.join(map(str, want))}]."
            )
    return Calibration(**{name: a.astype(mx.float32) for name, a in given.items()})


def _least_group(spec: Spec, bits: int, window: int | None) -> int:
    """Channels of a group where the spec does not say, or the next divisor of the head size. 3-bit
    codes in groups of 32 lose two thirds of what they do in groups of 64. A budget gains more by
    bits."""
    smaller = bits == 3 and spec.budget is None
    return 32 if smaller or spec.has_smaller_groups(window) else 64


_shared: dict[tuple, Format] = {}


def make_format(
    spec: Spec,
    k_dim: int,
    v_dim: int | None = None,
    *,
    k_group: int | None = None,
    v_group: int | None = None,
    keys: Calibration | None = None,
    values: Calibration | None = None,
    window: int | None = None,
) -> Format:
    """The :class:`Format` of ``spec`` for a layer with these head sizes, that sees the last
    ``window`` tokens or all. Groups default to the spec's, calibrations are taken in fp32, and
    formats without one are shared. Raises ValueError if this spec cannot pack the head sizes, or a
    calibration does not fit them or the other one."""
    if not isinstance(spec, Spec):
        raise ValueError(f"A spec is a Spec, as Spec.parse returns, got {spec!r}.")
    v_dim = k_dim if v_dim is None else v_dim
    for D in (k_dim, v_dim):
        if reason := rotation.why_not(spec.rotation, D):
            raise ValueError(reason)
    k_group, v_group = (
        choose_group(
            D, spec.group_size if group is None else group, bits, _least_group(spec, bits, window)
        )
        for D, group, bits in ((k_dim, k_group, spec.k_bits), (v_dim, v_group, spec.v_bits))
    )
    keys, values = _fitting("keys", keys, k_dim), _fitting("values", values, v_dim)
    heads, key = _heads(keys, values), (spec, k_dim, v_dim, k_group, v_group, window)
    if not heads and key in _shared:
        return _shared[key]
    layout = RowLayout(k_dim, v_dim, spec.k_bits, spec.v_bits, k_group, v_group)
    if len(heads) > 1:
        raise ValueError(
            f"The calibrations of keys and values are of {' and '.join(map(str, sorted(heads)))} "
            "KV heads; a layer has one number of them."
        )
    if spec.rounding == "feedback" and spec.k_bits != 8:
        keys = feedback.whitened(keys)
    fmt = Format(
        spec,
        layout,
        Transform(spec.rotation, spec.seed, rotation.KEYS, k_dim, keys),
        Transform(spec.rotation, spec.seed, rotation.VALUES, v_dim, values),
        window,
    )
    if not heads:
        _shared[key] = fmt
    return fmt


_LONGEST = 300  # characters of a signature; bounds every number in it
_SIGNATURE = re.compile(
    r"mlx_kvq/([0-9]+);([a-z0-9-]+);scale=([a-z]+);seed=([0-9]+);dims=([0-9]+),([0-9]+)"
    r";groups=([0-9]+),([0-9]+)(?:;recent=([0-9]+))?(?:;first=([0-9]+))?"
    r"(?:;rounding=([a-z]+))?(?:;calibration=([0-9a-f]{16}))?"
)


def parse_signature(signature: str, arrays: Sequence[mx.array | None] | None = None) -> Format:
    """The format that a saved cache's signature and calibration describe. Raises ValueError if the
    signature is not one, is of another version, names a number out of range, or does not fit
    ``arrays``."""
    match = None
    if isinstance(signature, str) and len(signature) <= _LONGEST:
        match = _SIGNATURE.fullmatch(signature)
    if match is None:
        raise ValueError(f"{quoted(signature)} is not the signature of an mlx_kvq cache.")
    version, name, scale, seed, *sizes, recent, first, rounding, _ = match.groups()
    if int(version) != VERSION:
        raise ValueError(
            f"The cache was written in format version {version}; this mlx_kvq reads {VERSION}."
        )
    k_dim, v_dim, k_group, v_group = map(int, sizes)
    if max(k_dim, v_dim, k_group, v_group) > MAX_DIM:
        raise ValueError(
            f"The cache is said to have head sizes {k_dim} and {v_dim} in groups of {k_group} and "
            f"{v_group}; mlx_kvq reads sizes up to {MAX_DIM}."
        )
    spec = Spec.parse(
        f"{name}:scale={scale},seed={seed},recent={recent or 0},first={first or 0},"
        f"rounding={rounding or 'auto'}"
    )
    assert spec is not None  # fp16 takes no options
    damaged = ValueError(
        f"The cache's calibration does not belong to its signature {signature!r}: the file is "
        "damaged."
    )
    try:
        keys, values = _calibrations(arrays, rounding is not None)
        keys, values = _fitting("keys", keys, k_dim), _fitting("values", values, v_dim)
    except (TypeError, ValueError) as error:
        raise damaged from error
    # The saved σ is the one that `feedback` has changed: not once more.
    made = spec if rounding is None else replace(spec, rounding="nearest")
    groups = {"k_group": k_group, "v_group": v_group}
    fmt = make_format(made, k_dim, v_dim, **groups, keys=keys, values=values)
    if rounding is not None:
        fmt = replace(fmt, spec=spec)
    if fmt.signature != signature:
        raise damaged
    return fmt


def _calibrations(
    arrays: Sequence[mx.array | None] | None, metric: bool
) -> tuple[Calibration, Calibration]:
    """Keys' and values' part of :attr:`Format.arrays`."""
    if arrays is None:
        return Calibration(), Calibration()
    if len(arrays) != 6 + metric:
        raise ValueError(f"{len(arrays)} arrays")
    return Calibration(*arrays[:3], *arrays[6:]), Calibration(*arrays[3:6])
