"""What each kind of cache costs in quality: a bundled model on a novel it has not read."""

from pathlib import Path

import mlx.core as mx
from mlx_lm import load

import mlx_kvq

HERE = Path(__file__).parent
model, tokenizer = load(str(HERE / "models" / "tiny-qwen2-8bit"))
model.set_dtype(mx.float32)  # so that only the caches round
text = (HERE / "text" / "novel.txt").read_text(encoding="utf-8")

# The newest 64 tokens are exact by default; recent=0 shows what is packed. Eight tokens at a time
# read the cache as decoding does.
specs = ["kv4", "int4-srft:recent=0", "int4-srft:recent=4", "int4-srft"]
result = mlx_kvq.evaluate(model, tokenizer, specs, [text], windows=2, tokens=192, chunk=8)
print(result)

best = min(result.results[1:], key=lambda r: r.kl.mean)
print(f"\nNearest to the model's own cache: {best.name}, {best.bytes_per_token:.0f} bytes a token")
