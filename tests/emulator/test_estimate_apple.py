"""The arithmetic of ``estimate_apple``; its counts are the emulator's."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_kvq.format.spec import Spec

from . import Counters, arithmetic
from .estimate_apple import figures, published
from .estimate_apple.chips import APART, M1, M3_ULTRA, REACHED, Chip
from .estimate_apple.counting import contracted, free_widening, work_of
from .estimate_apple.kvq_kernels import KvqKernels, calibrated, with_feedback
from .estimate_apple.linear import Linear
from .estimate_apple.mlx_attention import MlxAttention
from .estimate_apple.models import LAYER
from .estimate_apple.storing import MISSED, chain, feedback_seconds, prompt_seconds
from .estimate_apple.tables import dominating, span
from .estimate_apple.work import Registers, Work

CHIP = Chip("test", "g", cores=4, clock=1.0, bandwidth=100)
BYTES = 0.5 / REACHED  # seconds of 50e9 bytes


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
    work = Work(16e9, 1e9, 50e9, threadgroups, simd_groups)
    instructions, bytes_ = work.seconds(CHIP)
    # 16e9 cycles of SIMD groups, of which four cores start 16 a nanosecond.
    assert instructions == pytest.approx(1.0 * slower)
    assert bytes_ == pytest.approx(BYTES)
    # The pipeline for the rest works beside the others.
    assert Work(1e9, 16e9, 0, threadgroups, simd_groups).seconds(CHIP)[0] == instructions


def test_registers_leave_few_simd_groups_which_hide_no_loads():
    work = Work(16e9, 1e9, 50e9, 96, 8, spilled=2e9, resident=12)
    assert work.seconds(CHIP)[0] == 1.0 == work.best(CHIP)  # as if there were registers enough
    slower = 1.6 - 4 / 16 * 0.6  # between 8 and 24 of them
    instructions = 18 / 16 * slower
    assert work.seconds(CHIP, registers=True)[0] == pytest.approx(instructions)
    assert work.worst(CHIP) == pytest.approx(instructions + BYTES)
    enough = replace(work, resident=32.0, spilled=0.0)
    assert enough.worst(CHIP) == enough.best(CHIP) == 1.0
    few = replace(work, threadgroups=4)  # of 8 SIMD groups: fewer than registers would hold
    assert few.seconds(CHIP, registers=True)[0] == pytest.approx(18 / 16 * 1.6)


def test_what_is_read_from_caches():
    """64 bytes a cycle and core at best; 30 or 40 at worst, by the chip."""
    work = Work(1e9, 0, 1e9, 96, 8, cached=256e9)
    old = replace(CHIP, old=True)
    assert work.best(CHIP) == work.best(old) == 256e9 / (4 * 64e9)
    assert work.worst(CHIP) == 256e9 / (4 * 40e9)
    # On M1 and M2 reads are not hidden, however full a core is.
    assert work.worst(old) == pytest.approx(256e9 / (4 * 30e9) + 1e9 / 16e9)
    # A threadgroup alone reads for one core.
    assert replace(work, threadgroups=1).best(CHIP) == 4 * work.best(CHIP)


def test_an_ultra_may_reach_less_of_its_bandwidth():
    ultra, work = replace(CHIP, kind="d"), Work(1, 0, 50e9, 96, 8)
    assert work.worst(CHIP) == pytest.approx(BYTES) == work.best(ultra)
    assert work.worst(ultra) == pytest.approx(0.5 / APART)


def test_additions_to_products_are_one_instruction():
    c = Counters("k", threads=32, threadgroups=1)
    c.arithmetic = {"mul_f32": 64, "add_f32": 32, "compare_f32": 32}
    assert (work_of(c, 0).main, contracted(c, 0).main) == (4, 3)
    c.arithmetic["add_f32"] = 96  # more than there are products
    assert contracted(c, 0).main == 4


def test_the_chain_of_feedback():
    """One block is 8 channels; the errors of all groups but the first go on once more."""
    cycles, waits = chain(128, 64)
    assert waits == 16 + 8 and chain(128, 128)[1] == 16 and chain(256, 64)[1] == 32 + 24
    assert 2000 < cycles < 4000  # about 100 a block, and 300 a group
    one, two = chain(64, 64)[0], chain(64, 32)[0]
    assert one < two  # another scale, and blocks passed on
    best, worst = feedback_seconds(CHIP, 128, 64)
    assert best == cycles / 1e9 and worst == pytest.approx(best + 24 * MISSED)


def test_a_prompt_with_feedback_waits_for_its_chains():
    kernels = KvqKernels.__new__(KvqKernels)
    kernels.D, kernels.Hkv, kernels.fmt = 128, 2, calibrated(Spec.parse("int4-srft"), 2, 128)
    nothing = Work(1, 0, 1, 96, 8, resident=12.0)
    best, worst = prompt_seconds(kernels, nothing, CHIP, 2400)
    one = chain(128, 64)[0] / 1e9
    assert best == pytest.approx(4800 / 4 / 12 * one)  # four cores, 12 SIMD groups for keys
    assert worst == pytest.approx(4800 / 4 / 6 * (one + 24 * MISSED))
    busy = replace(nothing, main=16e12)
    assert prompt_seconds(kernels, busy, CHIP, 2400)[0] == busy.best(CHIP)


def test_layers_with_a_short_window_have_kernels_of_their_own(monkeypatch):
    monkeypatch.setattr(KvqKernels, "_attention_work", lambda *_: lambda *_: Work(1, 0, 1, 96, 8))
    monkeypatch.setattr(KvqKernels, "_combine_work", lambda *_: Work(1, 0, 1, 96, 8))
    kernels = KvqKernels(Spec.parse("int4-srft"), 4, 1, 256)
    assert kernels.within(None) is kernels.within(1024) is kernels
    short = kernels.within(512)
    assert short is kernels.within(512) and (short.fmt.layout.k_group, short.fmt.recent) == (32, 16)


def test_feedback_is_counted():
    fmt = calibrated(Spec.parse("int4-srft"), 2, 128)
    fed = with_feedback(fmt)
    assert not fmt.kind.feedback and fed.kind.feedback and fed.layout == fmt.layout


def test_layers_take_what_published_rates_leave():
    left = [
        (1 / rate - model.parameters * 4.5 / 8 / (chip.bandwidth * 1e9 * REACHED)) / model.layers
        for _, chip, model, rate in published.DECODING
    ]
    assert left == pytest.approx([row.left for row in published.DECODING])
    assert np.median(left) == pytest.approx(LAYER, rel=0.05)


def test_a_range():
    assert span(0.1834, 0.6571) == "0.183 to 0.657" and span(2, 2) == "2"
    assert span(99.9, 1234.5) == "99.9 to 1234" and span(6.32, 17.4, 2) == "6.3 to 17"


def test_registers_are_those_of_the_table():
    for kernel, D, variant in (
        ("attend_store", 128, "calibrated, tail, first"),
        ("attend_finish", 256, "calibrated, tail, first"),
        ("quantize_pack", 128, "calibrated, tail, L=512"),
        ("quantize_pack", 256, "calibrated, rotated, L=16"),
        ("keep_exact", 256, "calibrated, L=1"),
        ("combine", 256, "calibrated, tail, first"),
        ("dequantize", 128, "no tail"),
    ):
        registers = Registers.of(kernel, D, variant)
        assert 8 <= registers.resident <= 32 and registers.spills >= 0
    with pytest.raises(ValueError, match="has no attend_store, D = 72, 'tail'"):
        Registers.of("attend_store", 72, "tail")


def test_what_dominates():
    class Given:
        def attend(self, T):
            return [Work(16e9, 0, 1e9, 9600, 8, 0.0, 12.0)]

    said = dominating(Given(), 1000)
    assert said.startswith("What moves the estimate at 1000 tokens. M1: registers alone 1.45 times")
    assert "M4 Max" in said


def test_published_times_are_those_of_the_bandwidths():
    """GB/s of keys and values counted once, as the issue gives them."""
    gbps = {
        (32, 32, 128): (239, 282, 281), (32, 8, 128): (234, 263, 264),
        (32, 4, 128): (130, 184, 190), (64, 8, 64): (76, 113, 119),
    }  # fmt: skip
    for source, _, heads, times in published.ATTENTION:
        if source == "mlx#4076":
            for (T, measured), rate in zip(times.items(), gbps[heads], strict=True):
                size = 2 * 2 * heads[1] * heads[2] * T
                assert measured == pytest.approx(size / rate / 1e3, rel=2e-3)


def test_work_of_counters():
    c = Counters("k", threads=256, threadgroups=2)
    c.arithmetic = {"fma_f32": 640, "shift": 320, "sign": 999, "extend": 999}
    c.bytes_read, c.bytes_written = {"a": 192, "k_shape": 32, "N": 32}, {"o": 256}
    c.threadgroup_bytes_read = 128
    c.simd = {"simd_sum": 2, "simd_shuffle_xor": 4, "simdgroup_multiply_accumulate": 3}
    work = work_of(c, 7)
    memory = 512 / 8 / 32 + 128 / 4 / 32
    assert work.main == 20 + 10 + memory + 2 * 14.5 + 4 * 2 + 3 * 20
    assert (work.rest, work.bytes, work.threadgroups, work.simd_groups) == (40, 7, 2, 4)
    assert work.cached == 192  # sizes are not read from caches


def test_a_line_through_two_launches():
    def at(keys, parts):
        return Work(100 * parts + 3 * keys, 10 * parts + keys, 0, 4 * parts, 8)

    line = Linear.fit(at, 1024, 2048, 2)
    assert line(32768, 16, 5) == Work(1600 + 98304, 160 + 32768, 5, 64, 8)

    def spilling(keys, parts):
        return replace(at(keys, parts), spilled=0.5, resident=12.0)

    spilled = Linear.fit(spilling, 1024, 2048, 2)(1000, 16, 5)
    assert (spilled.spilled, spilled.resident) == (500, 12)

    def with_exact(keys, parts, exact):
        work = at(keys, parts)
        return replace(work, main=work.main + 7 * exact, cached=2.0 * keys + 50 * exact)

    line = Linear.fit(with_exact, 1024, 2048, 2, exact=(64, 256))
    found = line(32768, 16, 5, 260)
    assert found.main == pytest.approx(1600 + 98304 + 7 * 260)
    assert found.cached == pytest.approx(65536 + 50 * 260)


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
    attention = MlxAttention.__new__(MlxAttention)
    attention.Hq, attention.Hkv = heads
    assert attention.blocks(T, Chip("", kind, 1, 1, 1)) == expected


def test_widening_is_free_only_inside():
    line = "  %3 = fpext half %1 to float"
    before = arithmetic.classify(line)
    with free_widening():
        assert arithmetic.classify(line)[0] == "sign"
        assert arithmetic.classify("  %3 = sitofp i32 %1 to float")[0] == "convert"
    assert arithmetic.classify(line) == before == ("convert", 1)


def test_the_figures_of_scale_are_of_these_chips():
    path = Path(__file__).parents[2] / "docs" / "pictures" / "scale.json"
    data = json.loads(path.read_text())["apple"]
    for chip in (M1, M3_ULTRA):
        assert data[chip.name] | {"heads": {}} == figures.of_chip(chip)
        for rows in data[chip.name]["heads"].values():
            # Of attention fp16's and int4's, then instructions and bytes; of storing int4's.
            assert {len(x) for x in rows.values()} == {2, 6}
            assert all(x[0] <= x[1] and (len(x) == 2 or x[2] <= x[3]) for x in rows.values())
