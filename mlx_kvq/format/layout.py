"""The packed row: the codes and scales of one token and one KV head.

``W`` uint32 words, in this order::

    K codes | V codes | K scales | V scales

Codes are ``32 / bits`` to a word, lowest bits first: MLX's own affine order, so codes and
scales feed ``mx.quantized_matmul`` as they are. Scales are fp16, two to a word, lower half
first; one zero half pads an odd count. For D = 128, 4 bits and groups of 64 a row is
16 + 16 + 1 + 1 = 34 words, 136 bytes, against 512 bytes in fp16.
"""

from dataclasses import dataclass

import mlx.core as mx

MAX_DIM = 4096  # of a head: ten times the largest of a known model


@dataclass(frozen=True)
class RowLayout:
    """The parts of a row, in uint32 words. Raises ValueError if a row cannot be laid out so."""

    k_dim: int  # head size, a multiple of 8
    v_dim: int
    k_bits: int  # 4 or 8
    v_bits: int
    k_group: int  # channels that share a scale
    v_group: int

    def __post_init__(self):
        sides = (self.k_dim, self.k_bits, self.k_group), (self.v_dim, self.v_bits, self.v_group)
        for D, bits, group in sides:
            check_dim(D)
            if type(bits) is not int or bits not in (4, 8):
                raise ValueError(f"codes have 4 or 8 bits, not {bits!r}")
            if type(group) is not int or not 1 <= group <= D or D % group:
                raise ValueError(f"group_size={group!r} does not divide head size {D}")

    @property
    def k_words(self) -> int:
        return self.k_dim * self.k_bits // 32

    @property
    def v_words(self) -> int:
        return self.v_dim * self.v_bits // 32

    @property
    def k_scales(self) -> int:
        return self.k_dim // self.k_group

    @property
    def v_scales(self) -> int:
        return self.v_dim // self.v_group

    @property
    def codes_words(self) -> int:
        """First word of the scales."""
        return self.k_words + self.v_words

    @property
    def words(self) -> int:
        """W, the length of a row."""
        return self.codes_words + (self.k_scales + self.v_scales + 1) // 2

    @property
    def bits_per_value(self) -> float:
        return 32 * self.words / (self.k_dim + self.v_dim)


def tail_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """Dtype of the exact tail for keys and values in ``dtype``. A rotated vector can be √D times as
    large as its largest channel: too large for fp16."""
    return mx.float32 if dtype == mx.float16 else dtype


def check_dim(D: int) -> None:
    """Raise ValueError unless vectors of D channels can be packed."""
    if type(D) is not int or D % 8 or not 8 <= D <= MAX_DIM:
        raise ValueError(f"head size {D!r} is not a multiple of 8 from 8 to {MAX_DIM}")


def choose_group(D: int, group_size: int | None) -> int:
    """The group size for head size D: as asked, or 64, or the next divisor above 64. Raises
    ValueError if D cannot be packed, or the asked group size does not divide it."""
    check_dim(D)
    if group_size is None:
        return next((g for g in range(64, D, 8) if D % g == 0), D)
    if type(group_size) is not int or group_size < 8 or group_size % 8 or D % group_size:
        fits = [str(g) for g in range(8, D + 1, 8) if D % g == 0]
        raise ValueError(
            f"group_size={group_size} does not divide head size {D} (possible: {', '.join(fits)})"
        )
    return group_size
