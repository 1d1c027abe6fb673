"""The bundled models generate through the Metal path: real launch code, kernels in the emulator."""

from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm import load, stream_generate

import mlx_kvq
from tests.emulator import emulated

# Prompts that lead to no near tie between two tokens (0.12 nats and more for Qwen2), which the
# kernels' fp16 operands would decide one way and the fp32 reference another: these models are
# unsure of much.
PROMPTS = {
    "tiny-qwen2-8bit": (
        'It is fifteen years since we--since I--came last from France." "Indeed, sir? '
    ),
    "tiny-gemma3-8bit": "My dear sir, I have the honour",
}
MODELS = Path(__file__).resolve().parents[2] / "examples" / "models"


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize(
    "spec", ["int4-srft:calibrate=off", "k8v4-srft:group_size=64,calibrate=off"]
)
def test_twenty_tokens_as_the_reference_backend(name, spec):
    model, tokenizer = load(str(MODELS / name))
    model.set_dtype(mx.float32)
    prompt = tokenizer.encode(3 * PROMPTS[name])

    def tokens():
        cache = mlx_kvq.make_prompt_cache(model, spec)
        steps = stream_generate(
            model, tokenizer, prompt, max_tokens=20, prompt_cache=cache, prefill_step_size=32
        )
        return [step.token for step in steps]

    expected = tokens()
    with emulated("checked") as e:
        got = tokens()
    launched = {c.kernel for c in e.counters}
    assert len(launched) >= 2, launched
    assert got == expected
