"""--kv-cache on mlx-lm's command lines, as a shell sees it."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_kvq.caches.attention import DECODE_QUERIES
from mlx_kvq.plugin import programs
from mlx_kvq.stock import CacheFactory

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "examples" / "models"
BIN = Path(sys.executable).parent
QWEN = str(MODELS / "tiny-qwen2-8bit")
GEMMA = str(MODELS / "tiny-gemma3-8bit")
WAYS = {
    "mlx_lm.generate": [str(BIN / "mlx_lm.generate")],
    "mlx_lm generate": [str(BIN / "mlx_lm"), "generate"],
    "python -m mlx_lm generate": [sys.executable, "-m", "mlx_lm", "generate"],
    "python -m mlx_lm.generate": [sys.executable, "-W", "ignore", "-m", "mlx_lm.generate"],
}


def shell(*command, stderr=subprocess.PIPE, **env):
    kept = {
        k: v
        for k, v in os.environ.items()
        if k == "MLX_KVQ_CACHE" or not k.startswith(("PYTHON", "MLX_KVQ"))
    }
    return subprocess.run(
        [str(c) for c in command],
        env=kept | {"HF_HUB_OFFLINE": "1"} | env,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def generate(way, *options, model=QWEN, **env):
    return shell(*WAYS[way], "--model", model, "--prompt", "It was", "-m", 8, *options, **env)


def text(process):
    """What mlx-lm prints between its two lines of equals signs."""
    assert process.returncode == 0, process.stderr
    return process.stdout.split("==========")[1]


@pytest.fixture(scope="module")
def expected():
    """The text from the Python API."""
    from mlx_lm import generate, load

    import mlx_kvq

    model, tokenizer = load(QWEN)
    mlx_kvq.enable(model, "int4-srft:calibrate=off", verbose=False)
    return generate(model, tokenizer, "It was", max_tokens=8)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_type_it(way, expected):
    process = generate(way, "--kv-cache", "int4-srft:calibrate=off")
    assert text(process).strip() == expected.strip()
    lines = [line for line in process.stderr.splitlines() if "[mlx_kvq]" in line]
    assert lines == [
        "[mlx_kvq] int4-srft:calibrate=off: packed 4 of 4 layers, 4.25 bits per value, "
        "3.76x smaller than fp16, the newest 64 to 256 and the first 4 tokens exact, "
        "not calibrated",
        "[mlx_kvq] 10 tokens, most of them kept exactly: 0.06 MB, fp16 0.02 MB; less than fp16 "
        "from about 190 tokens on",
    ]


def test_the_line_at_the_end_is_the_last_where_both_go_into_one_file():
    process = generate(
        "mlx_lm.generate", "--kv-cache", "int4:calibrate=off", stderr=subprocess.STDOUT
    )
    *_, before, last = process.stdout.splitlines()
    assert before.startswith("Peak memory") and last.startswith("[mlx_kvq] 10 tokens")


def test_the_end_says_what_the_caches_hold():
    """In fp32 or bf16 alike: rows of 136 bytes and the exact tail, against 512 bytes of fp16."""
    options = ["--kv-cache", "int4:calibrate=off,recent=0,first=0", "--max-tokens", "40"]
    process = generate("mlx_lm.generate", *options, "--draft-model", QWEN)
    name, draft, end = process.stderr.splitlines()
    assert name.startswith(
        "[mlx_kvq] int4-srft:calibrate=off,recent=0,first=0: packed 4 of 4 layers"
    )
    assert draft == name.replace("int4", f"{QWEN}: int4", 1)
    # Two models of 4 layers, 41 tokens each.
    tokens, ours, fp16 = 41, 2 * 4 * 41 * 136, 2 * 4 * 41 * 512
    assert end == f"[mlx_kvq] {tokens} tokens: {ours / 1e6:.2f} MB, fp16 {fp16 / 1e6:.2f} MB"
    assert generate("mlx_lm.generate", *options, MLX_KVQ_QUIET="1").stderr == ""


@pytest.mark.parametrize("way", WAYS)
def test_help_lists_it(way):
    process = shell(*WAYS[way], "--help")
    assert "--kv-cache SPEC" in process.stdout


def test_it_can_be_taken_away():
    process = shell(*WAYS["mlx_lm.generate"], "--help", MLX_KVQ_DISABLE="1")
    assert process.returncode == 0 and "--kv-cache" not in process.stdout


def test_without_the_option_nothing_changes():
    process = generate("mlx_lm.generate")
    assert "[mlx_kvq]" not in process.stderr + process.stdout
    stock = generate("mlx_lm.generate", MLX_KVQ_DISABLE="1")
    assert text(process) == text(stock) == text(generate("mlx_lm.generate", "--kv-cache", "fp16"))


def test_with_max_kv_size():
    process = generate(
        "mlx_lm.generate", "--kv-cache=int4-srft:calibrate=off", "--max-kv-size", 8, model=GEMMA
    )
    assert text(process).strip()
    assert "packed 6 of 6 layers" in process.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        (["--kv-cache", "int6-srft"], "unknown cache 'int6-srft'. Did you mean 'int8-srft'?"),
        (["--kv-cache", "int4-srft:group=3"], "unknown option 'group'"),
        (["--kv-cache", "int4-srft", "--kv-bits", "4"], "--kv-cache and --kv-bits"),
        (["--kv-cache"], "expected one argument"),
    ],
)
def test_errors_come_before_the_model(options, message):
    process = generate("mlx_lm.generate", *options, model="no/such/model")
    assert process.returncode == 2
    assert message in process.stderr
    assert "Traceback" not in process.stderr


def test_a_model_that_cannot_be_packed_is_one_line():
    process = generate("mlx_lm.generate", "--kv-cache", "int4-srft:group_size=48")
    assert process.returncode == 1
    (line,) = [line for line in process.stderr.splitlines() if "group_size" in line]
    assert line.startswith("[mlx_kvq] error: int4-srft:group_size=48 cannot pack any layer")
    assert "possible: 8, 16, 32, 64, 128" in line
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("command", ["chat", "server", "cache_prompt", "benchmark", "perplexity"])
def test_other_commands_list_it(command):
    process = shell(BIN / f"mlx_lm.{command}", "--help")
    assert "--kv-cache SPEC" in process.stdout, process.stderr


def test_cache_prompt_then_generate(tmp_path):
    file = tmp_path / "cache.safetensors"
    made = shell(
        BIN / "mlx_lm.cache_prompt", "--model", QWEN, "--prompt", "It was a dark night",
        "--prompt-cache-file", file, "--kv-cache", "int4-srft:calibrate=off",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert any(a.dtype == mx.uint32 and a.ndim == 4 for a in mx.load(str(file)).values())
    assert text(generate("mlx_lm.generate", "--prompt-cache-file", file)).strip()
    refused = generate("mlx_lm.generate", "--prompt-cache-file", file, "--kv-bits", "4")
    assert refused.returncode == 1
    assert "[mlx_kvq] error: --kv-bits 4 is for mlx-lm's own cache" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_perplexity_reads_compressed_history():
    """It has no cache of its own, so the option must not be without effect."""
    seen = {}

    class Fake:
        def __init__(self):
            self.calls = []
            self.make_cache = CacheFactory(lambda max_kv_size: ["cache"])

        def __call__(self, tokens, cache=None):
            self.calls.append((tokens.shape, cache))
            return mx.zeros((*tokens.shape, 3))

    def eval_ppl(model, data):
        seen["logits"] = model(data).shape

    fake = Fake()
    wrapped = programs._through_the_cache(eval_ppl)
    wrapped(fake, mx.zeros((2, 20), mx.int32))
    assert programs.CHUNK == DECODE_QUERIES
    assert seen["logits"] == (2, 20, 3)
    assert fake.calls == [((2, 8), ["cache"]), ((2, 8), ["cache"]), ((2, 4), ["cache"])]
    del fake.make_cache  # as --kv-cache fp16 does
    wrapped(fake, mx.zeros((2, 300), mx.int32))
    assert fake.calls[-1] == ((2, 300), None)


LOADED = (
    "from mlx_lm import utils; from pathlib import Path\n"
    "from mlx_lm.models.cache import make_prompt_cache\n"
    "{how}\n"
    "print(*{{str(getattr(c, 'format', None) and c.format.spec) for c in make_prompt_cache(m)}})\n"
    "print(vars(m)['_mlx_kvq_loaded'].tokenizer is not None)\n"
)
HOW = {
    "load": f"m, t = utils.load({QWEN!r})",
    # As some servers do.
    "load_model": f"m, c = utils.load_model(Path({QWEN!r})); utils.load_tokenizer(Path({QWEN!r}))",
}


@pytest.mark.parametrize("how", HOW)
def test_the_variable_for_programs_without_the_option(how):
    code = [sys.executable, "-c", LOADED.format(how=HOW[how])]
    process = shell(*code, MLX_KVQ_SPEC="int4:calibrate=off")
    assert process.stdout.split() == ["int4-srft:calibrate=off", "True"], process.stderr
    assert process.stderr.startswith("[mlx_kvq] int4-srft:calibrate=off: packed 4 of 4 layers")
    process = shell(*code, MLX_KVQ_SPEC="int4:calibrate=off", MLX_KVQ_QUIET="1")
    assert process.stderr == ""
    assert shell(*code).stdout.split() == ["None", "True"]
    process = shell(*code, MLX_KVQ_SPEC="int6")
    assert "ValueError: MLX_KVQ_SPEC=int6: KV cache spec 'int6'" in process.stderr


def test_the_option_comes_before_the_variable():
    process = generate("mlx_lm.generate", "--kv-cache", "fp16", MLX_KVQ_SPEC="int4:calibrate=off")
    assert process.returncode == 0 and "packed" not in process.stderr
    process = generate("mlx_lm.generate", MLX_KVQ_SPEC="int4:calibrate=off")
    assert "[mlx_kvq] int4-srft:calibrate=off: packed 4 of 4 layers" in process.stderr
