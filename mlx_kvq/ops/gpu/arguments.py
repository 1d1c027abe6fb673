"""The integers of a launch by name: what the host passes, and where kernels find it.

``kernels/*.metal`` read ``info[kvq::LENGTH]``; ``jit`` writes that enumeration from these names.
"""

import mlx.core as mx

from .. import memo

# The softmax scale is passed as the bits of a float; a context of GROWS tokens has an exact tail
# of more than RECENT tokens; NEXT is the row after the newest token's. Of
# FIRSTS first tokens the first one is at place FIRST_AT, unless each sequence has a place.
_ATTEND = (
    "LENGTH", "SCALE", "CAUSAL", "WINDOW", "RECENT", "GROWS", "KEEP", "NEXT", "FIRSTS", "FIRST_AT",
)  # fmt: skip
_UNPACK = ("LENGTH", "FIRSTS", "FIRST_AT")
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "quantize_pack": ("KEPT", "ROWS", "IS_ROTATED"),
    "keep_exact": ("KEPT",),
    "attend_finish": _ATTEND,
    "attend_store": _ATTEND,
    "attend_join": _ATTEND,
    "combine": ("HEADS", "QUERIES", "SCALE"),
    "dequantize": _UNPACK,
    "restore": _UNPACK,
}


def integers(kernel: str, **values: int) -> mx.array:
    """The integers of a launch of ``kernel``, int32, by the names of :data:`ARGUMENTS` in lower
    case; the last ones may be left out. The same values give the same array: on CUDA a new one
    costs more than the launch. A kernel gets fewer than 8 integers, or more, by its constants
    alone: MLX would compile it twice (``tests/ops/test_compiled.py``).

    Raises:
        ValueError: For other names.
    """
    return memo.launch((kernel, *values.items()), lambda: _integers(kernel, values))


def _integers(kernel: str, values: dict[str, int]) -> mx.array:
    names = [name.lower() for name in ARGUMENTS[kernel]]
    given = names[: len(values)]
    if set(values) != set(given):
        raise ValueError(f"{kernel} takes {', '.join(names)}, not {', '.join(values)}.")
    return mx.array([values[name] for name in given], dtype=mx.int32)


def not_small(x: mx.array) -> mx.array:
    """A vector in memory as it is, in a shape of at least 8 elements: MLX compiles a kernel anew
    when an input that had fewer has more, as when the eighth sequence comes into a batch."""
    return x if x.size >= 8 else mx.broadcast_to(x[:, None], (x.size, 8))


def enumeration(kernel: str) -> str:
    """Source text that gives the kernel these names."""
    return f"namespace kvq {{ enum : int {{ {', '.join(ARGUMENTS[kernel])} }}; }}\n"
