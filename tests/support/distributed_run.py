"""One rank of ``tests/model/test_distributed.py``, run by ``mlx.launch``, or the whole model alone.

python tests/support/distributed_run.py <single|tensor|pipeline> <folder> <calibration>…

A calibration is a file, "off", or "auto".
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.models.cache import make_prompt_cache

import mlx_kvq
from mlx_kvq.calibration import automatic
from tests.support.float32 import load_float32, prompts


def two_heads():
    """tiny-qwen2, whose one KV head becomes two that do the same, so that two ranks share them."""
    model, tokenizer = load_float32("tiny-qwen2-8bit")
    model.args.num_key_value_heads = 2
    for layer in model.layers:
        attention = layer.self_attn
        attention.n_kv_heads = 2
        for part in (attention.k_proj, attention.v_proj):
            for name in part.parameters():
                setattr(part, name, mx.concatenate([part[name]] * 2))
    mx.eval(model.parameters())
    return model, tokenizer


def main(mode: str, folder: str, *calibrations: str) -> None:
    automatic.SAMPLE_TOKENS = 128  # less to wait for
    model, tokenizer = two_heads()
    rank = 0
    if mode != "single":
        group = mx.distributed.init(backend="ring", strict=True)
        rank = group.rank()
        _ = model.shard(group) if mode == "tensor" else model.model.pipeline(group)
        mx.eval(model.parameters())
    for i, calibration in enumerate(calibrations):
        spec = "int4-srft:calibrate=off" if calibration == "off" else "int4-srft"
        given = calibration if Path(calibration).is_file() else None
        mlx_kvq.enable(model, spec, calibration=given)
        cache = make_prompt_cache(model)
        (prompt,) = prompts(tokenizer, [40])
        steps = stream_generate(model, tokenizer, prompt, max_tokens=24, prompt_cache=cache)
        tokens = [step.token for step in steps]
        first = getattr(model.model, "start_idx", 0)
        rows = {f"{first + j}": c.rows[..., : c.offset, :] for j, c in enumerate(cache)}
        path = Path(folder) / f"{mode}-{rank}-{i}"
        mx.save_safetensors(str(path), rows)
        path.with_suffix(".json").write_text(json.dumps(tokens))


if __name__ == "__main__":
    main(*sys.argv[1:])
