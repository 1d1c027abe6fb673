"""One long conversation in bounded memory: int4 together with max_kv_size."""

from pathlib import Path

from mlx_lm import load, stream_generate

import mlx_kvq

HERE = Path(__file__).parent
model, tokenizer = load(str(HERE / "models" / "tiny-qwen2-8bit"))
prompt = (HERE / "models" / "README.md").read_text(encoding="utf-8")

cache = mlx_kvq.make_prompt_cache(model, "int4-srft", max_kv_size=256)
for step in stream_generate(model, tokenizer, prompt, max_tokens=20, prompt_cache=cache):
    print(step.text, end="", flush=True)
print(f"\n{cache[0].offset} tokens seen, {cache[0].size()} kept in {cache[0].nbytes} bytes a layer")
