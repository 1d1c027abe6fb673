"""Give a model repository a calibrated cache of its own: who loads it needs no option.

A copy of a bundled model gets one here. To convert and upload from a shell:
mlx_kvq convert --hf-path Qwen/Qwen2.5-1.5B-Instruct -q --kv-cache int4-srft --upload-repo YOU/NAME
"""

import shutil
import tempfile
from pathlib import Path

from mlx_lm import generate, load

import mlx_kvq

HERE = Path(__file__).parent
text = (HERE / "text" / "novel.txt").read_text(encoding="utf-8")

with tempfile.TemporaryDirectory() as folder:
    repository = Path(folder) / "tiny-qwen2-8bit-kvq"
    shutil.copytree(HERE / "models" / "tiny-qwen2-8bit", repository)
    mlx_kvq.convert(
        mlx_path=repository,
        kv_cache="int4-srft:group_size=64",
        calibration_text=text[:3000],
        evaluate_on={"novel.txt": text[-2400:]},
    )
    print((repository / "README.md").read_text(encoding="utf-8"))

    model, tokenizer = load(str(repository))  # says on stderr which cache it found
    print(generate(model, tokenizer, "They walked along the river", max_tokens=40))
