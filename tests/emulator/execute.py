"""Runs a generated Metal source on arrays."""

import ctypes
import threading
from dataclasses import dataclass
from functools import cache

import numpy as np

from . import counters as c
from .arithmetic import CLASSES
from .arrays import Memory, empty_output, memory
from .counters import Counters
from .errors import KernelError, metal_names
from .source import Kernel, parse
from .toolchain import load, runtime

# Pipelines of large kernels are capped at 832 to 1024 threads, depending on the GPU and the
# system; 512 are safe. 32 KB is what every Apple GPU has.
MAX_THREADS = 512
MAX_THREADGROUP_MEMORY = 32768
MODES = ("checked", "fast", "counted")

# The runtime is one machine, and the stand-in may be called from several threads.
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class _Module:
    """A loaded kernel: its entry, its table of variables, and its threadgroup bytes."""

    library: ctypes.CDLL
    entry: int
    variables: int
    variable_count: int
    threadgroup_memory: int


@cache
def _module(kernel: Kernel, counted: bool) -> _Module:
    library = load(kernel, counted)
    count = ctypes.c_uint32.in_dll(library, "emu_variable_count").value
    table = (c.Variable * max(count, 1)).in_dll(library, "emu_variables")
    bytes_ = sum((v.size + 15) // 16 * 16 for v in table[:count] if v.space == 3)
    if bytes_ > MAX_THREADGROUP_MEMORY:
        detail = f"{bytes_} bytes, a threadgroup has {MAX_THREADGROUP_MEMORY}"
        raise KernelError("too much threadgroup memory", detail)
    entry = ctypes.cast(library.emu_entry, ctypes.c_void_p).value or 0
    return _Module(library, entry, ctypes.addressof(table), count, bytes_)


_parse = cache(parse)


def _given(kernel: Kernel, inputs: list[Memory]) -> list[Memory]:
    """Memory for every input buffer: the arrays, and what MLX adds about their shapes."""
    out: list[Memory] = []
    arrays = iter(inputs)
    name, array = "", None
    for buffer in kernel.buffers:
        if buffer.is_output:
            continue
        if array is not None and buffer.name == f"{name}_shape":
            out.append(memory(np.array(array.shape, np.int32)))
        elif array is not None and buffer.name == f"{name}_strides":
            out.append(memory(np.array(array.strides, np.int64)))
        elif array is not None and buffer.name == f"{name}_ndim":
            out.append(memory(np.array(len(array.shape), np.int32)))
        else:
            name, array = buffer.name, next(arrays, None)
            if array is None:
                raise KernelError("launch", f"no array for the input {name}")
            if not array.holds(buffer.element):
                raise KernelError("launch", f"{name} is {buffer.element}, got {array.element}")
            out.append(array)
    if next(arrays, None) is not None:
        raise KernelError("launch", "more arrays than the kernel has inputs")
    return out


def _sizes(grid, threadgroup, max_threads: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Three numbers each. MLX never launches a threadgroup larger than the grid."""
    grid, threadgroup = (tuple(int(n) for n in (*x, 1, 1)[:3]) for x in (grid, threadgroup))
    if min(*grid, *threadgroup) < 1:
        raise KernelError("launch", f"grid {grid} or threadgroup {threadgroup} is empty")
    threads = int(np.prod(threadgroup))
    if threads > max_threads:
        detail = f"{threads} threads per threadgroup, {max_threads} are safe on every GPU"
        raise KernelError("too many threads", detail)
    return grid, tuple(map(min, threadgroup, grid))


def run(
    source: str,
    inputs: list,
    output_shapes,
    output_dtypes,
    grid,
    threadgroup,
    *,
    mode: str = "checked",
    seed: int = 0,
    init_value: float | None = None,
    keep_strides: bool = False,
    max_threads: int = MAX_THREADS,
) -> tuple[list[np.ndarray], Counters]:
    """Executes a kernel.

    Args:
        source (str): What MLX prints for the kernel with ``verbose=True``, without the fences.
        inputs: numpy or mx arrays in the kernel's order; bfloat16 may come as uint16 bits.
        output_shapes, output_dtypes: As for ``mx.fast.metal_kernel``.
        grid, threadgroup: Threads in all, and threads of a threadgroup, up to three numbers.
        mode (str): ``"checked"`` finds every fault; ``"fast"`` neither races nor reads of
            unwritten memory; ``"counted"`` is checked and counts arithmetic, but does not
            find undefined arithmetic.
        seed (int): Chooses the order in which lanes, SIMD groups and threadgroups run.
        init_value: What outputs hold before; otherwise all ones bits, which is NaN.
        keep_strides (bool): Pass inputs as they lie in memory (``ensure_row_contiguous=False``).
        max_threads (int): Threads a threadgroup may have, up to 1024.

    Returns:
        The outputs (bfloat16 as uint16 bits), and what was counted.

    Raises:
        KernelError: For a fault in the kernel, or arrays that do not fit it.
    """
    if mode not in MODES:
        raise ValueError(f"mode is one of {', '.join(MODES)}, got {mode!r}")
    kernel = _parse(source)
    grid, threadgroup = _sizes(grid, threadgroup, max_threads)
    module = _module(kernel, mode == "counted")
    given = _given(kernel, [memory(x, keep_strides) for x in inputs])
    outputs = [b for b in kernel.buffers if b.is_output]
    if not len(outputs) == len(output_shapes) == len(output_dtypes):
        raise KernelError("launch", f"the kernel has {len(outputs)} outputs")
    results = [
        empty_output(shape, dtype, init_value)
        for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
    ]
    launch = c.Launch(entry=module.entry, seed=seed, checked=mode != "fast")
    launch.grid[:], launch.threadgroup[:] = grid, threadgroup
    launch.variables, launch.variable_count = module.variables, module.variable_count
    counters = Counters(kernel.name, threadgroup_memory=module.threadgroup_memory)
    with _one_at_a_time:
        if mode == "counted":
            _arithmetic(module)  # forget a launch that failed
        _execute(kernel, launch, counters, given, results, init_value is not None)
        if mode == "counted":
            counters.arithmetic = _arithmetic(module)
    counters.take(launch, [b.name for b in kernel.buffers])
    return results, counters


def _execute(
    kernel: Kernel,
    launch: c.Launch,
    counters: Counters,
    given: list[Memory],
    results: list[np.ndarray],
    filled: bool,
) -> None:
    """Copies the buffers in, runs, and copies the outputs back."""
    emulator = runtime()
    arrays, outputs = iter(given), iter(results)
    addresses = (ctypes.c_void_p * c.MAX_BUFFERS)()
    launch.args, launch.buffers = ctypes.addressof(addresses), len(kernel.buffers)
    copies = []
    for i, buffer in enumerate(kernel.buffers):
        array = memory(next(outputs), True) if buffer.is_output else next(arrays)
        base = emulator.emu_place(i, array.size)
        if not base:
            raise MemoryError(f"no {array.size} bytes for {buffer.name}")
        base += array.align
        ctypes.memmove(base, array.address, array.size)
        if buffer.is_output:
            copies.append((array, base))
        addresses[i] = base + array.start
        place = launch.buffer[i]
        place.name, place.base, place.size = buffer.name.encode(), base, array.size
        place.output, place.filled = buffer.is_output, filled
        if launch.checked:
            for pointer, per_byte in (
                ("reads", counters.reads),
                ("simd_groups", counters.read_simdgroups),
                ("groups", counters.read_groups),
            ):
                per_byte[buffer.name] = np.zeros(array.size, np.uint16)
                setattr(place, pointer, per_byte[buffer.name].ctypes.data)
    if emulator.emu_run(ctypes.byref(launch)):
        where = f"thread {launch.error_thread} of threadgroup {launch.error_threadgroup}"
        detail = f"{metal_names(launch.error.decode())} [{where}]"
        raise KernelError(launch.error_kind.decode(), detail, launch.error_site >> 10, kernel.text)
    for array, base in copies:
        ctypes.memmove(array.address, base, array.size)


def _arithmetic(module: _Module) -> dict[str, int]:
    """Operations by class since the last call, which starts at 0 again."""
    number = ctypes.c_uint32.in_dll(module.library, "emu_block_number").value
    counts = (ctypes.c_uint64 * number).in_dll(module.library, "emu_block_counts")
    table = (ctypes.c_uint32 * (number * len(CLASSES))).in_dll(module.library, "emu_block_table")
    times = np.array(counts, np.uint64)
    totals = times @ np.array(table, np.uint64).reshape(number, len(CLASSES))
    ctypes.memset(counts, 0, ctypes.sizeof(counts))
    return {name: int(n) for name, n in zip(CLASSES, totals, strict=True) if n}
