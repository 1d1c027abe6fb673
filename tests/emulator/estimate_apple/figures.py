"""Estimates for scripts/scale.py, in docs/pictures/scale.json (``--json``)."""

import json
import re
from pathlib import Path

from mlx_kvq.format.spec import Spec

from .chips import M1, M3_ULTRA, Chip
from .kvq_kernels import KvqKernels
from .mlx_attention import MlxAttention
from .models import GEMMA_4B, LAYER, LLAMA_8B, QWEN_1_5B
from .storing import token_feedback
from .work import apart, estimate

FIGURES = "microseconds: fp16 best, worst; int4 best, worst, its instructions, its bytes"
CHIPS, MODELS = (M1, M3_ULTRA), (QWEN_1_5B, LLAMA_8B, GEMMA_4B)
BATCHES, CONTEXTS = (1, 4, 16, 64), (1024, 4096, 32768, 131072)


def of_chip(chip: Chip) -> dict:
    """Bytes and operations a second, seconds of a layer."""
    rates = {"bandwidth": round(chip.bytes_per_second), "flops": round(chip.flops)}
    return {**rates, "layer": LAYER, "heads": {}}


def estimates(spec: Spec) -> dict:
    """Attention and storing: by chip, heads, sequences and tokens."""
    machines: dict = {chip.name: of_chip(chip) for chip in CHIPS}
    for model in MODELS:
        mlx, kvq = MlxAttention(*model.heads), KvqKernels(spec, *model.heads)
        for chip in CHIPS:
            rows: dict = {}
            for B in BATCHES:
                for T in CONTEXTS:
                    fp16, int4 = mlx.attend(T, chip, B), kvq.attend(T, B)
                    times = (*estimate(fp16, chip), *estimate(int4, chip), *apart(int4, chip))
                    rows[f"{B} x {T}"] = times
                    rows[f"{B} x {T} stored"] = token_feedback(kvq, chip, T, B)
            of_heads = {k: [round(x, 1) for x in v] for k, v in rows.items()}
            machines[chip.name]["heads"]["/".join(map(str, model.heads))] = of_heads
    return {"figures": FIGURES, **machines}


def write(spec: Spec, path: Path) -> None:
    """Replaces the part of Apple's chips in a file."""
    data = json.loads(path.read_text())
    data["apple"] = estimates(spec)
    text = json.dumps(data, indent=1)
    flat = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", text)
    path.write_text(flat + "\n")
