"""mlx-vlm's own caches, attention and generator, on tiny models with random weights. Skipped where
mlx-vlm is not installed: it is no dependency, not even of the tests."""

import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

import mlx_kvq
from mlx_kvq.caches import attention as ours

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
from mlx_vlm.generate import PromptCacheState  # noqa: E402
from mlx_vlm.generate.ar import BatchGenerator, generate_step  # noqa: E402
from mlx_vlm.models import cache as own  # noqa: E402

INT4, INT8 = "int4-srft:calibrate=off", "int8-srft:calibrate=off"
IMAGE, START = 299, 297
TOKENS = 12


def gemma3():
    """Sliding layers of 24 tokens, and images of 4 tokens."""
    from mlx_vlm.models.gemma3 import Model, ModelConfig, TextConfig, VisionConfig

    text = TextConfig(
        model_type="gemma3_text", hidden_size=64, num_hidden_layers=4, intermediate_size=128,
        num_attention_heads=4, head_dim=32, vocab_size=300, num_key_value_heads=2,
        query_pre_attn_scalar=32, sliding_window=24, mm_tokens_per_image=4,
        sliding_window_pattern=2,
    )  # fmt: skip
    vision = VisionConfig(
        model_type="siglip_vision_model", num_hidden_layers=1, hidden_size=32,
        intermediate_size=64, num_attention_heads=2, patch_size=8, image_size=32,
    )  # fmt: skip
    config = ModelConfig(
        text_config=text, vision_config=vision, model_type="gemma3", vocab_size=300,
        image_token_index=IMAGE, hidden_size=64,
    )  # fmt: skip
    return Model(config)


def qwen2_vl():
    """Without a ``make_cache``; positions in three dimensions."""
    from mlx_vlm.models.qwen2_vl import Model, ModelConfig, TextConfig, VisionConfig

    text = TextConfig(
        model_type="qwen2_vl", hidden_size=128, num_hidden_layers=2, intermediate_size=128,
        num_attention_heads=4, rms_norm_eps=1e-6, vocab_size=300, num_key_value_heads=2,
        rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6]},
    )  # fmt: skip
    vision = VisionConfig(
        depth=1, embed_dim=32, hidden_size=128, num_heads=2, image_size=56, patch_size=14
    )
    config = ModelConfig(
        text_config=text, vision_config=vision, model_type="qwen2_vl", image_token_id=IMAGE,
        video_token_id=298, vision_start_token_id=START, vocab_size=300,
    )  # fmt: skip
    return Model(config)


@pytest.fixture(scope="module", params=[gemma3, qwen2_vl], ids=["gemma3", "qwen2_vl"])
def model(request):
    mx.random.seed(0)
    made = request.param()
    mx.eval(made.parameters())
    return made


@pytest.fixture(autouse=True)
def _own_again(request):
    yield
    if "model" in request.fixturenames:
        mlx_kvq.disable(request.getfixturevalue("model"))


def prompt(n: int, seed: int = 1) -> mx.array:
    return mx.array(np.random.RandomState(seed).randint(1, 290, (1, n)))


def with_image(model) -> tuple[mx.array, mx.array, dict]:
    """A prompt of 60 tokens with an image of 4, its pixels, and what the model asks for besides."""
    ids = np.array(prompt(60))
    ids[0, 19], ids[0, 20:24] = START, IMAGE
    mx.random.seed(2)
    if model.config.model_type == "gemma3":
        return mx.array(ids), mx.random.normal((1, 3, 32, 32)), {}
    grid = mx.array([[1, 4, 4]])
    return mx.array(ids), mx.random.normal((16, 3 * 2 * 14 * 14)), {"image_grid_thw": grid}


def tokens(model, ids, pixels=None, n=TOKENS, **options) -> list[int]:
    mask = mx.ones(ids.shape, mx.int32)
    steps = generate_step(ids, model, pixels, mask, max_tokens=n, temperature=0.0, **options)
    return [int(token) for token, _ in steps]


def kinds(model) -> set[str]:
    return {type(c).__name__ for c in own.make_prompt_cache(model.language_model)}


def test_either_half_enables_and_disables_both(model):
    before = own.make_prompt_cache(model.language_model)
    assert {type(c).__module__ for c in before} == {"mlx_vlm.models.cache"}
    for half in (model, model.language_model):
        report = mlx_kvq.enable(half, INT4, verbose=False)
        assert len(report.packed) == len(before)
        assert not report.left and not report.unpacked and not report.alone
        assert kinds(model) == {f"Packed{type(c).__name__}" for c in before}
        mlx_kvq.disable(half)
        assert kinds(model) == {type(c).__name__ for c in before}
    made = mlx_kvq.make_prompt_cache(model, INT4, max_kv_size=40)
    assert 40 in {getattr(c, "max_size", None) for c in made}
    assert kinds(model) == {type(c).__name__ for c in before}


def test_packed_rows_are_attended_to(model, monkeypatch):
    seen = []
    for name in ("attend", "restore"):
        stock = getattr(ours.ops, name)
        monkeypatch.setattr(
            ours.ops, name, lambda *a, _f=stock, _n=name, **k: seen.append(_n) or _f(*a, **k)
        )
    mlx_kvq.enable(model, INT4, verbose=False)
    seen.clear()
    tokens(model, prompt(20))
    # Each decoded token, and the last one of the prompt, once a layer.
    assert seen.count("attend") == (TOKENS + 1) * len(model.layers)


@pytest.mark.parametrize("pictured", [False, True], ids=["text", "image"])
def test_the_text_is_that_of_its_own_cache(model, pictured):
    ids, pixels, more = with_image(model) if pictured else (prompt(60), None, {})
    expected = tokens(model, ids, pixels, **more)
    mlx_kvq.enable(model, INT8, verbose=False)
    assert tokens(model, ids, pixels, **more) == expected
    if pictured:
        blank = mx.zeros(pixels.shape)
        assert tokens(model, ids, blank, **more) != expected  # the image is seen at all


