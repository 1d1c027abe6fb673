"""The arithmetic of ``estimate_apple``; its counts are the emulator's."""

import pytest

from tests.emulator import Counters
from tests.emulator import estimate_apple as e

CHIP = e.Chip("test", "g", cores=4, clock=1.0, bandwidth=100)


@pytest.mark.parametrize(
    "threadgroups, simd_groups, slower",
    [
        (96, 1, 1),  # 24 SIMD groups a core
        (4, 24, 1),
        (4, 8, 1.6),
        (4, 4, 2.75),
        (1, 24, 4),  # one core works
        (5, 24, 8 / 5),  # two rounds for five threadgroups on four cores
    ],
)
def test_time_by_instructions(threadgroups, simd_groups, slower):
    work = e.Work(16e9, 1e9, 50e9, threadgroups, simd_groups)
    instructions, bytes_ = work.seconds(CHIP)
    # 16e9 cycles of SIMD groups, of which four cores start 16 a nanosecond.
    assert instructions == pytest.approx(1.0 * slower)
    assert bytes_ == 0.5
    # The pipeline for the rest works beside the others.
    assert e.Work(1e9, 16e9, 0, threadgroups, simd_groups).seconds(CHIP)[0] == instructions


def test_work_of_counters():
    c = Counters("k", threads=256, threadgroups=2)
    c.arithmetic = {"fma_f32": 640, "shift": 320, "sign": 999, "extend": 999}
    c.bytes_read, c.bytes_written = {"a": 256}, {"o": 256}
    c.threadgroup_bytes_read = 128
    c.simd = {"simd_sum": 2, "simd_shuffle_xor": 4, "simdgroup_multiply_accumulate": 3}
    work = e.work_of(c, 7)
    memory = 512 / 8 / 32 + 128 / 4 / 32
    assert work.main == 20 + 10 + memory + 2 * 14.5 + 4 * 2 + 3 * 20
    assert (work.rest, work.bytes, work.threadgroups, work.simd_groups) == (40, 7, 2, 4)


def test_a_line_through_two_launches():
    def at(keys, parts):
        return e.Work(100 * parts + 3 * keys, 10 * parts + keys, 0, 4 * parts, 8)

    line = e.Linear.fit(at, 1024, 2048, 2)
    assert line(32768, 16, 5) == e.Work(1600 + 98304, 160 + 32768, 5, 64, 8)


@pytest.mark.parametrize(
    "heads, T, kind, expected",
    [
        ((12, 2), 4095, "g", 0), ((12, 2), 4096, "g", 64), ((4, 2), 4096, "g", 32),
        ((4, 4), 9999, "g", 0), ((12, 2), 1023, "s", 0), ((12, 2), 1024, "s", 64),
        ((12, 2), 8192, "s", 128), ((12, 2), 32768, "s", 256), ((4, 1), 32768, "s", 64),
        ((4, 1), 32768, "d", 128), ((12, 2), 16384, "d", 512), ((2, 1), 9000, "d", 256),
    ],
)  # fmt: skip
def test_blocks_of_mlx(heads, T, kind, expected):
    theirs = e.Theirs.__new__(e.Theirs)
    theirs.Hq, theirs.Hkv = heads
    assert theirs.blocks(T, e.Chip("", kind, 1, 1, 1)) == expected


def test_widening_is_free_only_inside():
    from tests.emulator import arithmetic

    line = "  %3 = fpext half %1 to float"
    before = arithmetic.classify(line)
    with e.free_widening():
        assert arithmetic.classify(line)[0] == "sign"
        assert arithmetic.classify("  %3 = sitofp i32 %1 to float")[0] == "convert"
    assert arithmetic.classify(line) == before == ("convert", 1)
