"""Spec strings: what ``--kv-cache`` and :func:`mlx_kvq.enable` accept.

``<bits>-<rotation>[:option=value,...]``, for example ``int4-srft:group_size=64,seed=7``,
or ``fp16`` for the model's own cache.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

# name -> (bits of a key, bits of a value)
BITS = {"int4": (4, 4), "int8": (8, 8), "k8v4": (8, 4)}
ROTATIONS = {
    "srft": "randomized signs, then a real FFT; every even head size",
    "srht": "randomized signs, then a Hadamard transform; head sizes that are powers of two",
    "householder": "D/2 random reflections, a dense matrix; every even head size",
    "quaternion": "random rotations of four channels each; multiples of four",
    "none": "no rotation",
}
SCALES = {
    "search": "the best of six clipped scales by squared error",
    "absmax": "the largest magnitude maps to the outermost of the 2^bits half-step levels",
    "paper": "arXiv 2605.05699: an odd number of levels around zero",
}
CALIBRATE = {
    "auto": "with the calibration given, or one made from a built-in text when there is none",
    "off": "never: μ = 0, σ = 1, the paper's plain path",
}
ROUNDINGS = {
    "nearest": "every channel to its nearest level",
    "feedback": "a channel makes up for the errors before it, weighted by what queries read",
}
OPTIONS = ("group_size", "seed", "scale", "calibrate", "skip", "high", "budget", "rounding")
OFF = "fp16"


@dataclass(frozen=True)
class Spec:
    """A parsed spec string.

    Args:
        bits (str): ``"int4"``, ``"int8"`` or ``"k8v4"`` (8-bit keys, 4-bit values).
        rotation (str): ``"srft"``, ``"srht"`` or ``"none"``.
        group_size (int, optional): Channels that share one scale; a multiple of 8 that divides
            the head size. ``None`` takes 32, or the next such divisor above 32.
        seed (int): Seed of the random signs, 0 to 2**32 - 1.
        scale (str): ``"search"``, ``"absmax"`` or ``"paper"``.
        calibrate (str): ``"auto"`` or ``"off"``.
        skip (tuple): Layers that keep the model's own cache: numbers, ``"first"``, ``"last"``,
            counted among the layers that can be packed. ``skip=first+last`` in a string.
        high (tuple): Layers kept in 8 bits, likewise.
        budget (float, optional): Bits per value, scales included, that may be spent on average;
            what is left over goes to the layers whose error costs most (``mlx_kvq.budget``).
        rounding (str): ``"nearest"`` or ``"feedback"`` (``mlx_kvq.feedback``): how codes of keys
            are chosen when written; what is stored is read in the same way.
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
    rounding: str = "nearest"

    @property
    def k_bits(self) -> int:
        return BITS[self.bits][0]

    @property
    def v_bits(self) -> int:
        return BITS[self.bits][1]

    def __str__(self) -> str:
        options = []
        if self.group_size is not None:
            options.append(f"group_size={self.group_size}")
        if self.seed != 0:
            options.append(f"seed={self.seed}")
        if self.scale != "search":
            options.append(f"scale={self.scale}")
        if self.calibrate != "auto":
            options.append(f"calibrate={self.calibrate}")
        for name in ("skip", "high"):
            if layers := getattr(self, name):
                options.append(f"{name}={'+'.join(map(str, layers))}")
        if self.budget is not None:
            options.append(f"budget={self.budget:g}")
        if self.rounding != "nearest":
            options.append(f"rounding={self.rounding}")
        name = f"{self.bits}-{self.rotation}"
        return f"{name}:{','.join(options)}" if options else name

    @classmethod
    def parse(cls, text: "str | Spec") -> "Spec | None":
        """Parse a spec string; ``"fp16"`` gives ``None`` (leave the model's cache alone).

        Raises:
            ValueError: If a word or an option is unknown or a value is out of range; the
                message lists what is accepted.
        """
        if isinstance(text, Spec):
            return text
        if not isinstance(text, str):
            raise ValueError(f"A KV cache spec is a string such as 'int4-srft', got {text!r}.")
        name, colon, tail = text.strip().partition(":")
        if name == OFF:
            if colon:
                raise ValueError(f"KV cache spec {text!r}: '{OFF}' takes no options.")
            return None
        bits, _, rotation = name.partition("-")
        if bits not in BITS or rotation not in ROTATIONS:
            raise ValueError(_unknown(text, "cache", name, names()))
        options: dict[str, str] = {}
        for item in filter(None, tail.split(",")) if colon else ():
            key, equals, value = (part.strip() for part in item.partition("="))
            if key not in OPTIONS:
                raise ValueError(_unknown(text, "option", key, OPTIONS))
            if not equals or not value:
                raise ValueError(f"KV cache spec {text!r}: option '{key}' needs '{key}=<value>'.")
            if key in options:
                raise ValueError(f"KV cache spec {text!r}: option '{key}' is given twice.")
            options[key] = value
        if colon and not options:
            raise ValueError(f"KV cache spec {text!r}: nothing follows the colon.")
        return cls(bits, rotation, **_typed(text, options))


def names() -> list[str]:
    """Every cache name a spec string can start with."""
    return [OFF] + [f"{bits}-{rotation}" for bits in BITS for rotation in ROTATIONS]


def _typed(text: str, options: dict[str, str]) -> dict:
    typed: dict = dict(options)
    if "group_size" in options:
        g = _integer(text, "group_size", options["group_size"])
        if g < 8 or g % 8:
            raise ValueError(f"KV cache spec {text!r}: group_size is a multiple of 8, got {g}.")
        typed["group_size"] = g
    if "seed" in options:
        seed = _integer(text, "seed", options["seed"])
        if not 0 <= seed < 1 << 32:
            raise ValueError(f"KV cache spec {text!r}: seed is 0 to 2**32 - 1, got {seed}.")
        typed["seed"] = seed
    if "scale" in options and options["scale"] not in SCALES:
        raise ValueError(_unknown(text, "scale", options["scale"], SCALES))
    if "calibrate" in options and options["calibrate"] not in CALIBRATE:
        raise ValueError(_unknown(text, "calibrate", options["calibrate"], CALIBRATE))
    if "rounding" in options and options["rounding"] not in ROUNDINGS:
        raise ValueError(_unknown(text, "rounding", options["rounding"], ROUNDINGS))
    for name in ("skip", "high"):
        if name in options:
            typed[name] = tuple(_layer(text, name, part) for part in options[name].split("+"))
    if "budget" in options:
        try:
            typed["budget"] = float(options["budget"])
        except ValueError:
            typed["budget"] = 0.0
        if not 4 <= typed["budget"] <= 16:
            raise ValueError(
                f"KV cache spec {text!r}: budget is 4 to 16 bits per value, got "
                f"{options['budget']!r}."
            )
    return typed


def _layer(text: str, option: str, part: str) -> int | str:
    part = part.strip()
    if part in ("first", "last"):
        return part
    if not part.isdecimal():
        raise ValueError(
            f"KV cache spec {text!r}: {option} lists layers as 'first', 'last' or numbers "
            f"joined by '+', got {part!r}."
        )
    return int(part)


def _integer(text: str, key: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"KV cache spec {text!r}: {key} is an integer, got {value!r}.") from None


def _unknown(text: str, kind: str, given: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(given, known, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"KV cache spec {text!r}: unknown {kind} '{given}'.{hint} Known: {', '.join(known)}."