def test_a_trial_leaves_no_positions_behind(model):
    """Qwen2-VL keeps them from one call to the next."""
    before = vars(model.language_model).get("_position_ids"), "_rope_deltas" in model.language_model
    mlx_kvq.enable(model, INT4, verbose=False)
    after = vars(model.language_model).get("_position_ids"), "_rope_deltas" in model.language_model
    assert before == after


def test_a_prompt_is_read_as_one_however_it_is_cut(model):
    mlx_kvq.enable(model, INT4, verbose=False)
    ids = prompt(90)
    whole = tokens(model, ids, prefill_step_size=512)
    assert tokens(model, ids, prefill_step_size=5) == whole
    # Five tokens at a time would otherwise be read as decoded ones are.
    caches = own.make_prompt_cache(model.language_model)
    tokens(model, ids, n=1, prefill_step_size=5, prompt_cache=caches)
    assert {c.prompt[0] for c in caches} == {89}


class Stop:
    """A processor that never ends a text."""

    stopping_criteria = property(lambda self: self)

    def add_eos_token_ids(self, ids) -> None: ...

    def __call__(self, token) -> bool:
        return False


def together(model, prompts: list[mx.array], **options) -> list[list[int]]:
    generator = BatchGenerator(model.language_model, Stop(), compute_logprobs=False, **options)
    extra = []
    for ids in prompts:
        made = model.get_input_embeddings(ids, None).to_dict()
        extra.append({k: v for k, v in made.items() if v is not None})
    ids = [p[0].tolist() for p in prompts]
    lengths = [TOKENS - i for i in range(len(ids))]
    uids = generator.insert(ids, lengths, prompt_kwargs=extra)
    found: dict = {uid: [] for uid in uids}
    while generator.has_work:
        for response in generator.next()[1]:
            found[response.uid].append(response.token)
    generator.close()
    return [found[uid] for uid in uids]


@pytest.mark.parametrize("spec", [INT4, "int4-srft:calibrate=off,recent=0"])
def test_in_a_batch_each_gets_the_text_it_gets_alone(model, spec):
    """Prompts of several lengths, and sequences that end at different times."""
    mlx_kvq.enable(model, spec, verbose=False)
    many = [prompt(n, seed=n) for n in (90, 40, 7, 1)]
    alone = [tokens(model, ids, n=TOKENS - i) for i, ids in enumerate(many)]
    assert together(model, many) == alone
    # Two at a time: the others join the batch later.
    assert together(model, many, prefill_batch_size=2) == alone


def test_two_ways_to_quantize_are_an_error(model):
    mlx_kvq.enable(model, INT4, verbose=False)
    with pytest.raises(ValueError, match="this one is packed already"):
        tokens(model, prompt(20), kv_bits=4)
    with pytest.raises(NotImplementedError, match="PackedRotatingKVCache|PackedKVCache"):
        together(model, [prompt(20), prompt(5)], kv_bits=4)


def test_a_draft_model_is_refused(model):
    mlx_kvq.enable(model, INT4, verbose=False)
    with pytest.raises(ValueError, match="speculative decoding reads the arrays"):
        tokens(model, prompt(20), draft_model=model)
    with pytest.raises(ValueError, match="speculative decoding reads the arrays"):
        together(model, [prompt(20), prompt(5)], draft_model=model, draft_kind="mtp")


def test_automatic_prefix_caching_leaves_them_alone(model):
    """It would copy arrays of its own caches; a prompt is read anew."""
    from mlx_vlm.apc_adapters import build_prefix_cache_plan

    assert build_prefix_cache_plan(model.language_model).restorable
    mlx_kvq.enable(model, INT4, verbose=False)
    assert not build_prefix_cache_plan(model.language_model).restorable


@pytest.mark.parametrize(
    ("spec", "shared", "kept"), [(INT4, 40, 0), (INT4, 600, 512), (f"{INT4},recent=0", 40, 40)]
)
def test_where_a_kept_conversation_goes_on(model, spec, shared, kept):
    """PromptCacheState: from a multiple of 512 tokens, as the exact tail there is gone otherwise.
    Of full windows nothing can be taken back, which mlx-vlm sees for itself."""
    mlx_kvq.enable(model, spec, verbose=False)
    first = prompt(shared + 20)
    caches = own.make_prompt_cache(model.language_model)
    said = tokens(model, first, prompt_cache=caches)
    known = (first[0].tolist() + said)[: max(c.offset for c in caches)]
    state = PromptCacheState()
    state.update(known, caches)
    # More of the same conversation goes on over its own generated tokens.
    assert state.find_prefix_length(known + prompt(9)[0].tolist()) == len(known)
    part = state.find_prefix_length(first[0, :shared].tolist() + prompt(20, seed=9)[0].tolist())
    if all(c.is_trimmable() for c in caches):
        assert part == kept
        assert {c.offset for c in caches} == {kept or shared}
    else:
        assert part == shared
        assert {c.offset for c in caches} == {len(known)}


def test_a_name_that_is_gone_is_named():
    code = (
        "import mlx_kvq; from mlx_vlm.generate.ar import PromptProcessingBatch\n"
        "from tests.caches.test_vlm import gemma3\n"
        "del PromptProcessingBatch.prompt_step\n"
        "try:\n    mlx_kvq.enable(gemma3(), 'int4')\n"
        "except ValueError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    expected = "is not supported: generate.ar.PromptProcessingBatch.prompt_step is missing"
    assert done.stdout.strip().endswith(expected), done.stderr
