"""How a context is shared out over threadgroups of attention."""

import pytest

from mlx_kvq.format.format import make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.ops.gpu.tuning import TUNING, attend_shape, splits

CUDA, GROUPS, KEYS = TUNING["cuda"], 8, 32
PROCESSORS = CUDA.threadgroups // 2
TOKENS = [300, 1024, 1025, 4096, 4097, 32768, 131072, 1 << 20]
PARALLEL = [1, 2, 8, 16, 32, 64, 128, 132, 133, 256, 300]


def of(tokens, parallel, keys=KEYS, exact=True):
    return splits(CUDA, GROUPS, keys, tokens, parallel, exact=exact)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("parallel", PARALLEL)
@pytest.mark.parametrize("exact", [False, True])
def test_every_split_has_a_tile_and_a_place(tokens, parallel, exact):
    parts = of(tokens, parallel, exact=exact)
    assert 1 <= parts <= max(1, CUDA.threadgroups // parallel)
    tiles = -(-tokens // KEYS)
    assert (parts - 1) * -(-tiles // parts) < tiles or parts == of(tokens, parallel, exact=False)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("parallel", PARALLEL)
def test_one_threadgroup_to_a_processor_while_its_share_is_short(tokens, parallel):
    parts = of(tokens, parallel)
    if parallel <= PROCESSORS and tokens <= PROCESSORS // parallel * CUDA.alone:
        assert parts * parallel <= PROCESSORS
    elif parallel <= CUDA.threadgroups // 2:
        assert parts == min(CUDA.most, CUDA.threadgroups // parallel)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("parallel", PARALLEL)
def test_exact_tokens_find_a_simd_group_with_fewer_tiles(tokens, parallel):
    """On CUDA, where there is room for the splits that it takes, or few tiles."""
    tiles = -(-tokens // KEYS)
    plain, parts = of(tokens, parallel, exact=False), of(tokens, parallel)
    before, share = -(-tiles // plain), -(-tiles // parts)
    if plain == 1 or before == 1 or before % GROUPS:
        assert parts == plain
    elif parts > plain:
        assert share == before - 1
    elif parts < plain:
        assert before <= 2 * GROUPS and before < share < before + GROUPS
    else:
        more = -(-tiles // (before - 1)) * parallel
        room = PROCESSORS if plain * parallel <= PROCESSORS else CUDA.threadgroups
        assert more > room and (before > 2 * GROUPS or plain < 4)
    metal = TUNING["metal"]
    assert splits(metal, 8, 16, tokens, parallel) == splits(metal, 8, 16, tokens, parallel, 0, True)


def test_splits_that_were_measured():
    assert [of(4096, n) for n in (1, 2, 8)] == [19, 19, 11]
    assert [of(32768, n) for n in (1, 2, 8, 32, 64, 128, 256)] == [34, 34, 16, 4, 4, 2, 1]
    assert [of(8192, n) for n in (16, 32, 64, 128, 256)] == [8, 4, 2, 1, 1]
    assert [of(1024, n) for n in (16, 32, 64, 128)] == [8, 3, 1, 1]


@pytest.mark.parametrize(
    "spec, D, parallel, shape",
    [
        ("int4", 64, 1, (8, 64, 2)), ("int4", 64, 256, (8, 64, 2)), ("int8", 64, 1, (8, 32, 2)),
        ("int3", 64, 1, (8, 16, 1)), ("int4", 80, 1, (8, 32, 2)), ("int4", 128, 256, (8, 32, 2)),
        ("int4", 256, 16, (8, 16, 2)), ("int4", 256, 32, (4, 32, 2)),
    ],
)  # fmt: skip
def test_tiles_on_cuda(spec, D, parallel, shape):
    lay = make_format(Spec.parse(spec), D).layout
    assert attend_shape(lay, CUDA.when(parallel, lay)) == shape


def test_narrow_rows_share_a_processor():
    """They are read through registers, with nothing on its way meanwhile (H200: 7 to 20 % slower
    with one threadgroup to a processor); at D = 256 that fits in no other way."""
    for D, alone in ((64, 0), (128, 0), (256, CUDA.alone)):
        lay = make_format(Spec.parse("int3"), D).layout
        assert CUDA.when(1, lay).alone == alone
