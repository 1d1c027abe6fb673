"""enable, disable and make_prompt_cache on the bundled models and on models made to be awkward."""

import copy
import itertools
import os

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm import generate, load, stream_generate
from mlx_lm.models import cache as stock
from mlx_lm.models.base import scaled_dot_product_attention

import mlx_kvq
from mlx_kvq.caches import seams
from mlx_kvq.caches.rotating import PackedRotatingKVCache
from mlx_kvq.caches.single import PackedKVCache
from mlx_kvq.calibration import automatic
from mlx_kvq.format import levels as format_levels
from mlx_kvq.format.layout import RowLayout
from mlx_kvq.format.spec import BITS
from mlx_kvq.model import bits as budgets
from tests.support.float32 import MODELS, WINDOW, load_float32

PROMPT = "It was a dark night, and the old man"
FULL = os.environ.get("MLX_KVQ_FULL", "0") not in ("", "0")


@pytest.fixture(scope="module", params=["tiny-qwen2-8bit", "tiny-gemma3-8bit"])
def loaded(request):
    return load(str(MODELS / request.param))


@pytest.fixture
def model(loaded):
    yield loaded[0]
    mlx_kvq.disable(loaded[0])


def fake_quantized(cache, fmt):
    """mlx-lm's own cache, fed with what ours would remember of each token, with the newest and the
    first ones as they are, and with all of a prompt's only chunk, which is less than a block."""
    exact = copy.deepcopy(cache)

    def remembered(x, transform, bits, group):
        y = transform.forward(x)
        codes, scales = format_levels.quantize(y, bits, group, fmt.scale)
        levels = codes.astype(mx.float32) - (2 ** (bits - 1) - 0.5)
        y = levels * mx.repeat(scales.astype(mx.float32), group, axis=-1)
        return transform.output(y).astype(x.dtype)  # one query head per KV head

    class Fake(type(cache)):
        def update_and_fetch(self, keys, values):
            first = self.offset == 0
            lay = fmt.layout
            fetched = super().update_and_fetch(
                remembered(keys, fmt.keys, lay.k_bits, lay.k_group),
                remembered(values, fmt.values, lay.v_bits, lay.v_group),
            )
            whole = exact.update_and_fetch(keys, values)
            if first and fmt.recent:
                return keys, values
            newest = exact._idx if hasattr(exact, "_idx") else exact.offset
            ages = (newest - 1 - mx.arange(whole[0].shape[2])) % whole[0].shape[2]  # around a ring
            as_it_is = (ages < fmt.recent) | (self.offset - 1 - ages < fmt.first)
            return tuple(
                mx.where(as_it_is[:, None], x, y) for x, y in zip(whole, fetched, strict=True)
            )

    cache.__class__ = Fake
    return cache


def types(caches):
    return [type(c).__name__ for c in caches]


def test_enable_follows_the_models_own_caches(model):
    before = types(stock.make_prompt_cache(model))
    report = mlx_kvq.enable(model, "int4-srft")
    after = types(stock.make_prompt_cache(model))
    assert after == [f"Packed{name}" for name in before]
    assert sorted(report.packed) == list(range(len(before)))
    assert not report.left
    packed = model.make_cache()
    mlx_kvq.disable(model)
    own = stock.make_prompt_cache(model)
    assert types(own) == before
    for a, b in zip(own, packed, strict=True):
        assert getattr(a, "max_size", None) == getattr(b, "max_size", None)
        assert getattr(a, "keep", None) == getattr(b, "keep", None)
    mlx_kvq.disable(model)  # again: nothing to do


