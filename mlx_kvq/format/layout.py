"""The packed row: the codes and scales of one token and one KV head.

``W`` uint32 words, in this order::

    K codes | V codes | K scales | V scales

Codes are ``32 / bits`` to a word, lowest bits first: MLX's own affine order, so codes and
scales feed ``mx.quantized_matmul`` as they are. Scales are fp16, two to a word, lower half
first; one zero half pads an odd count. For D = 128, 4 bits and groups of 64 a row is
16 + 16 + 1 + 1 = 34 words, 136 bytes, against 512 bytes in fp16.

A side of narrow codes, of 3 or 5 bits, has their low 2 or 4 bits where others have their codes, and
its high bits, one of a code, as 16-bit halves, before the scales::

    K codes | V codes | K high bits | V high bits | K scales | V scales

One zero half pads an odd count of halves. A row is read as the *wide* row of the same shape, whose
codes of 4 or 8 bits are in MLX's order and have the same levels. It takes few operations to make::

    3 bits, level c - 3.5    4 bits, c + 4      (c + 4) - 7.5 = c - 3.5
    5 bits, level c - 15.5   8 bits, c + 112    (c + 112) - 127.5 = c - 15.5

(by the rule ``paper`` the levels are c - 4 and c - 16, and the same holds). A half has the high
bits of 16 channels; let ``h`` be the half ORed with itself 15 bits further up.

Of 3 bits, one word ``low`` has the low bits of these channels c = 8 w + n, w = 0 or 1, n = 0 … 7,
from bit ``4 n + 2 w`` on, and the half has the high bit as bit ``4 (n % 4) + n // 4 + 2 w``. So the
codes c in words of 4 bits each are::

    (low      & 0x33333333) | (h & 0x11111111) << 2
    (low >> 2 & 0x33333333) | (h & 0x44444444)

For D = 128, 3 bits and groups of 64 a row is 8 + 8 + 4 + 4 + 1 + 1 = 26 words, 104 bytes.

Of 5 bits, two words have the low bits of the channels c = 4 w + n, w = 0 … 3, n = 0 … 3: those of
w = 0 and 1 the first one, those of w = 2 and 3 the second one, from bit ``8 n + 4 (w % 2)`` on. The
half has the high bit as bit ``8 (n % 2) + n // 2 + 2 w``. So the codes c in words of 8 bits each
are, w = 0 … 3::

    (first       & 0x0f0f0f0f) | (h << 4 & 0x10101010)
    (first  >> 4 & 0x0f0f0f0f) | (h << 2 & 0x10101010)
    (second      & 0x0f0f0f0f) | (h      & 0x10101010)
    (second >> 4 & 0x0f0f0f0f) | (h >> 2 & 0x10101010)

For D = 128, 5-bit keys, 4-bit values and groups of 64 a row is 16 + 16 + 4 + 1 + 1 = 38 words, 152
bytes.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import mlx.core as mx

MAX_DIM = 4096  # of a head: ten times the largest of a known model
_LOW = {3: 2, 5: 4}  # bits of narrow codes -> bits that are among a row's codes
_READ = {3: 4, 5: 8}  # bits of narrow codes -> bits that they are read as


@dataclass(frozen=True)
class RowLayout:
    """The parts of a row, in uint32 words. Raises ValueError if a row cannot be laid out so."""

    k_dim: int  # head size, a multiple of 8; of narrow codes, of 16
    v_dim: int
    k_bits: int  # 3, 4, 5 or 8
    v_bits: int
    k_group: int  # channels that share a scale
    v_group: int

    def __post_init__(self):
        sides = (self.k_dim, self.k_bits, self.k_group), (self.v_dim, self.v_bits, self.v_group)
        for D, bits, group in sides:
            if type(bits) is not int or bits not in (3, 4, 5, 8):
                raise ValueError(f"codes have 3, 4, 5 or 8 bits, not {bits!r}")
            check_dim(D, bits)
            if type(group) is not int or not 1 <= group <= D or D % group:
                raise ValueError(f"group_size={group!r} does not divide head size {D}")
            if is_narrow(bits) and group % 16:
                raise ValueError(f"groups of {bits}-bit codes are multiples of 16, not {group}")

    @property
    def k_words(self) -> int:
        """Words of the keys' codes; of narrow ones, of their low bits."""
        return self.k_dim * _LOW.get(self.k_bits, self.k_bits) // 32

    @property
    def v_words(self) -> int:
        return self.v_dim * _LOW.get(self.v_bits, self.v_bits) // 32

    @property
    def k_halves(self) -> int:
        """16-bit halves of high bits of the keys' narrow codes."""
        return self.k_dim // 16 if is_narrow(self.k_bits) else 0

    @property
    def v_halves(self) -> int:
        return self.v_dim // 16 if is_narrow(self.v_bits) else 0

    @property
    def high_word(self) -> int:
        """First word of the high bits."""
        return self.k_words + self.v_words

    @property
    def k_scales(self) -> int:
        return self.k_dim // self.k_group

    @property
    def v_scales(self) -> int:
        return self.v_dim // self.v_group

    @property
    def codes_words(self) -> int:
        """First word of the scales."""
        return self.high_word + (self.k_halves + self.v_halves + 1) // 2

    @property
    def words(self) -> int:
        """W, the length of a row."""
        return self.codes_words + (self.k_scales + self.v_scales + 1) // 2

    @property
    def bits_per_value(self) -> float:
        return 32 * self.words / (self.k_dim + self.v_dim)

    @cached_property
    def wide(self) -> "RowLayout":
        """Of the rows as they are read: codes of 3 bits have 4, codes of 5 bits 8."""
        bits = read_bits(self.k_bits), read_bits(self.v_bits)
        if bits == (self.k_bits, self.v_bits):
            return self
        return replace(self, k_bits=bits[0], v_bits=bits[1])


