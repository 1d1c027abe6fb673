"""The bundled models in fp32. Half precision is emulated on CPU, hence slow. In fp32 a token gets
the same result alone, in a chunk and in a batch, but for the last bits where a batch is padded."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
from mlx_lm import load

MODELS = Path(__file__).resolve().parents[2] / "examples" / "models"
NAMES = ("tiny-qwen2-8bit", "tiny-gemma3-8bit")
TEXT = (
    "It was a dark night, and the old man stood at the door of the house. He had not seen his "
    "brother for many years, and now that the letter had come he did not know what to say. The "
    "wind was high; the sea beat upon the rocks, and the boat had not returned. 'You will stay "
    "with us,' said the lady, 'until the morning, and then my son shall go with you to the town.' "
    "There was a long silence in the room, and at last she turned to the window and looked out. "
)


WINDOW = 64  # of tiny-gemma3's sliding layers, where a test goes past it


def load_float32(name: str, window: int | None = None):
    """(model, tokenizer) with fp32 activations; ``window`` in place of the sliding layers' 256."""
    model, tokenizer = load(str(MODELS / name))
    model.set_dtype(mx.float32)
    if window is not None and hasattr(model.args, "sliding_window"):
        model.args.sliding_window = model.model.window_size = window
    return model, tokenizer


def write_float32(name: str, folder: Path) -> Path:
    """A model repository like the bundled one, in fp32."""
    folder = folder / name
    shutil.copytree(MODELS / name, folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        index.unlink()
    weights = mx.load(str(MODELS / name / "model.safetensors"))
    wide = {
        k: w.astype(mx.float32) if mx.issubdtype(w.dtype, mx.floating) else w
        for k, w in weights.items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), wide, {"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def prompts(tokenizer, lengths) -> list[list[int]]:
    """A prompt of each length in tokens, all different."""
    ids = tokenizer.encode(TEXT * 8)
    return [ids[7 * i : 7 * i + n] for i, n in enumerate(lengths)]
