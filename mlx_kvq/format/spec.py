"""Spec strings: what ``--kv-cache`` and :func:`mlx_kvq.enable` accept.

``<bits>-<rotation>[:option=value,...]``, for example ``int4-srft:group_size=64,seed=7``,
or ``fp16`` for the model's own cache.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeGuard

# name -> (bits of a key, bits of a value)
BITS = {
    "int4": (4, 4), "int8": (8, 8), "k8v4": (8, 4), "k5v4": (5, 4), "int5": (5, 5),
    "int3": (3, 3), "k4v3": (4, 3),
}  # fmt: skip
ROTATIONS = ("srft", "srht", "none")
# Accepted, but in no list of caches: slow, and no better (``format.dense``).
DENSE = ("householder", "quaternion")
SCALES = ("search", "absmax", "paper")
CALIBRATE = ("auto", "off")
ROUNDINGS = ("auto", "nearest", "feedback")
OPTIONS = (
    "group_size", "seed", "scale", "calibrate", "skip", "high", "budget", "rounding", "recent",
    "first",
)  # fmt: skip
MAX_RECENT = 1024
MAX_FIRST = 64
SHORT_WINDOW = 1024  # tokens; of less than that, exact ones are too large a part
OFF = "fp16"


@dataclass(frozen=True)
class Spec:
    """A parsed spec string.

    Args:
        bits (str): ``"int4"``, ``"int8"``, ``"k8v4"`` (8-bit keys, 4-bit values), ``"k5v4"`` (5-bit
            keys, 4-bit values), ``"int5"``, ``"int3"`` or ``"k4v3"`` (4-bit keys, 3-bit values).
        rotation (str): Random signs and a real FFT, ``"srft"``, for even head sizes, or a Hadamard
            transform, ``"srht"``, for powers of two; ``"none"``; or one of ``DENSE``.
        group_size (int, optional): Channels that share one scale; a multiple of 8 that divides
            the head size; of 3- and 5-bit codes, of 16. ``None``: 64, or the next such divisor;
            without a budget 32 of 3-bit codes, and of ``int4`` in layers with a window of less than
            1024 tokens.
        seed (int): Seed of the random signs, 0 to 2**32 - 1.
        scale (str): ``"search"``: the better of two by angle; ``"absmax"``: the largest magnitude
            maps to the outermost level; ``"paper"``: an odd number of levels around zero.
        calibrate (str): ``"auto"``: with the calibration given, or an automatic one; ``"off"``.
        skip (tuple): Layers that keep the model's own cache: numbers, ``"first"``, ``"last"``,
            counted among the layers that can be packed. ``skip=first+last`` in a string.
        high (tuple): Layers kept in 8 bits, likewise.
        budget (float, optional): Bits per value on average, scales included; the layers whose
            errors cost most get more than the others (``mlx_kvq.model.bits``), and none less than
            ``bits``. ``int3-srft:budget=4.25`` takes the bytes of ``int4`` and loses a third less
            with two of four models, as much with the others (docs/quality.md).
        rounding (str): Of keys when written: to the ``"nearest"`` level, or with ``"feedback"``
            making up for the errors of other channels (``format.feedback``), by the same kernel;
            needs a calibration with the metric, and is for keys of less than 8 bits. ``"auto"``:
            with feedback if there is that, and a GPU whose kernels do it: plain operations take
            several times as long for it.
        recent (int): Newest tokens of a query, its own included, that are also kept unrounded and
            read from there, 0 to 1024; twice as many from a context of ``128 * recent`` tokens on,
            and four times as many from ``256 * recent`` on; fewer in layers with a window of less
            than 1024 tokens (:meth:`recent_in`).
        first (int): First tokens of a sequence that are also kept unrounded, 0 to 64. Attention
            rests on the first one, whose key is an outlier: in Qwen2.5 and SmolLM2 it had 90 % of
            the error of all keys (scripts/studies/quality.md). 1 at most in layers with a window of
            less than 1024 tokens (:meth:`first_in`).

    Raises:
        ValueError: If a value is unknown or out of range; the message lists what is accepted.
    """

    bits: str
    rotation: str
    group_size: int | None = None
    seed: int = 0
    scale: str = "search"
    calibrate: str = "auto"
    skip: tuple[int | str, ...] = ()
    high: tuple[int | str, ...] = ()
    budget: float | None = None
    rounding: str = "auto"
    recent: int = 64
    first: int = 4

    def __post_init__(self):
        if self.rotation not in (*ROTATIONS, *DENSE):
            raise ValueError(_unknown("rotation", self.rotation, ROTATIONS))
        for option, known in (
            ("bits", BITS), ("scale", SCALES), ("calibrate", CALIBRATE), ("rounding", ROUNDINGS),
        ):  # fmt: skip
            if (given := getattr(self, option)) not in tuple(known):
                raise ValueError(_unknown(option, given, known))
        g, seed, budget = self.group_size, self.seed, self.budget
        if g is not None and (type(g) is not int or g < 8 or g % 8):
            raise ValueError(f"group_size is a multiple of 8, got {g!r}.")
        if type(seed) is not int or not 0 <= seed < 1 << 32:
            raise ValueError(f"seed is 0 to 2**32 - 1, got {seed!r}.")
        if type(self.recent) is not int or not 0 <= self.recent <= MAX_RECENT:
            raise ValueError(f"recent is 0 to {MAX_RECENT} tokens, got {self.recent!r}.")
        if type(self.first) is not int or not 0 <= self.first <= MAX_FIRST:
            raise ValueError(f"first is 0 to {MAX_FIRST} tokens, got {self.first!r}.")
        if budget is not None and not (isinstance(budget, int | float) and 3 <= budget <= 16):
            raise ValueError(f"budget is 3 to 16 bits per value, got {budget!r}.")
        for option in ("skip", "high"):
            layers = getattr(self, option)
            if not isinstance(layers, tuple):
                raise ValueError(f"{option} is a tuple such as ('first', 3), got {layers!r}.")
            for layer in layers:
                if layer not in ("first", "last") and not (type(layer) is int and layer >= 0):
                    raise ValueError(
                        f"{option} lists layers as 'first', 'last' or numbers joined by '+', "
                        f"got {layer!r}."
                    )

    @property
    def k_bits(self) -> int:
        """Bits of a key's codes."""
        return BITS[self.bits][0]

    @property
    def v_bits(self) -> int:
        """Bits of a value's codes."""
        return BITS[self.bits][1]

    def recent_in(self, window: int | None) -> int:
        """Newest tokens that a layer keeps exactly which sees the last ``window`` tokens, ``None``
        for all: of a window of less than 1024 tokens that part of ``recent``, but 16 if it can, and
        half of it with smaller groups (:meth:`has_smaller_groups`).
        """
        if not _is_short(window):
            return self.recent
        part = self.recent * window // SHORT_WINDOW
        return min(self.recent, max(16, part // 2 if self.has_smaller_groups(window) else part))

    def first_in(self, window: int | None) -> int:
        """First tokens that a layer keeps exactly which sees the last ``window`` tokens, ``None``
        for all: 1 at most in a window of less than 1024 tokens, which they leave soon. The first
        one is the outlier, and what is kept takes memory for as long as the cache is there.
        """
        return min(self.first, 1) if _is_short(window) else self.first

    def has_smaller_groups(self, window: int | None) -> bool:
        """Whether a layer with this window has groups of 32 channels where others have 64: ``int4``
        in a window of less than 1024 tokens, if nothing else is asked for.

        64 exact tokens are an eighth of a window of 512. With 16 of them and groups of 32 channels
        Gemma 3 270M's cache takes 17 % fewer bytes a token than with 64 and groups of 64, and loses
        about as much; with 32 and groups of 64 it takes 4 % more, and loses more
        (docs/quality.md). Other bits were not measured so.
        """
        asked = self.group_size is not None or self.budget is not None
        return self.bits == "int4" and not asked and _is_short(window)

    @property
    def exact(self) -> str:
        """Which tokens are kept exactly, in words; "" if none is."""
        newest = f"the newest {self.recent} to {4 * self.recent}" if self.recent else ""
        first = f"the first {self.first}" if self.first else ""
        words = " and ".join(filter(None, (newest, first)))
        return f"{words} tokens" if words else ""

    def __str__(self) -> str:
        values = {option: getattr(self, option) for option in OPTIONS}
        given = [f"{o}={_text(v)}" for o, v in values.items() if v != getattr(Spec, o)]
        name = f"{self.bits}-{self.rotation}"
        return f"{name}:{','.join(given)}" if given else name

    @classmethod
    def parse(cls, text: "str | Spec") -> "Spec | None":
        """Parse a spec string, in either case; ``"fp16"`` gives ``None`` (leave the model's cache
        alone), ``"int4"`` is short for ``"int4-srft"``.

        Raises:
            ValueError: If a word or an option is unknown or a value is out of range; the
                message lists what is accepted.
        """
        if isinstance(text, Spec):
            return text
        if not isinstance(text, str):
            raise ValueError(f"A KV cache spec is a string such as 'int4-srft', got {text!r}.")
        try:
            return cls._parse(text)
        except ValueError as error:
            raise ValueError(f"KV cache spec {text!r}: {error}") from None

    @classmethod
    def _parse(cls, text: str) -> "Spec | None":
        name, colon, tail = text.strip().lower().partition(":")
        if name == OFF:
            if colon:
                raise ValueError(f"'{OFF}' takes no options.")
            return None
        bits, _, rotation = (f"{name}-srft" if name in BITS else name).partition("-")
        if bits not in BITS or rotation not in (*ROTATIONS, *DENSE):
            raise ValueError(_unknown("cache", name, names()))
        options: dict[str, str] = {}
        for item in filter(None, tail.split(",")) if colon else ():
            key, equals, value = (part.strip() for part in item.partition("="))
            if key not in OPTIONS:
                raise ValueError(_unknown("option", key, OPTIONS))
            if not equals or not value:
                raise ValueError(f"option '{key}' needs '{key}=<value>'.")
            if key in options:
                raise ValueError(f"option '{key}' is given twice.")
            options[key] = value
        if colon and not options:
            raise ValueError("nothing follows the colon.")
        return cls(bits, rotation, **{key: _typed(key, options[key]) for key in options})


def _is_short(window: int | None) -> TypeGuard[int]:
    return window is not None and window < SHORT_WINDOW


def names() -> list[str]:
    """The cache names that help texts and errors list."""
    return [OFF] + [f"{bits}-{rotation}" for bits in BITS for rotation in ROTATIONS]


def _typed(key: str, value: str):
    """The value of an option; whether it is in range is for ``Spec`` to say."""
    if key in ("group_size", "seed", "recent", "first"):
        try:
            return int(value)
        except ValueError:
            raise ValueError(f"{key} is an integer, got {value!r}.") from None
    if key == "budget":
        try:
            return float(value)
        except ValueError:
            return value
    if key in ("skip", "high"):
        parts = (part.strip() for part in value.split("+"))
        return tuple(int(part) if part.isdecimal() else part for part in parts)
    return value


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return str(value).removesuffix(".0")


def _unknown(kind: str, given, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(str(given), known, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"unknown {kind} {str(given)!r}.{hint} Known: {', '.join(known)}."
