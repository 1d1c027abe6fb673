"""How a context is shared out over threadgroups of attention."""

import pytest

from mlx_kvq.ops.gpu.tuning import TUNING, splits


@pytest.mark.parametrize("tokens", [300, 4096, 4097, 32768, 131072])
@pytest.mark.parametrize("parallel", [1, 2, 8, 32, 256])
def test_exact_tokens_find_a_simd_group_with_fewer_tiles(tokens, parallel):
    """On CUDA, where there is room for the splits that it takes: one threadgroup to a processor, or
    two where there were more before."""
    cuda, groups, keys = TUNING["cuda"], 8, 32
    tiles = -(-tokens // keys)
    plain = splits(cuda, groups, keys, tokens, parallel)
    parts = splits(cuda, groups, keys, tokens, parallel, exact=True)
    even = plain > 1 and -(-tiles // plain) % groups == 0
    if parts == plain:
        more = -(-tiles // max(1, -(-tiles // plain) - 1)) * parallel
        assert not even or more > cuda.threadgroups // (
            2 if plain * parallel <= cuda.threadgroups // 2 else 1
        )
    else:
        assert even and plain < parts <= plain + max(3, plain // 7)
        assert -(-tiles // parts) == -(-tiles // plain) - 1
        assert parts * parallel <= cuda.threadgroups
    metal = TUNING["metal"]
    assert splits(metal, 8, 16, tokens, parallel) == splits(metal, 8, 16, tokens, parallel, 0, True)


def test_splits_of_a_short_context():
    assert [splits(TUNING["cuda"], 8, 32, 4096, n, exact=True) for n in (1, 2, 8)] == [19, 19, 16]
