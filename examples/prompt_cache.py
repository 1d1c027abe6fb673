"""Read a long prompt once, keep it packed on disk, go on from the file."""

import tempfile
from pathlib import Path

import mlx.core as mx
from mlx_lm import generate, load
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache

import mlx_kvq
from mlx_kvq.caches.prompt_file import check
from mlx_kvq.model.pack import pack

HERE = Path(__file__).parent
model, tokenizer = load(str(HERE / "models" / "tiny-qwen2-8bit"))
prompt = tokenizer.encode((HERE / "models" / "README.md").read_text(encoding="utf-8"))

own = make_prompt_cache(model)
model(mx.array([prompt]), cache=own)
packed = pack(own, model, "int4-srft", tokenizer=tokenizer)  # as 'mlx_kvq pack-cache' does

with tempfile.TemporaryDirectory() as folder:
    for name, cache in (("own", own), ("packed", packed)):
        save_prompt_cache(f"{folder}/{name}.safetensors", cache)
        print(name, Path(folder, f"{name}.safetensors").stat().st_size, "bytes")
    mlx_kvq.enable(model, "int4-srft", tokenizer=tokenizer)
    cache = load_prompt_cache(f"{folder}/packed.safetensors")  # a damaged file is a ValueError
    check(cache, model)  # so is one of another model, spec or calibration
    print(generate(model, tokenizer, "\n", prompt_cache=cache, max_tokens=20))