def is_narrow(bits: int) -> bool:
    """Whether codes of so many bits are stored in two parts and read as wider ones."""
    return bits in _LOW


def read_bits(bits: int) -> int:
    """Bits of codes as they are read."""
    return _READ.get(bits, bits)


def tail_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """Dtype of the exact tail for keys and values in ``dtype``. A rotated vector can be √D times as
    large as its largest channel: too large for fp16. What bf16 takes off it has 1/1000 of the power
    that rounding to 4 bits takes, in half the bytes of fp32 (scripts/studies/quality.md)."""
    return mx.float32 if dtype == mx.float32 else mx.bfloat16


def _unit(bits: int) -> int:
    """Channels that are stored together."""
    return 16 if is_narrow(bits) else 8


def check_dim(D: int, bits: int = 4) -> None:
    """Raise ValueError unless vectors of D channels can be packed in codes of so many bits."""
    unit = _unit(bits)
    if type(D) is not int or D % unit or not unit <= D <= MAX_DIM:
        of = f" for {bits}-bit codes" if is_narrow(bits) else ""
        raise ValueError(
            f"head size {D!r} is not a multiple of {unit} from {unit} to {MAX_DIM}{of}"
        )


def choose_group(D: int, group_size: int | None, bits: int = 4, least: int = 64) -> int:
    """The group size for head size D and codes of so many bits: as asked, or ``least`` or the next
    divisor above; a multiple of 8, of narrow codes of 16. Raises ValueError if D cannot be packed,
    or the asked group size does not divide it so."""
    check_dim(D, bits)
    unit = _unit(bits)
    if group_size is None:
        return next((g for g in range(least, D, unit) if D % g == 0), D)
    fits = [g for g in range(unit, D + 1, unit) if D % g == 0]
    if type(group_size) is not int or group_size not in fits:
        possible = ", ".join(map(str, fits))
        if is_narrow(bits) and type(group_size) is int and group_size > 0 and D % group_size == 0:
            raise ValueError(
                f"group_size={group_size} is not a multiple of 16, as {bits}-bit codes need "
                f"(possible for head size {D}: {possible})"
            )
        raise ValueError(
            f"group_size={group_size} does not divide head size {D} (possible: {possible})"
        )
    return group_size
