"""A conversation that reads only what is new, also after a restart."""

import tempfile
from pathlib import Path

from mlx_lm import load

import mlx_kvq

HERE = Path(__file__).parent
model, tokenizer = load(str(HERE / "models" / "tiny-qwen2-8bit"))
mlx_kvq.enable(model, "int4-srft", tokenizer=tokenizer)
talk = tokenizer.encode((HERE / "text" / "novel.txt").read_text(encoding="utf-8"))[:600]

with tempfile.TemporaryDirectory() as folder:  # such as "~/.cache/my-prompts"
    for turn in range(4):
        # Each turn as after a restart: the caches of earlier ones come from the folder.
        prefixes = mlx_kvq.PrefixCache(model, folder=folder)
        answer = list(prefixes.stream_generate(tokenizer, talk, max_tokens=12))
        print(f"turn {turn}: {len(talk)} tokens, {answer[0].prompt_tokens} of them read:", end=" ")
        print(repr("".join(r.text for r in answer)))
        talk += [r.token for r in answer] + tokenizer.encode(" And then?")
