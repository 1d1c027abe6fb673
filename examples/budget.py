"""Fewer bits where a model minds least. One pass over text, forward and back, says where.

python examples/budget.py
"""

from pathlib import Path

from mlx_lm import load

import mlx_kvq

model, tokenizer = load(str(Path(__file__).parent / "models" / "tiny-qwen2-8bit"))
for spec in ("int4", "int3:budget=3.5"):
    report = mlx_kvq.enable(model, spec, tokenizer=tokenizer, verbose=False)
    kinds = {layer: fmt.spec.bits for layer, fmt in report.packed.items()}
    print(f"{spec}: {report.bits_per_value:.2f} bits per value, {kinds}")
