"""What a launch did, and the C structures (memory.h) that the runtime fills in."""

import ctypes
from dataclasses import dataclass, field

import numpy as np

MAX_BUFFERS = 31
# In the order of ops.h.
SIMD_FUNCTIONS = (
    "simd_sum",
    "simd_product",
    "simd_min",
    "simd_max",
    "simd_prefix_inclusive_sum",
    "simd_prefix_exclusive_sum",
    "simd_prefix_inclusive_product",
    "simd_prefix_exclusive_product",
    "simd_all",
    "simd_any",
    "simd_shuffle",
    "simd_shuffle_xor",
    "simd_shuffle_up",
    "simd_shuffle_down",
    "simd_shuffle_and_fill_up",
    "simdgroup_multiply_accumulate",
)


class BufferCounters(ctypes.Structure):
    _fields_ = [
        (n, ctypes.c_uint64)
        for n in ("bytes_read", "bytes_written", "loads", "stores", "unwritten")
    ]


class LaunchCounters(ctypes.Structure):
    _fields_ = [
        ("buffer", BufferCounters * MAX_BUFFERS),
        ("threadgroup_memory", BufferCounters),
        ("tables", BufferCounters),
        ("simd", ctypes.c_uint64 * 32),
        ("simd_lanes", ctypes.c_uint64 * 32),
        ("barriers", ctypes.c_uint64),
        ("simd_barriers", ctypes.c_uint64),
        ("threads", ctypes.c_uint64),
        ("threadgroups", ctypes.c_uint64),
    ]


class Buffer(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("base", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("output", ctypes.c_uint32),
        ("filled", ctypes.c_uint32),
        ("reads", ctypes.c_void_p),
        ("simd_groups", ctypes.c_void_p),
        ("groups", ctypes.c_void_p),
    ]


class Variable(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("space", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
    ]


class Launch(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("args", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("seed", ctypes.c_uint64),
        ("checked", ctypes.c_uint32),
        ("buffers", ctypes.c_uint32),
        ("buffer", Buffer * MAX_BUFFERS),
        ("variables", ctypes.c_void_p),
        ("variable_count", ctypes.c_uint32),
        ("counters", LaunchCounters),
        ("error_site", ctypes.c_uint32),
        ("error_thread", ctypes.c_uint32),
        ("error_threadgroup", ctypes.c_uint32),
        ("error_kind", ctypes.c_char * 64),
        ("error", ctypes.c_char * 512),
    ]


def _per_buffer() -> dict:
    return field(default_factory=dict)


def _per_byte() -> dict:
    return field(default_factory=dict, repr=False)


@dataclass
class Counters:
    """What a launch did.

    Dictionaries by buffer hold every buffer of the kernel. Bytes are those that threads ask
    for: 32 lanes that read one word count it 32 times.

    Attributes:
        kernel (str): The generated name.
        bytes_read, bytes_written, loads, stores: By buffer.
        unwritten: Output bytes no thread wrote, by buffer (not in fast mode).
        reads, read_simdgroups, read_groups: By buffer, one uint16 for each byte: how often
            threads read it, how many SIMD groups did, how many threadgroups did (not in fast
            mode). ``read_simdgroups`` is what memory traffic is like when lanes share loads.
        threadgroup_bytes_read, threadgroup_bytes_written: Of threadgroup memory, in all.
        threadgroup_memory: Bytes of threadgroup memory that the kernel declares.
        simd: SIMD-group functions by name, once per SIMD group that calls one.
        barriers, simdgroup_barriers: Once per threadgroup, and per SIMD group.
        arithmetic: By class (``arithmetic.CLASSES``), per thread (counted mode only).
    """

    kernel: str
    bytes_read: dict[str, int] = _per_buffer()
    bytes_written: dict[str, int] = _per_buffer()
    loads: dict[str, int] = _per_buffer()
    stores: dict[str, int] = _per_buffer()
    unwritten: dict[str, int] = _per_buffer()
    reads: dict[str, np.ndarray] = _per_byte()
    read_simdgroups: dict[str, np.ndarray] = _per_byte()
    read_groups: dict[str, np.ndarray] = _per_byte()
    threadgroup_bytes_read: int = 0
    threadgroup_bytes_written: int = 0
    threadgroup_memory: int = 0
    simd: dict[str, int] = _per_buffer()
    barriers: int = 0
    simdgroup_barriers: int = 0
    threads: int = 0
    threadgroups: int = 0
    arithmetic: dict[str, int] = _per_buffer()

    @property
    def shuffles(self) -> int:
        """Shuffles, once per SIMD group that calls one."""
        return sum(n for name, n in self.simd.items() if "shuffle" in name)

    def take(self, launch: Launch, names: list[str]) -> None:
        """Copies the runtime's counters; ``names`` are the buffers in order."""
        c = launch.counters
        for i, name in enumerate(names):
            place = c.buffer[i]
            self.bytes_read[name] = place.bytes_read
            self.bytes_written[name] = place.bytes_written
            self.loads[name], self.stores[name] = place.loads, place.stores
            if launch.buffer[i].output and launch.checked:
                self.unwritten[name] = place.unwritten
        self.threadgroup_bytes_read = c.threadgroup_memory.bytes_read
        self.threadgroup_bytes_written = c.threadgroup_memory.bytes_written
        self.simd = {f: n for f, n in zip(SIMD_FUNCTIONS, c.simd, strict=False) if n}
        self.barriers, self.simdgroup_barriers = c.barriers, c.simd_barriers
        self.threads, self.threadgroups = c.threads, c.threadgroups