def test_one_line_says_what_was_applied(model, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_KVQ_CACHE", str(tmp_path))  # where no test has kept another calibration
    n = len(model.layers)
    mlx_kvq.enable(model, "int4-srft", verbose=False)
    mlx_kvq.enable(model, "int4-srft")
    # Layers with a window have smaller groups.
    windows = any(hasattr(c, "max_size") for c in stock.make_prompt_cache(model))
    bits, smaller = ("4.46", "3.59") if windows else ("4.25", "3.76")
    line = (
        f"[mlx_kvq] int4-srft: packed {n} of {n} layers, {bits} bits per value, "
        f"{smaller}x smaller than fp16, the newest 64 to 256 and the first 4 tokens exact, "
        "calibrated (built-in sample)\n"
    )
    assert capsys.readouterr() == ("", line)
    mlx_kvq.enable(model, "k8v4-srft:group_size=64", verbose=False)
    assert capsys.readouterr() == ("", "")


def test_fp16_is_disable(model):
    mlx_kvq.enable(model, "int4-srft", verbose=False)
    assert mlx_kvq.enable(model, "fp16") is None
    assert not any(name.startswith("Packed") for name in types(stock.make_prompt_cache(model)))


def test_enable_again_replaces(model):
    mlx_kvq.enable(model, "int4-srft", verbose=False)
    mlx_kvq.enable(model, "int8-srht", verbose=False)
    assert {str(c.format.spec) for c in model.make_cache()} == {"int8-srht"}


def test_max_kv_size_bounds_the_growing_layers(model):
    own = types(stock.make_prompt_cache(model))
    mlx_kvq.enable(model, "int4-srft", verbose=False)
    for make in (
        lambda: stock.make_prompt_cache(model, 40),
        lambda: stock.make_prompt_cache(model, max_kv_size=40),
        lambda: mlx_kvq.make_prompt_cache(model, "int4-srft", 40),
    ):
        caches = make()
        assert set(types(caches)) == {"PackedRotatingKVCache"}
        for name, cache in zip(own, caches, strict=True):
            assert (cache.max_size, cache.keep) == ((40, 4) if name == "KVCache" else (256, 0))


def test_generation_with_max_kv_size_runs_past_it(loaded, model):
    mlx_kvq.enable(model, "int4-srft", verbose=False)
    caches = stock.make_prompt_cache(model, 24)
    for _ in stream_generate(model, loaded[1], PROMPT, max_tokens=40, prompt_cache=caches):
        pass
    assert all(c.offset >= 40 for c in caches)
    bounded = [c for c in caches if c.max_size == 24]
    assert bounded
    assert all(c.rows.shape[2] == 24 for c in bounded)


def test_no_history_stays_unpacked(loaded, model):
    """After a prompt and some tokens a cache holds rows and nothing else that is large."""
    mlx_kvq.enable(model, "int4-srft", verbose=False)
    caches = stock.make_prompt_cache(model)
    for _ in stream_generate(model, loaded[1], PROMPT, max_tokens=4, prompt_cache=caches):
        pass
    for c in caches:
        parts = c, c.stored, c.newest
        arrays = [k for part in parts for k, v in vars(part).items() if isinstance(v, mx.array)]
        assert arrays == ["array", "waiting", "array"]  # rows, and twice the tail
        assert c.stored.waiting.shape == c.tail.shape
        assert c.tail.shape[2] == c.format.recent  # the newest tokens


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_bytes_at_4k_tokens(model, dtype):
    """As small as with groups of 32 and 16 exact tokens, 3.5x, beside the model's own cache, which
    holds ``dtype``; of an fp16 model, whose exact tail is fp32, a little less."""

    packed: list = mlx_kvq.make_prompt_cache(model, "int4-srft")
    own = stock.make_prompt_cache(model)
    for a, b in zip(own, packed, strict=True):
        k = mx.zeros((1, model.args.num_key_value_heads, 4096, b.format.layout.k_dim), dtype)
        a.update_and_fetch(k, k)
        b.update_and_fetch(k, k)
    least = {mx.bfloat16: 3.49, mx.float16: 3.34}[dtype]
    assert sum(a.nbytes for a in own) >= least * sum(b.nbytes for b in packed)


@pytest.mark.parametrize("recent, first", [(0, 0), (5, 4), (16, 4), (5, 0)])
@pytest.mark.parametrize("name", ["tiny-qwen2-8bit", "tiny-gemma3-8bit"])
def test_generates_as_an_unpacked_fake_quantized_cache_does(name, recent, first):
    """Greedy, past the sliding window of tiny-gemma3 (here 64), token for token; in fp32, where the
    fake's way back to the original domain rounds nothing away. The calibration is always the same:
    with another one sums may part at a near tie."""
    model, tokenizer = load_float32(name, WINDOW)
    calibration = mlx_kvq.calibrate(model, tokenizer, tokens=256, progress=False)
    prompt = tokenizer.encode((MODELS / "README.md").read_text())[: WINDOW - 12]
    n = 200 if FULL else 60

    def tokens(caches):
        steps = stream_generate(model, tokenizer, prompt, max_tokens=n, prompt_cache=caches)
        return [step.token for step in steps]

    own = stock.make_prompt_cache(model)
    spec = f"int4-srft:recent={recent},first={first}"
    ours: list = mlx_kvq.make_prompt_cache(model, spec, calibration=calibration)
    fakes = [fake_quantized(c, o.format) for c, o in zip(own, ours, strict=True)]
    expected = tokens(fakes)
    assert len(expected) == n
    assert tokens(ours) == expected
    # Quantization does show, also in which tokens are left out of it.
    other = f"int4-srft:recent={0 if recent else 64}"
    others = mlx_kvq.make_prompt_cache(model, other, calibration=calibration)
    assert expected not in (tokens(own), tokens(others))


class Attention(nn.Module):
    def __init__(self, D, shared=True):
        super().__init__()
        self.D, self.shared = D, shared

    def __call__(self, x, cache):
        h = mx.broadcast_to(x[:, None, :, None], (x.shape[0], 2, x.shape[1], self.D)) * 1.0
        k, v = cache.update_and_fetch(h, h)
        if self.shared:
            return scaled_dot_product_attention(h, k, v, cache=cache, scale=1.0, mask=None)
        return mx.softmax(h @ k.swapaxes(-1, -2), axis=-1) @ v


class Model(nn.Module):
    """Layers of given head sizes and kinds of caches."""

    def __init__(self, *layers, caches=None):
        super().__init__()
        self.layers = list(layers)
        if caches is not None:
            self._caches = caches

    def __call__(self, x, cache):
        x = x.astype(mx.float32)
        for layer, c in zip(self.layers, cache, strict=True):
            if isinstance(c, stock.CacheList):
                c = c[1]
            if isinstance(c, stock.ArraysCache):
                continue
            x = x + layer(x, c).sum(axis=(1, 3))
        return x


class Hybrid(Model):
    def make_cache(self):
        return self._caches()


def test_layers_that_cannot_be_packed_are_left_and_named(capsys):
    layers = [Attention(64), Attention(12), Attention(64, shared=False), Attention(32)]
    model = Hybrid(
        *layers,
        Attention(64),
        Attention(64),
        caches=lambda: [
            stock.KVCache(),
            stock.KVCache(),
            stock.ChunkedKVCache(16),
            stock.CacheList(stock.ArraysCache(1), stock.RotatingKVCache(8, keep=2)),
            stock.ArraysCache(2),
            stock.ArraysCache(2),
        ],
    )
    report = mlx_kvq.enable(model, "int4-srft:group_size=32")
    assert sorted(report.packed) == [0, 3]
    line = capsys.readouterr().err
    assert "packed 2 of 6 layers" in line
    assert "left 1: head size 12 is not a multiple of 8" in line
    assert "left 2: ChunkedKVCache is not a plain key/value cache" in line
    assert "left 4-5: ArraysCache is not a plain key/value cache" in line
    caches = model.make_cache()
    assert isinstance(caches[0], PackedKVCache)
    assert isinstance(caches[3], stock.CacheList)
    ring = caches[3][1]
    assert isinstance(ring, PackedRotatingKVCache)
    assert (ring.max_size, ring.keep) == (8, 2)
    mx.eval(model(mx.array([[1, 2, 3]]), cache=caches))
    assert (caches[0].offset, ring.offset) == (3, 3)


def test_attention_that_reads_keys_itself_is_unpacked_for(capsys):
    model = Model(Attention(64), Attention(32, shared=False), Attention(64))
    mlx_kvq.enable(model, "int4-srft:calibrate=off")
    line = capsys.readouterr().err
    assert "packed 3 of 3 layers" in line
    assert "unpacked to attend, without the shared function: 1" in line
    caches = model.make_cache()
    assert types(caches) == ["PackedKVCache"] * 3
    for tokens in ([1, 2, 3], [4]):
        mx.eval(model(mx.array([tokens]), cache=caches))


@pytest.mark.parametrize(
    "model, spec, reason",
    [
        (Model(Attention(12)), "int4-srft", "head size 12 is not a multiple of 8"),
        (Model(Attention(64)), "int4-srft:group_size=48", "group_size=48 does not divide"),
        (Model(Attention(96)), "int4-srht", "srht needs a head size that is a power of two"),
        (Hybrid(Attention(64), caches=lambda: [stock.ArraysCache(1)]), "int4-srft", "ArraysCache"),
    ],
)
def test_nothing_to_pack_is_an_error(model, spec, reason):
    had = "make_cache" in vars(model)
    for call in (mlx_kvq.enable, mlx_kvq.make_prompt_cache):
        with pytest.raises(ValueError, match=f"{spec} cannot pack any layer.*{reason}"):
            call(model, spec)
    assert ("make_cache" in vars(model)) == had


def test_a_bad_spec_is_an_error(model):
    with pytest.raises(ValueError, match="Did you mean 'int4-srht'"):
        mlx_kvq.enable(model, "int4-sht")


def test_stock_quantized_cache_still_works(loaded, model):
    """The replaced attention function hands other caches to the original."""
    prompt = loaded[1].encode(PROMPT)
    mlx_kvq.enable(model, "int4-srft", verbose=False)
    mlx_kvq.disable(model)
    if not hasattr(type(model), "make_cache"):
        text = generate(model, loaded[1], prompt, max_tokens=5, kv_bits=8, quantized_kv_start=0)
        assert text


def test_kv_bits_and_a_packed_cache_are_an_error(loaded, model):
    """However the packed cache comes in; mlx-lm would pass over it without a word."""
    prompt = loaded[1].encode(PROMPT)
    ask = {"max_tokens": 1, "kv_bits": 4, "quantized_kv_start": 0}
    mlx_kvq.enable(model, "int4-srft:calibrate=off", verbose=False)
    message = r"kv_bits=4 .* packed already \('int4-srft:calibrate=off'\): leave one of them out"
    with pytest.raises(ValueError, match=message):
        generate(model, *loaded[1:], prompt, **ask)
    with pytest.raises(ValueError, match=message):
        generate(model, *loaded[1:], prompt, draft_model=model, **ask)
    mlx_kvq.disable(model)
    packed = mlx_kvq.make_prompt_cache(model, "int4-srft:calibrate=off")
    with pytest.raises(ValueError, match=message):
        generate(model, *loaded[1:], prompt, prompt_cache=packed, **ask)
    with pytest.raises(ValueError, match=message):
        seams.refuse_kv_bits([stock.KVCache(), stock.CacheList(packed[0])], "kv_bits=4")


@pytest.mark.parametrize("spec", ["int4-srft", "int8-none", "k8v4-srht"])
def test_save_and_load_a_prompt_cache(loaded, model, tmp_path, spec):
    mlx_kvq.enable(model, spec, verbose=False)
    prompt = loaded[1].encode(PROMPT)
    caches = stock.make_prompt_cache(model)
    model(mx.array([prompt[:-1]]), cache=caches)
    stock.save_prompt_cache(str(tmp_path / "cache.safetensors"), caches)
    again = stock.load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert types(again) == types(caches)
    last = mx.array([prompt[-1:]])
    assert mx.array_equal(model(last, cache=caches), model(last, cache=again))


def bits(caches):
    return [c.format.spec.bits if hasattr(c, "format") else "own" for c in caches]


def test_layers_can_be_skipped_or_kept_in_eight_bits(model, capsys):
    n = len(model.layers)
    report = mlx_kvq.enable(model, "int4-srft:skip=first+1,high=last,calibrate=off")
    assert bits(model.make_cache()) == ["own", "own", *["int4"] * (n - 3), "int8"]
    line = capsys.readouterr().err
    assert f"packed {n - 2} of {n} layers" in line
    assert f"int8 in {n - 1}" in line and "left 0-1: skipped" in line
    assert sorted(report.packed) == list(range(2, n))
    for spec, error in [
        (f"int4-srft:skip={n}", f"skip names layer {n}; the layers that can be packed are 0-"),
        (f"int4-srft:high={n + 2}", f"high names layer {n + 2}"),
        ("int4-srft:skip=" + "+".join(map(str, range(n))), "skips every layer: use 'fp16'"),
    ]:
        with pytest.raises(ValueError, match=error):
            mlx_kvq.enable(model, spec + ",calibrate=off")


class Busy(nn.Module):
    """Attention whose output is the model's, through keys that 4 bits blur and values that they
    hold exactly (all of one size, without a rotation), or the other way round."""

    def __init__(self, sensitive, D=64):
        super().__init__()
        self.sensitive, self.D = sensitive, D

    def __call__(self, x, cache):
        h = mx.sin(x[:, None, :, None] * (1 + mx.arange(self.D)) * 0.37) * mx.ones((1, 2, 1, 1))
        even = mx.where(h > 0, 1.0, -1.0)
        new, scale = ((h, even), 0.6) if self.sensitive == "keys" else ((even, h), 0.0)
        k, v = cache.update_and_fetch(*new)
        o = scaled_dot_product_attention(h, k, v, cache=cache, scale=scale, mask="causal")
        return o.swapaxes(1, 2).flatten(-2)


class Dull(Attention):
    def __call__(self, x, cache):
        return 0 * super().__call__(x, cache)


class Last(nn.Module):
    """The sum of its layers' outputs is the logits."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = layers
        self.embed = nn.Embedding(97, 1)  # which only says how many tokens there are

    def __call__(self, tokens, cache):
        x = tokens.astype(mx.float32)
        return sum(
            layer(x, c).reshape(*x.shape, -1) if isinstance(layer, Busy) else layer(x, c).sum()
            for layer, c in zip(self.layers, cache, strict=True)
        )


@pytest.mark.parametrize(
    "sensitive, bought",
    [
        ("keys", {4.25: "int4", 4.4: "int4", 4.45: "k5v4", 4.9: "k5v4", 5: "k8v4", 5.6: "k8v4"}),
        ("values", {4.25: "int4", 4.5: "int4", 4.6: "int5", 5.5: "int5", 5.6: "int8"}),
    ],
)
def test_a_budget_goes_where_the_loss_is(sensitive, bought, monkeypatch):
    """One layer's keys, or its values, are all that matters: it gets the bits that help, if the
    budget has room for them. For values k5v4 and k8v4 are no help, and are not bought."""
    monkeypatch.setattr(automatic, "RANDOM_TOKENS", 512)  # as outside the tests
    model = Last(Dull(64), Busy(sensitive), Dull(64))
    spec = "int4-none:group_size=64,calibrate=off"
    for budget, name in bought.items():
        report = mlx_kvq.enable(model, f"{spec},budget={budget}", verbose=False)
        assert bits(model.make_cache()) == ["int4", name, "int4"]
        assert report.bits_per_value <= budget
    monkeypatch.setattr("mlx_kvq.model.plan.costs", None)  # said before anything is measured
    with pytest.raises(ValueError, match="A budget of 4.2 bits per value is less than the 4.25"):
        mlx_kvq.enable(model, f"{spec},budget=4.2")


@pytest.mark.parametrize(
    "sensitive, bought",
    [
        ("keys", {3.25: "int3", 3.5: "k4v3", 3.7: "k4v3", 4: "k5v4", 4.5: "k8v4", 5.5: "k8v4"}),
        ("values", {3.25: "int3", 3.5: "int3", 3.6: "int4", 3.9: "int4", 4: "int5", 5: "int8"}),
    ],
)
def test_a_budget_below_four_bits(sensitive, bought, monkeypatch):
    """From int3 on, and of all larger widths the one that pays most."""
    monkeypatch.setattr(automatic, "RANDOM_TOKENS", 512)
    model = Last(Dull(64), Busy(sensitive), Dull(64))
    spec = "int3-none:calibrate=off"  # with a budget in groups of 64, too
    for budget, name in bought.items():
        report = mlx_kvq.enable(model, f"{spec},budget={budget}", verbose=False)
        assert bits(model.make_cache()) == ["int3", name, "int3"]
        assert report.bits_per_value <= budget
    with pytest.raises(ValueError, match="A budget of 3.2 bits per value is less than the 3.25"):
        mlx_kvq.enable(model, f"{spec},budget=3.2")


@pytest.mark.parametrize("steep", [1.0, 10.0])
def test_a_budget_buys_the_best_of_two_kinds_or_three(steep):
    """Five layers of every need, beside every choice there is: the best with two kinds of rows, or
    with three if they cost a tenth less; for no more than a little, no byte."""
    paths = [(i,) for i in range(5)]
    layouts = {p: {b: RowLayout(64, 64, *BITS[b], 64, 64) for b in budgets.STEPS} for p in paths}
    size = {b: layouts[0,][b].bits_per_value for b in budgets.STEPS}
    cost = {(p, b): (1 + steep * p[0] ** 2) * 4.0 ** -size[b] for p in paths for b in budgets.STEPS}

    def total(some):
        return sum(cost[item] for item in zip(paths, some, strict=True))

    def spend(budget, least="int3"):
        given = dict.fromkeys(paths, least)
        room = budgets.room_of(budget, given, layouts)
        chosen = budgets.allocate(given, layouts, cost, room)
        assert sum(size[b] for b in chosen.values()) <= budget * 5
        return tuple(chosen[p] for p in paths)

    kinds = set()
    every = [
        (some, sum(map(size.get, some))) for some in itertools.product(budgets.STEPS, repeat=5)
    ]
    for budget in (3.25, 3.6, 4, 4.25, 5, 6, 7.5, 8.25, 9):
        chosen, nothing = spend(budget), budgets.NOTHING * total(["int3"] * 5)
        possible = [some for some, bits in every if bits <= budget * 5]
        two, three = (min(total(s) for s in possible if len(set(s)) <= n) for n in (2, 3))
        kinds.add(n := len(set(chosen)))
        assert total(chosen) <= (two if n < 3 else three) + 2 * nothing
        assert n <= 2 if three > 0.91 * two + nothing else n <= 3
        assert n == 3 or three > 0.89 * two - nothing
    assert kinds == {1, 2, 3}
    assert set(spend(9, "int8")) == {"int8"}
    assert set(spend(4.3, "int4")) == {"int4"}
    assert spend(4.4, "int4") == (*["int4"] * 4, "k5v4")


def test_a_budget_for_head_sizes_that_narrow_codes_cannot_pack(monkeypatch):
    """Groups of 24 channels, or heads of 72, leave out the steps with 3 and 5 bits."""
    monkeypatch.setattr(automatic, "RANDOM_TOKENS", 512)
    model = Last(Dull(72), Busy("keys", 72), Dull(72))
    for budget, name in {5.4: "k8v4", 5.3: "int4"}.items():
        spec = f"int4-none:group_size=24,calibrate=off,budget={budget}"
        mlx_kvq.enable(model, spec, verbose=False)
        assert bits(model.make_cache()) == ["int4", name, "int4"]
