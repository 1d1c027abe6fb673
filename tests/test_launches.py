"""Kernels of a decode step on Metal, counted in the traced graph."""

import pytest

from scripts import count_launches as count

MODELS = list(count.MODELS)
QWEN, GEMMA, SLIDING = MODELS


@pytest.mark.parametrize("title", MODELS)
@pytest.mark.parametrize("T", [200, 600, 5000])
def test_a_layer_stores_with_two_kernels(title, T):
    counts = count.per_layer(count.MODELS[title], "int4-srft", T)
    assert counts["quantize_pack"] == counts["SliceUpdate"] == 1
    attention = {k: counts[k] for k in count.OURS - {"quantize_pack"} if counts[k]}
    assert attention in ({"attend_finish": 1}, {"attend_store": 1, "combine": 1})


@pytest.mark.parametrize("title", MODELS)
def test_nothing_else_changes(title):
    """All that a packed cache adds to a layer is its own kernels."""
    own, packed = (count.per_layer(count.MODELS[title], n, 600) for n in ("fp16", "int4-srft"))
    for name in own | packed:
        if name not in count.STORING:
            assert own[name] == packed[name], name


# What is not here: between one split's worth of keys (512, or 256 at D = 256) and the length from
# which MLX splits as well, int4 takes one kernel more (docs/performance.md).
@pytest.mark.parametrize(
    "title, T, chip",
    [(t, 200, c) for t in MODELS for c in count.CHIPS]
    + [(QWEN, 500, "g"), (QWEN, 2000, "s"), (GEMMA, 2000, "s")]
    + [(t, 5000, c) for t in (QWEN, GEMMA) for c in count.CHIPS],
)
def test_no_more_kernels_than_fp16(title, T, chip):
    build = count.MODELS[title]
    own, packed = (count.per_layer(build, n, T, chip) for n in ("fp16", "int4-srft"))
    assert count.storing(packed) <= count.storing(own)


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
