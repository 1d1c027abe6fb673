"""Calibrate a model on your own text, once, and use the result.

python examples/calibrate.py --model examples/models/tiny-qwen2-8bit --text my-text.txt
"""

import argparse
from pathlib import Path

from mlx_lm import generate, load

import mlx_kvq

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", default="examples/models/tiny-qwen2-8bit")
parser.add_argument("--text", help="A text file; without one the built-in sample text.")
parser.add_argument("--calibration", default="calibration.safetensors")
parser.add_argument("--prompt", default="They walked along the river")
args = parser.parse_args()

model, tokenizer = load(args.model)
if not Path(args.calibration).exists():
    text = None if args.text is None else Path(args.text).read_text(encoding="utf-8")
    mlx_kvq.calibrate(model, tokenizer, text).save(args.calibration)
mlx_kvq.enable(model, "int4-srft:group_size=64", calibration=args.calibration)
print(generate(model, tokenizer, args.prompt, max_tokens=60))
