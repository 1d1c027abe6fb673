"""Several prompts at once on packed caches, and a second turn that goes on from them."""

from pathlib import Path

from mlx_lm import batch_generate, load

import mlx_kvq

model, tokenizer = load(str(Path(__file__).parent / "models" / "tiny-qwen2-8bit"))
mlx_kvq.enable(model, "int4-srft", tokenizer=tokenizer)

prompts = [
    "They walked along the river",
    "The letter",
    "She turned to the window and said",
]
first = batch_generate(
    model,
    tokenizer,
    [tokenizer.encode(p) for p in prompts],
    max_tokens=20,
    return_prompt_caches=True,
)
more = [tokenizer.encode(" And then")] * len(prompts)
second = batch_generate(model, tokenizer, more, prompt_caches=first.caches, max_tokens=20)

for prompt, cache, *texts in zip(prompts, first.caches, first.texts, second.texts, strict=True):
    print(f"{prompt!r} ({cache[0].size()} tokens, {sum(c.nbytes for c in cache)} bytes)")
    print("   ", repr(texts[0]), "And then", repr(texts[1]))
