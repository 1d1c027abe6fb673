"""Kernels that Metal compiles for the bundled models: which, and each of them once."""

import mlx.core as mx
import pytest

from mlx_kvq import ops
from mlx_kvq.format.format import make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.model import trial
from mlx_kvq.ops import memo
from mlx_kvq.ops.gpu import attention
from tests.emulator import emulated
from tests.support import compiled

QWEN, GEMMA = "tiny-qwen2-8bit", "tiny-gemma3-8bit"
DECODE = ["quantize_pack", "keep_exact", "quantize_pack rotated"]
SPLIT = ["attend_store tail", "combine"]
BATCH = ["attend_store tail starts", "combine"]
SERVER = [*BATCH, "attend_finish tail starts", "restore chunk"]
MASK = ["attend_store tail mask"]  # a ring in a batch
EXPECTED = {
    (QWEN, "a short prompt"): [*DECODE, "attend_finish tail"],
    (QWEN, "a long prompt"): [*DECODE, *SPLIT, "restore chunk"],
    (QWEN, "a batch"): [*DECODE, *BATCH],
    (QWEN, "a server"): [*DECODE, *SERVER],
    (GEMMA, "a short prompt"): [*DECODE, "attend_finish tail"],
    (GEMMA, "a long prompt"): [*DECODE, *SPLIT, "restore chunk"],
    (GEMMA, "a batch"): [*DECODE, *BATCH, *MASK],
    (GEMMA, "a server"): [*DECODE, *SERVER, *MASK],
}


# What does not read or write rows, and what only layers with a window, or without, are read by.
ONCE = {"keep_exact", "combine", *MASK}


@pytest.mark.parametrize("name, situation", EXPECTED)
def test_what_is_compiled(name, situation):
    """At most seven of one kind of rows. Gemma's layers with a window have smaller groups: their
    kernels of rows are compiled besides."""
    found = compiled.kernels(name, compiled.SITUATIONS[situation])
    assert sorted(found) == sorted(EXPECTED[name, situation])
    rows = found.keys() - ONCE if name == GEMMA else set()
    if situation == "a batch":
        rows -= {"attend_store tail starts"}  # layers with a window have a mask there
    assert {label: len(sources) for label, sources in found.items()} == {
        label: 2 if label in rows else 1 for label in found
    }


def test_asked_for_groups_there_is_one_kind_of_rows():
    work = compiled.SITUATIONS["a short prompt"]
    found = compiled.kernels(GEMMA, work, "int4-srft:group_size=64")
    assert sorted(found) == sorted(EXPECTED[GEMMA, "a short prompt"])
    assert {len(sources) for sources in found.values()} == {1}


def test_small_arrays_would_compile_a_kernel_twice(monkeypatch):
    """What the list would show of a batch that grows beyond seven sequences."""
    monkeypatch.setattr(attention, "not_small", lambda x: x)
    found = compiled.kernels(QWEN, compiled.SITUATIONS["a server"])
    twice = [label for label, sources in found.items() if len(sources) > 1]
    assert twice == ["attend_store tail starts"]


def test_combine_is_compiled_once_with_a_tail_and_without():
    """Rows of a cache with an exact tail, and of one without, are joined by the same kernel."""
    fmt = make_format(Spec.parse("int4-srft"), 64)
    k, q = mx.random.normal((1, 2, 300, 64)), mx.random.normal((1, 4, 1, 64))
    with compiled.compiling() as found:
        rows, tail = ops.quantize_pack(k, k, fmt, None, fmt.recent_at(300))
        for end in (tail, None):
            mx.eval(ops.attend(q, ops.Packed(rows, 300, fmt, end), 0.1))
    assert {label: len(sources) for label, sources in found.items()} == {
        "quantize_pack": 1, "attend_store tail": 1, "attend_store": 1, "combine": 1,
    }  # fmt: skip


def test_a_models_trial_compiles_nothing():
    """It fails as it does with kernels, and what was made before is there afterwards."""
    fmt = make_format(Spec.parse("int4-srft"), 64)
    k = mx.zeros((1, 2, 3, 64))

    class Fails:
        def __call__(self, tokens, cache):
            mx.eval(ops.quantize_pack(k, k, fmt)[0])
            assert ops.backend(fmt) is ops.plain
            raise KeyError(tokens.size)

    with emulated() as e:
        mx.eval(ops.quantize_pack(k, k, fmt)[0])
        before, launched = dict(memo.launches), len(e.counters)
        failed = trial.first_failure(Fails(), [])
        assert failed is not None and isinstance(failed[1], KeyError)
        assert ops.backend(fmt) is not ops.plain
        assert memo.launches == before and len(e.counters) == launched
        mx.eval(ops.quantize_pack(k, k, fmt)[0])
        assert len(e.counters) == launched + 1
