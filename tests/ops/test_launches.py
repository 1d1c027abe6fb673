"""Kernels of a decode step on Metal, counted in the traced graph."""

from collections import Counter

import pytest

from tests.support import launches as count

MODELS = list(count.MODELS)
QWEN, GEMMA, SLIDING = MODELS


@pytest.mark.parametrize("title", MODELS)
@pytest.mark.parametrize("T", [200, 600, 5000])
@pytest.mark.parametrize("spec, packed", [("int4-srft", 0), ("int4-srft:recent=0,first=0", 1)])
def test_a_layer_stores_with_one_kernel(title, T, spec, packed):
    """With an exact tail, tokens are packed and written together, 64 at most."""
    counts = count.per_layer(count.MODELS[title], spec, T)
    assert (counts["quantize_pack"], counts["SliceUpdate"]) == (packed, packed)
    assert counts["keep_exact"] == 1 - packed
    attention = {k: counts[k] for k in count.OURS - {"quantize_pack", "keep_exact"} if counts[k]}
    assert attention in ({"attend_finish": 1}, {"attend_store": 1, "combine": 1})


@pytest.mark.parametrize("title", MODELS)
def test_nothing_else_changes(title):
    """All that a packed cache adds to a layer is its own kernels."""
    own, packed = (count.per_layer(count.MODELS[title], n, 600) for n in ("fp16", "int4-srft"))
    for name in own | packed:
        if name not in count.STORING:
            assert own[name] == packed[name], name


@pytest.mark.parametrize("title", MODELS)
@pytest.mark.parametrize("T", [100, 600])
def test_a_replayed_step_runs_the_same_kernels(title, T, monkeypatch):
    """One split, and several, of which Metal merges the sums by a launch of its own."""
    called = count.traced(count.MODELS[title], 2, "int4-srft", T, 1)
    monkeypatch.setenv("MLX_KVQ_REPLAY", "1")
    replayed = count.traced.__wrapped__(count.MODELS[title], 2, "int4-srft", T, 1)
    given, found = (
        [(x["name"], x["arguments"], [s for _, s, _ in x["inputs"]]) for x in graph
         if x["type"] == "primitive" and x["name"] == "CustomKernel"]
        for graph in (called, replayed)
    )  # fmt: skip
    assert given == found and any("kvq_attend" in name for _, (name, *_), _ in found)


def kernels(title: str, T: int, chip: str) -> tuple[int, int]:
    """Of storing and attention in a layer, with int4 and with fp16."""
    build = count.MODELS[title]
    int4, fp16 = (count.storing(count.per_layer(build, n, T, chip)) for n in ("int4-srft", "fp16"))
    return int4, fp16


@pytest.mark.parametrize("chip", count.CHIPS)
@pytest.mark.parametrize("title", MODELS)
@pytest.mark.parametrize("T", [100, 500, 2000, 5000])
def test_no_more_kernels_than_fp16(title, T, chip):
    int4, fp16 = kernels(title, T, chip)
    assert int4 <= fp16


@pytest.mark.parametrize("title", MODELS)
@pytest.mark.parametrize("T, L, blocks", [(512, 256, 1), (512, 1024, 2), (1000, 600, 3)])
def test_a_chunk_of_a_prompt(title, T, L, blocks):
    """Quantize-pack with room for more and its rows after those before; for each block that it is
    in, what is before the block out of the rotation, and attention."""
    int4, fp16 = (count.per_layer(count.MODELS[title], n, T, L=L) for n in ("int4-srft", "fp16"))
    assert (int4["quantize_pack"], int4["SliceUpdate"]) == (1, 0)
    assert int4["restore"] == int4["sdpa"] == blocks
    # For each block after the first besides, at most two casts and a copy of its part of a mask.
    assert int4.total() < fp16.total() + 5 * (blocks - 1)


def test_a_chunk_of_many_blocks_is_not_sliced_block_by_block():
    """Each node costs the host microseconds, one that runs no kernel as well."""

    def views(layers: int, L: int) -> Counter:
        graph = count.traced(count.MODELS[QWEN], layers, "int4-srft", 512, L)
        names = (node["name"] for node in graph if node["type"] == "primitive")
        return Counter(name for name in names if name in count.VIEWS)

    two, four = (views(3, L) - views(2, L) for L in (1024, 2048))
    assert two == four
    assert (four["Split"], four["Depends"]) == (3, 1)


def test_what_mlx_lm_quantized_takes():
    counts = count.per_layer(count.MODELS[QWEN], "kv4", 600)
    assert (counts["quantize"], counts["SliceUpdate"], counts["QuantizedMatmul"]) == (2, 6, 2)


@pytest.mark.parametrize(
    "queries, keys, chip, expected",
    [
        ((1, 12, 1, 128), (1, 2, 1023, 128), "s", 1),
        ((1, 12, 1, 128), (1, 2, 1024, 128), "s", 2),
        ((1, 12, 1, 128), (1, 2, 4095, 128), "g", 1),
        ((1, 12, 1, 128), (1, 2, 4096, 128), "g", 2),
        ((1, 2, 1, 128), (1, 2, 9999, 128), "g", 1),
    ],
)
def test_when_mlx_splits(queries, keys, chip, expected):
    assert count.sdpa_kernels(queries, keys, chip) == expected
