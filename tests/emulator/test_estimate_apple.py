"""The arithmetic of ``estimate_apple``; its counts are the emulator's."""

import pytest

from tests.emulator import Counters
from tests.emulator import estimate_apple as e

CHIP = e.Chip("test", "g", cores=4, clock=1.0, bandwidth=100)
BYTES = 0.5 / e.REACHED  # seconds of 50e9 bytes


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
    assert bytes_ == pytest.approx(BYTES)
    # The pipeline for the rest works beside the others.
    assert e.Work(1e9, 16e9, 0, threadgroups, simd_groups).seconds(CHIP)[0] == instructions


def test_registers_leave_few_simd_groups_which_hide_no_loads():
    work = e.Work(16e9, 1e9, 50e9, 96, 8, spilled=2e9, resident=12)
    assert work.seconds(CHIP)[0] == 1.0 == work.best(CHIP)  # as if there were registers enough
    slower = 1.6 - 4 / 16 * 0.6  # between 8 and 24 of them
    instructions = 18 / 16 * slower
    assert work.seconds(CHIP, registers=True)[0] == pytest.approx(instructions)
    assert work.worst(CHIP) == pytest.approx(instructions + BYTES)
    enough = e.replace(work, resident=32.0, spilled=0.0)
    assert enough.worst(CHIP) == enough.best(CHIP) == 1.0
    few = e.replace(work, threadgroups=4)  # of 8 SIMD groups: fewer than registers would hold
    assert few.seconds(CHIP, registers=True)[0] == pytest.approx(18 / 16 * 1.6)


def test_registers_are_those_of_the_table():
    for kernel, D, variant in (
        ("attend_store", 128, "calibrated, tail"),
        ("attend_finish", 256, "calibrated, tail"),
        ("quantize_pack", 128, "calibrated, no tail, L=512"),
        ("combine", 256, "calibrated, tail"),
        ("dequantize", 128, "no tail"),
    ):
        registers = e.Registers.of(kernel, D, variant)
        assert 8 <= registers.resident <= 32 and registers.spills >= 0
    with pytest.raises(ValueError, match="has no attend_store, D = 72, 'tail'"):
        e.Registers.of("attend_store", 72, "tail")


def test_what_dominates():
    class Given:
        def attend(self, T, parts):
            return [e.Work(16e9, 0, 1e9, 9600, 8, 0.0, 12.0)]

        def parts(self, T):
            return 1

    said = e.dominating(Given(), 1000)
    assert said.startswith("What moves the estimate at 1000 tokens. M1: registers alone 1.45 times")
    assert "M4 Max" in said


def test_published_times_are_those_of_the_bandwidths():
    """GB/s of keys and values counted once, as the issue gives them."""
    gbps = {
        (32, 32, 128): (239, 282, 281), (32, 8, 128): (234, 263, 264),
        (32, 4, 128): (130, 184, 190), (64, 8, 64): (76, 113, 119),
    }  # fmt: skip
    for source, _, heads, times in e.PUBLISHED:
        if source == "mlx#4076":
            for (T, measured), rate in zip(times.items(), gbps[heads], strict=True):
                size = 2 * 2 * heads[1] * heads[2] * T
                assert measured == pytest.approx(size / rate / 1e3, rel=2e-3)


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

    def spilling(keys, parts):
        return e.replace(at(keys, parts), spilled=0.5, resident=12.0)

    spilled = e.Linear.fit(spilling, 1024, 2048, 2)(1000, 16, 5)
    assert (spilled.spilled, spilled.resident) == (500, 12)


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
