"""Generate with the model's own cache and with packed ones, side by side."""

from pathlib import Path

from mlx_lm import load, stream_generate
from mlx_lm.models.cache import make_prompt_cache

import mlx_kvq

MODELS = Path(__file__).parent / "models"
PROMPT = "They walked along the river"

for name in ("tiny-qwen2-8bit", "tiny-gemma3-8bit"):
    model, tokenizer = load(str(MODELS / name))
    for spec in ("fp16", "int8-srft", "int4-srft"):
        mlx_kvq.enable(model, spec)
        cache = make_prompt_cache(model)
        steps = stream_generate(model, tokenizer, PROMPT, max_tokens=30, prompt_cache=cache)
        text = "".join(step.text for step in steps)
        print(f"{name} {spec} ({sum(c.nbytes for c in cache)} bytes): {text!r}")
