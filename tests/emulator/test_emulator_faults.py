"""Every planted fault is caught, at its line; the same kernel without it runs."""

import pytest

from tests.emulator import KernelError
from tests.emulator.fault import Fault
from tests.emulator.faults import FAULTS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.what)
def test_planted_fault(fault):
    with pytest.raises(KernelError) as caught:
        fault.run()
    assert caught.value.kind in (fault.kind, fault.or_kind)
    if "// here" in fault.body + fault.header:
        assert "// here" in caught.value.text
        assert caught.value.text in str(caught.value)
        assert f"line {caught.value.line} " in str(caught.value)
    else:
        assert caught.value.line == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "fault", [f for f in FAULTS if "race" in f.kind or "divergence" in f.kind], ids=lambda f: f.what
)
def test_caught_in_every_order(fault, seed):
    with pytest.raises(KernelError) as caught:
        fault.run(seed=seed + 1)
    assert caught.value.kind in (fault.kind, fault.or_kind)


# What fast mode leaves out: races and unwritten memory. The rest it finds as well.
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.what)
def test_fast_mode(fault):
    if "race" in fault.kind or fault.kind == "read of unwritten memory":
        fault.run("fast")
        return
    with pytest.raises(KernelError) as caught:
        fault.run("fast")
    assert caught.value.kind in (fault.kind, fault.or_kind)


def test_unwritten_output_is_counted():
    counters = Fault("", "", "if (i != 5) o[i] = a[i];").run()
    assert counters.unwritten == {"o": 4}


def test_barrier_mends_the_race():
    body = """threadgroup float s[64];
  s[t] = a[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float x = s[63 - t];
  threadgroup_barrier(mem_flags::mem_none);
  threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
  s[t] = x + 1.0f;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  o[i] = s[t ^ 31];"""
    for seed in range(5):
        assert Fault("", "", body).run(seed=seed).barriers == 6
