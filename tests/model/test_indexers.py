"""Layers that read the cache of an indexer, in part in longer prompts only than enable tries."""

import mlx.core as mx
import pytest
from mlx_lm.models import cache as stock

import mlx_kvq
from tests.support.families import build


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
def test_the_cache_of_an_indexer_is_not_packed_alone(name):
    """The latent cache of 16 values has no groups of 32, the indexer's of 32 has; what reads that
    runs in prompts longer than index_topk alone."""
    model = build(name)
    for size in (16, 32):
        with pytest.raises(ValueError, match="cannot pack any layer of this model"):
            mlx_kvq.enable(model, f"int4-none:group_size={size},calibrate=off")
    assert "Packed" not in str(stock.make_prompt_cache(model))


def test_sparse_layers_are_no_latent_ones():
    """MiniMax M3: dense layers are packed, sparse ones left, and not called MLA."""
    from mlx_lm.models import minimax_m3_vl

    config = {
        "hidden_size": 64, "intermediate_size": 32, "dense_intermediate_size": 64,
        "shared_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 4, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 32,
        "vocab_size": 100, "index_n_heads": 2, "index_head_dim": 32, "index_block_size": 4,
        "index_topk_blocks": 2, "moe_layer_freq": [0, 0, 1, 1],
        "layer_types": ["full_attention"] * 2 + ["sparse_attention"] * 2,
    }  # fmt: skip
    args = {"model_type": "minimax_m3_vl", "text_config": config}
    model = minimax_m3_vl.Model(minimax_m3_vl.ModelArgs.from_dict(args))
    report = mlx_kvq.enable(model, "int4-srft", verbose=False)
    assert sorted(report.packed) == [0, 1]
    assert set(report.left) == {2, 3}
    assert all("sparse attention" in reason for reason in report.left.values())
    caches = stock.make_prompt_cache(model)
    for tokens in (mx.arange(40)[None] % 7, mx.array([[1]])):  # past the blocks that are read
        assert mx.isfinite(model(tokens, cache=caches)).all()
