"""Arrays as a kernel sees them, and dtypes by the names that generated sources use."""

from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np

_ELEMENTS = {"float32": "float", "int32": "int", "uint32": "uint", "bool": "bool"}
_ALIASES = {"int32_t": "int", "uint32_t": "uint", "half": "float16_t", "size_t": "uint64_t"}


@dataclass(frozen=True)
class Memory:
    """The bytes an array spans, from its lowest address to its highest.

    Args:
        owner: Keeps the bytes alive.
        address, size (int): The span.
        start (int): Where in it the first element is.
        align (int): The span's address modulo 16, on a machine whose buffers begin at 0.
        shape, strides: In elements; what ``name_shape`` and ``name_strides`` hold.
        element (str): Name of the element type.
    """

    owner: np.ndarray
    address: int
    size: int
    start: int
    align: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    element: str

    def holds(self, element: str) -> bool:
        """True if a parameter of type ``element`` may point to it; bfloat16 comes as bits."""
        name = _ALIASES.get(element, element)
        return name == self.element or (name, self.element) == ("bfloat16_t", "uint16_t")


def to_numpy(array: "mx.array | np.ndarray", copy: bool | None = False) -> np.ndarray:
    """An array's values, by default in place, with its strides; bfloat16 as uint16 bits.

    The buffer protocol passes on the strides of a transposed, sliced or broadcast mx.array.
    """
    if not isinstance(array, mx.array):
        return np.asarray(array)
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16) if array.ndim else array.reshape(1).view(mx.uint16)[0]
    mx.eval(array)
    return np.array(array, copy=copy)


def to_mlx(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """The reverse, evaluated."""
    out = mx.array(array)
    if dtype == mx.bfloat16:
        out = out.reshape(-1).view(mx.bfloat16).reshape(array.shape)
    mx.eval(out)
    return out


@cache
def _first_address() -> int:
    """Where MLX's buffers begin, modulo 16: its CPU allocator keeps a size in front."""
    return to_numpy(mx.zeros(64)).__array_interface__["data"][0] % 16


def memory(array: "mx.array | np.ndarray", keep_strides: bool = False) -> Memory:
    """The memory of an array, copied to row-contiguous order unless ``keep_strides``."""
    bfloat = isinstance(array, mx.array) and array.dtype == mx.bfloat16
    values = to_numpy(array)
    shape = values.shape
    as_is = keep_strides or values.flags.c_contiguous
    if not as_is:
        values = np.ascontiguousarray(values).reshape(shape)
    name = values.dtype.name
    element = "bfloat16_t" if bfloat else _ELEMENTS.get(name, f"{name}_t")
    item = values.itemsize
    steps = [(n - 1) * s for n, s in zip(shape, values.strides, strict=True)]
    low = sum(s for s in steps if s < 0)
    high = sum(s for s in steps if s > 0)
    size = high - low + item if values.size else 0
    address = values.__array_interface__["data"][0] + low
    strides = tuple(s // item for s in values.strides)
    # A view that starts in the middle of its buffer may be misaligned for vectors.
    align = (address - _first_address()) % 16 if isinstance(array, mx.array) and as_is else 0
    return Memory(values, address, size, -low, align, shape, strides, element)


def numpy_dtype(dtype) -> np.dtype:
    """The numpy dtype that holds ``dtype``; uint16 for bfloat16."""
    if isinstance(dtype, mx.Dtype):
        name = str(dtype).removeprefix("mlx.core.")
        return np.dtype({"bfloat16": "uint16", "bool_": "bool"}.get(name, name))
    return np.dtype(dtype)


def empty_output(shape, dtype, init_value: float | None) -> np.ndarray:
    """An output before the kernel runs: all ones bits (NaN for floats), or ``init_value``."""
    out = np.empty(tuple(shape), numpy_dtype(dtype))
    if init_value is None:
        out.reshape(-1).view(np.uint8).fill(255)
    elif isinstance(dtype, mx.Dtype):
        out[...] = to_numpy(mx.array(init_value).astype(dtype))
    else:
        out[...] = init_value
    return out
