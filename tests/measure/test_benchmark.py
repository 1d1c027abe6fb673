"""The benchmark: its arithmetic, its commands, and that contenders do what they are timed for."""

import json
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import BatchKVCache, KVCache, QuantizedKVCache

from mlx_kvq import cli, ops
from mlx_kvq.caches.batch import PackedBatchKVCache
from mlx_kvq.caches.single import PackedKVCache
from mlx_kvq.commands import benchmark
from mlx_kvq.measure import baselines, contenders, model_speed, op_speed, shapes, timing
from mlx_kvq.measure.contenders import Heads, contender
from tests.support import calls

MODEL = "examples/models/tiny-qwen2-8bit"
TINY = {
    "model_type": "qwen2", "hidden_size": 128, "num_hidden_layers": 2, "rms_norm_eps": 1e-6,
    "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 100,
}  # fmt: skip
GEMMA = "examples/models/tiny-gemma3-8bit"
HEADS = Heads(4, 2, 64)


def run(*arguments: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mlx_kvq", "benchmark", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code in (None, 0), exit_.value.code


# ---- timing -----------------------------------------------------------------------------------
def test_spread_and_speedup():
    s = timing.spread([3.0, 1.0, 2.0, 5.0, 4.0])
    assert (s.low, s.median, s.high) == (2.0, 3.0, 4.0)
    assert timing.spread([7.0]) == timing.Spread(7.0, 7.0, 7.0)
    # A machine that is twice as slow for a while is so for both.
    assert timing.speedup([2.0, 4.0, 2.0], [1.0, 2.0, 1.0]) == timing.Spread(2.0, 2.0, 2.0)
    # The one that was slower got fewer rounds.
    assert timing.speedup([6.0, 6.0], [1.0, 2.0, 100.0]).high == 5.25


def test_interleave_takes_turns():
    clock, order = [0.0], []

    def chain(name, cost):
        def call(steps):
            order.append((name, steps))
            clock[0] += cost * steps

        return call

    taken = timing.interleave(
        {"fast": chain("fast", 0.001), "slow": chain("slow", 1.0)},
        steps=8, rounds=5, warm_up=0.5, longest=0.2, seconds=3.0,
        clock=lambda: clock[0],
    )  # fmt: skip
    np.testing.assert_allclose(taken["fast"], [0.001] * 5)
    np.testing.assert_allclose(taken["slow"], [1.0] * 3)  # longer than 3 seconds otherwise
    timed = order[-8:]
    assert timed == [("fast", 8), ("slow", 1)] * 3 + [("fast", 8)] * 2


# ---- contenders -------------------------------------------------------------------------------
def exact(q, k, v):
    return mx.fast.scaled_dot_product_attention(
        *(x.astype(mx.float32) for x in (q, k, v)), scale=q.shape[-1] ** -0.5
    )


@pytest.mark.parametrize(
    "name, tolerance",
    [("fp16", 2e-3), ("bf16", 2e-2), ("kv4", 0.25), ("kv8", 0.02),
     ("int4-srft:recent=0,first=0", 0.25),
     ("k8v4-srft:recent=0,first=0", 0.2), ("int8-srft:recent=0,first=0", 0.02)],
)  # fmt: skip
def test_contenders_attend_to_what_they_store(name, tolerance):
    """Also: what is taken out again are the values, in their own or a rotated domain."""
    c = contender(name, HEADS, mx.float16)
    k, v = contenders.random_pair(HEADS, 2, 40, c.dtype)
    q = contenders.random(4, 2, 1, 64, c.dtype)
    cache = c.batch(2)[0]
    mask = cache.make_mask(40, return_array=False, window_size=None)
    held = contenders.Held(cache, *cache.update_and_fetch(k, v), None)
    if "-" in name:  # a prompt's chunk reads itself: go on to what a decode step reads
        one = contenders.random_pair(HEADS, 2, 1, c.dtype)
        mask = cache.make_mask(1, return_array=False, window_size=None)
        held = contenders.Held(cache, *cache.update_and_fetch(*one), mask)
        k, v = (mx.concatenate([x, y], axis=2) for x, y in zip((k, v), one, strict=True))
    out = c.attend(q.reshape(q.shape), held)
    assert out.dtype == c.dtype  # so that a chain converts nothing
    assert mx.abs(out.astype(mx.float32) - exact(q, k, v)).max() < tolerance
    assert contenders.nbytes(c.store(k, v)) == 2 * k.shape[2] * contenders.token_bytes(c, HEADS)
    if c.dequantize is None:
        return
    _, values = c.dequantize(held, [])
    lengths = [mx.linalg.norm(x.astype(mx.float32), axis=-1) for x in (values, v)]
    assert mx.abs(lengths[0] / lengths[1] - 1).max() < 0.15
    for a, b in zip(c.dequantize(held, [q]), c.dequantize(held, []), strict=True):
        assert mx.array_equal(a, b)


def layout(x: mx.array) -> tuple:
    """Shape, strides in bytes and dtype: a slice has the strides of its buffer, a copy its own."""
    mx.eval(x)
    return x.shape, memoryview(x).strides, x.dtype


def decoded(cache, B: int, T: int, dtype: mx.Dtype):
    """What a cache hands out after a prompt in chunks and four tokens, written out."""
    prompt = T - 4
    if B > 1 and hasattr(cache, "prepare"):
        padding = [b % 8 for b in range(B)]
        cache.prepare(lengths=[prompt - p for p in padding], right_padding=padding)
    for first in range(0, prompt, 2048):
        k = mx.ones((B, 2, min(2048, prompt - first), 64), dtype)
        cache.update_and_fetch(k, k)
    if B > 1 and hasattr(cache, "finalize"):
        cache.finalize()
    one = mx.ones((B, 2, 1, 64), dtype)
    for _ in range(4):
        mask = cache.make_mask(1, return_array=False, window_size=None)
        got = cache.update_and_fetch(one, one)
    return got, mask


@pytest.mark.parametrize("T", [40, 300, 512, 2500])
@pytest.mark.parametrize("name", ["fp16", "bf16", "kv4", "kv8"])
def test_operands_are_laid_out_as_the_users_cache_lays_them_out(name, T):
    """Slices of buffers with room, not copies: MLX on CUDA takes another kernel for a copy."""
    c = contender(name, HEADS, mx.float16)
    held = contenders.fill(c, HEADS, 1, T)
    cache = KVCache() if name in baselines.PLAIN else QuantizedKVCache(64, int(name[2:]))
    assert type(held.cache) is type(cache)
    want, mask = decoded(cache, 1, T, c.dtype)
    operands = contenders.leaves([held.keys, held.values])
    wanted = contenders.leaves([*want])
    assert [layout(x) for x in operands] == [layout(x) for x in wanted]
    assert held.mask is None and mask is None
    buffers = contenders.leaves([held.cache.keys, held.cache.values])
    assert {x.shape[2] for x in buffers} == {-(-T // 256) * 256}  # capacity
    for x, buffer in zip(operands, buffers, strict=True):
        # [B, H, capacity, width] in row order: a head is a capacity of rows away from the next.
        rows = memoryview(x).strides[1] // memoryview(x).strides[2]
        assert rows == buffer.shape[2] and x.shape[2] == T


@pytest.mark.parametrize("name, B", [("fp16", 1), ("bf16", 1), ("fp16", 3), ("fp16-even", 3)])
def test_keys_and_values_fill_a_buffer_each(name, B):
    """Strides do not tell a buffer from a part of a larger one, but what stays allocated does:
    keys alone keep as much as their capacity."""
    c = contender(name, HEADS, mx.float16)
    several = [contenders.fill(c, HEADS, B, 300) for _ in range(2)]
    mx.eval([[h.keys, h.values] for h in several])
    for which in ("keys", "values"):
        held = several.pop()
        kept = getattr(held, which)
        before = mx.get_active_memory()
        both = held.cache.keys.nbytes + held.cache.values.nbytes
        assert both == 2 * B * 2 * 512 * 64 * 2
        del held
        assert before - mx.get_active_memory() >= both // 2  # the other one is gone
        assert before - mx.get_active_memory() < both
        del kept


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_batches_are_in_the_cache_of_mlx_lms_batch_generator(name):
    c = contender(name, HEADS, mx.float16)
    held = contenders.fill(c, HEADS, 3, 300)
    want, mask = decoded(BatchKVCache([0] * 3), 3, 300, c.dtype)
    assert type(held.cache) is BatchKVCache
    assert held.cache.keys is not None
    assert [layout(x) for x in (held.keys, held.values)] == [layout(x) for x in want]
    assert held.cache.keys.shape[2] == 512
    assert held.cache.left_padding.tolist() == [0, 1, 2]
    assert held.mask.shape == mask.shape == (3, 1, 1, 300) and mx.array_equal(held.mask, mask)


def test_fp16_at_its_fastest_in_a_batch_is_there_too():
    """Slices of whole buffers and no mask."""
    held = contenders.fill(contender("fp16-even", HEADS, mx.float16), HEADS, 3, 300)
    want, mask = decoded(KVCache(), 3, 300, mx.float16)
    assert type(held.cache) is KVCache and held.mask is None and mask is None
    assert [layout(x) for x in (held.keys, held.values)] == [layout(x) for x in want]


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("T", [3, 10, contenders.CHUNK + 100])
def test_packed_caches_are_those_of_decoding(B, T):
    """With the tail, and the newest rows not yet written; batches with padding and its mask."""
    c = contender("int4-srft", HEADS, mx.float16)
    held = contenders.fill(c, HEADS, B, T)
    assert type(held.cache) is (PackedKVCache if B == 1 else PackedBatchKVCache)
    assert held.keys.shape == (B, 2, T, 64) and held.cache.tail.shape[2] >= 16
    q = contenders.random(4, B, 1, 64, c.dtype)
    out = c.attend(q, held)
    ordinary = calls.attend(ops,
        q, held.cache.rows, T, held.cache.format, 64**-0.5, tail=held.cache.tail,
        starts=None if B == 1 else held.cache.left_padding, first=held.cache._first(),
    )  # fmt: skip
    assert mx.allclose(out, ordinary, atol=2e-3)
    assert held.cache.rows.shape[2] % 256 == 0
    if B > 1:
        longest = max(0, T - contenders.DECODED)
        assert held.cache.left_padding.tolist() == [b % min(8, longest or 1) for b in range(B)]


@pytest.mark.parametrize("name", ["fp16", "kv4", "int4-srft"])
def test_content_is_random(name):
    """Not zeros: a kernel may skip them, or a GPU compress them."""
    c = contender(name, HEADS, mx.float16)
    held = contenders.fill(c, HEADS, 1, 40)
    for x in [held.cache.rows] if name == "int4-srft" else contenders.leaves([held.keys]):
        tokens = np.array(x.astype(mx.float32))[:, :, :40]
        assert (np.abs(tokens).sum(axis=-1) > 0).mean() > 0.99


def test_a_chain_leaves_its_query_alone():
    """mlx-lm's quantized attention scales the array it is given, in place."""
    c = contender("kv8", HEADS, mx.float16)
    seen = []
    original = c.attend
    c.attend = lambda q, buffer: seen.append(mx.abs(q).sum().item()) or original(q, buffer)
    chain, _ = op_speed._attend(c, HEADS, 1, 32, 1)
    chain(1)
    chain(1)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("text", ["12,5,128", "12,2", "a,b,c", "0,0,64"])
def test_heads_that_do_not_parse(text):
    with pytest.raises(ValueError, match="(?i)heads"):
        Heads.parse(text)


def test_unknown_contender():
    with pytest.raises(ValueError, match="int6"):
        contender("int6", HEADS, mx.float16)


# ---- operation by operation -------------------------------------------------------------------
def test_operations(tmp_path, monkeypatch, capsys):
    path = tmp_path / "ops.json"
    caches = ["fp16", "bf16", "kv4", "int4-srft"]
    run(
        "--heads", "4,2,64", "2,1,48", "--contexts", "64", "--kv-cache", *caches, "--vectors", "64",
        "--tokens", "2", "--rounds", "2", "--beyond", "1", "--json", str(path),
        monkeypatch=monkeypatch,
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "x: times faster" in out and "25 ns per vector" in out
    result = json.loads(path.read_text())
    record = result["record"]
    assert {"date", "command", "commit", "sources", "mlx", "mlx-lm", "system", "device"} <= set(
        record
    )
    assert record["command"].startswith("mlx_kvq benchmark --heads 4,2,64")
    rows = {(r["op"], r["heads"], r["cache"], r["tokens"]): r for r in result["rows"]}
    heads = str(HEADS)
    assert {k[2] for k in rows if k[:2] == ("attend", heads)} == set(caches)
    assert {k[2:] for k in rows if k[:2] == ("quantize", heads)} == {
        (name, n) for name in ("kv4", "int4-srft") for n in (1, 16)
    }
    int4 = rows["attend", heads, "int4-srft", 64]
    assert int4["class"] == "PackedKVCache"
    queries = 2 * 4 * 64 * 2
    assert int4["bytes"] == 64 * 2 * 68 + queries
    assert rows["attend", heads, "fp16", 64]["bytes"] == 64 * 2 * 256 + queries
    assert rows["attend", heads, "fp16", 64]["x_fp16"] == [1.0, 1.0, 1.0]
    assert int4["us_low"] <= int4["us"] <= int4["us_high"] and int4["of_copy"] > 0
    store = rows["quantize", heads, "int4-srft", 16]
    assert store["bytes"] == 16 * 2 * (256 + 68)
    assert store["ns_per_vector"] == pytest.approx(1e3 * store["us"] / 64)
    assert rows["dequantize", heads, "int4-srft", 64]["bytes"] == 64 * 2 * (68 + 256)
    # mlx-lm cannot quantize 48 channels in groups of 64: one line, and the others go on.
    assert "64" in rows["attend", "2 q / 1 kv, D = 48", "kv4", 64]["note"]
    assert "us" in rows["attend", "2 q / 1 kv, D = 48", "int4-srft", 64]


def test_a_contender_that_fails_is_a_row(monkeypatch):
    original = contenders.contender

    def broken(name, heads, dtype):
        c = original(name, heads, dtype)
        if name == "kv8":
            c.attend = lambda q, buffer: mx.zeros((2, 3)) @ mx.zeros((2, 3))
        return c

    monkeypatch.setattr(contenders, "contender", broken)
    args = _arguments("--heads", "4,2,64", "--contexts", "16", "--kv-cache", "kv8", "fp16",
                      "--rounds", "2", "--ops", "attend", "--beyond", "0")  # fmt: skip
    ((failed, ran),) = op_speed.measure(args, 1e9)
    assert failed["cache"] == "kv8" and "ValueError" in failed["note"]
    assert ran["cache"] == "fp16" and "us" in ran


def test_buffers_that_do_not_fit_are_left_out(monkeypatch):
    monkeypatch.setattr(op_speed, "memory_limit", lambda: 100_000)
    args = _arguments("--heads", "4,2,64", "--contexts", "100", "--kv-cache", "int4-srft", "fp16",
                      "--rounds", "2", "--ops", "attend", "--beyond", "0")  # fmt: skip
    ((small, large),) = op_speed.measure(args, 1e9)
    assert small["bytes"] == 100 * 136 + 1024
    args.contexts = [400]
    ((small, large),) = op_speed.measure(args, 1e9)
    assert "us" in small and "GB" in large["note"]


def _arguments(*arguments: str):
    import argparse

    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    return parser.parse_args(arguments)


# ---- end to end -------------------------------------------------------------------------------
def test_end_to_end(tmp_path, monkeypatch, capsys):
    path, plot = tmp_path / "model.json", tmp_path / "model.png"
    monkeypatch.setitem(shapes.SHAPES, "qwen2.5-0.5b", (shapes.qwen2, TINY))
    run(
        "--shape", "qwen2.5-0.5b", "--contexts", "40", "70",
        "--kv-cache", "fp16", "kv4", "int4-srft:recent=0,first=0", "--tokens", "2", "--rounds", "2",
        "--prefill-rounds", "2", "--json", str(path), "--plot", str(plot),
        monkeypatch=monkeypatch,
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "int4, paper on M1" in out and "1.03-1.09" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(path.read_text())["rows"]
    assert [(r["context"], r["cache"]) for r in rows] == [
        (T, name) for T in (40, 70) for name in ("fp16", "kv4", "int4-srft:recent=0,first=0")
    ]
    fp16, _, int4 = rows[:3]
    assert [r["class"] for r in rows[:3]] == ["KVCache", "QuantizedKVCache", "PackedKVCache"]
    assert int4["smaller_than_fp16"] == fp16["cache_bytes"] / int4["cache_bytes"] > 3.5
    for r in rows:
        assert r["model"] == "qwen2.5-0.5b"
        assert r["tokens_per_s"] == pytest.approx(1e3 / r["ms"])
        # Both peaks hold the cache itself.
        assert min(r["prefill_peak_bytes"], r["decode_peak_bytes"]) >= r["cache_bytes"]
    # The tables and the plot again, without measuring.
    again = tmp_path / "again.svg"
    run("--from-json", str(path), str(path), "--plot", str(again), monkeypatch=monkeypatch)
    assert capsys.readouterr().out.count("tokens/s") == 2 and again.stat().st_size


def test_prompts_are_of_tokens_that_the_model_knows():
    """``doctor`` makes a model of 64, and MLX reads past the end of an embedding."""
    model = shapes.qwen2.Model(shapes.qwen2.ModelArgs(**TINY | {"vocab_size": 64}))
    tokens = model_speed.prompts(model, 3, 500)
    assert tokens.shape == (3, 500) and tokens.min() >= 0 and 32 < tokens.max() < 64


def test_a_run_goes_back_to_where_it_was(monkeypatch):
    """Chains of the same length measure the same context, and decode as mlx-lm does."""
    args = _arguments("--model", MODEL)
    model, tokenizer = model_speed._model(args, mx.float32)
    entry = model_speed._contender("fp16", model, tokenizer)
    tokens = mx.array([[3, 5, 7, 11, 13, 17, 19]])
    run_ = model_speed.Run(entry, tokens)
    run_.prefill()
    from mlx_lm.generate import generate_step

    expected = [y for (y, _), _ in zip(generate_step(tokens[0], model), range(4), strict=False)]
    assert run_.y.item() == expected[0]
    seen = []
    original = model_speed.Run._next

    def noted(self, y):
        y = original(self, y)
        seen.append(y)
        return y

    monkeypatch.setattr(model_speed.Run, "_next", noted)
    for _ in range(2):
        run_.decode(3)
        assert [y.item() for y in seen] == expected[1:]
        assert all(type(c) is KVCache and c.offset == 7 for c in run_.cache)
        seen.clear()


@pytest.mark.parametrize("name", ["fp16", "int4-srft:recent=0,first=0"])
def test_a_batch_runs_as_in_mlx_lms_batch_generator(name):
    """In batch caches, padded on the left; each sequence gets the token it gets alone."""
    args = _arguments("--model", MODEL)
    model, tokenizer = model_speed._model(args, mx.float32)
    entry = model_speed._contender(name, model, tokenizer)
    tokens = mx.array([[3, 5, 7, 11, 13, 17], [19, 23, 29, 31, 37, 41]])
    run_ = model_speed.Run(entry, tokens)
    run_.prefill()
    cls = BatchKVCache if name == "fp16" else PackedBatchKVCache
    assert all(type(c) is cls and c.left_padding.tolist() == [0, 1] for c in run_.cache)
    alone = model_speed.Run(entry, tokens[:1])
    alone.prefill()
    assert run_.y[0].item() == alone.y[0].item()
    # The second is one shorter: its last token follows the first four.
    alone = model_speed.Run(entry, tokens[1:, [0, 1, 2, 3, 5]])
    alone.prefill()
    assert run_.y[1].item() == alone.y[0].item()
    run_.decode(2)
    assert all(c.offset.tolist() == [6, 5] for c in run_.cache)


def test_compiling_takes_no_prefill_rounds(monkeypatch):
    """On CUDA the first prefill compiles kernels for half a minute, the next takes 50 ms."""
    args = _arguments("--model", MODEL, "--rounds", "1", "--tokens", "1", "--prefill-rounds", "3")
    model, tokenizer = model_speed._model(args, mx.float32)
    entries = {"fp16": model_speed._contender("fp16", model, tokenizer)}
    seconds = [29.0, 0.05, 0.04, 0.05, 0.06]
    original = model_speed.Run.prefill

    def prefill(self):
        original(self)
        return seconds.pop(0)

    monkeypatch.setattr(model_speed.Run, "prefill", prefill)
    (row,) = model_speed._compare("tiny", entries, 1, 5, args)
    assert not seconds
    assert (row["prefill_low"], row["prefill_s"], row["prefill_high"]) == pytest.approx(
        (0.045, 0.05, 0.055)
    )


def test_an_item_that_does_not_fit_is_left_out(monkeypatch, capsys):
    monkeypatch.setitem(shapes.SHAPES, "qwen2.5-0.5b", (shapes.qwen2, TINY))
    args = _arguments(
        "--shape", "qwen2.5-0.5b", "--contexts", "300", "20000000", "--kv-cache", "fp16",
        "--tokens", "1", "--rounds", "1", "--prefill-rounds", "1",
    )  # fmt: skip
    ((row,),) = model_speed.measure(args)
    assert row["context"] == 300
    # 2 layers of 512 tokens, K and V of 64 channels.
    assert row["cache_bytes"] == 2 * 512 * 2 * 64 * 2
    assert "20000000 tokens left out" in capsys.readouterr().err
    guess = model_speed._Guess()
    guess.weights = 1000
    guess.learn(2, 100, 1000 + 400 + 600, 400)
    assert guess.bytes(1, 200) == 1000 + 200 * 2 + 200 * 3
    assert guess.bytes(1, 10000) == 1000 + 10000 * 2 + 2048 * 3


def test_mlx_lms_quantized_cache_is_what_it_makes():
    args = _arguments("--model", MODEL)
    model, tokenizer = model_speed._model(args, mx.float32)
    run_ = model_speed.Run(
        model_speed._contender("kv8", model, tokenizer), mx.zeros((1, 5), mx.int32)
    )
    run_.prefill()
    assert all(c.bits == 8 and c.offset == 5 for c in run_.cache)
    gemma, tokenizer = model_speed._model(_arguments("--model", GEMMA), mx.float32)
    with pytest.raises(ValueError, match="RotatingKVCache"):
        model_speed._contender("kv8", gemma, tokenizer)


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_shapes_are_those_of_the_models(shape):
    """Without making the weights: layers, heads and head size of the caches."""
    expected = {
        "qwen2.5-0.5b": (24, 14, 2, 64),
        "qwen2.5-1.5b": (28, 12, 2, 128),
        "gemma-3-1b": (26, 4, 1, 256),
        "llama-3.1-8b": (32, 32, 8, 128),
    }[shape]
    module, values = shapes.SHAPES[shape]
    a = module.ModelArgs(**values)
    D = getattr(a, "head_dim", None) or a.hidden_size // a.num_attention_heads
    assert (a.num_hidden_layers, a.num_attention_heads, a.num_key_value_heads, D) == expected


def test_a_shape_runs_without_touching_the_kept_calibrations(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(shapes.SHAPES, "qwen2.5-0.5b", (shapes.qwen2, TINY))
    monkeypatch.setenv("MLX_KVQ_CACHE", str(tmp_path / "kept"))
    run(
        "--shape", "qwen2.5-0.5b", "--weight-bits", "8", "--contexts", "20", "--batch-size", "2",
        "--kv-cache", "bf16", "int4-srft:recent=0,first=0", "--tokens", "2", "--rounds", "1",
        "--prefill-rounds", "1", monkeypatch=monkeypatch,
    )  # fmt: skip
    assert "qwen2.5-0.5b, 8-bit" in capsys.readouterr().out
    assert not (tmp_path / "kept").exists()


# ---- errors -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--json", "no/such/folder/x.json"], "folder"),
        (["--plot", "x.docx"], "docx|one of"),
        (["--contexts", "0"], "at least 1"),
        (["--weight-bits", "4"], "--shape"),
        (["--model", MODEL, "--contexts", "1"], "2 tokens"),
        (["--from-json", "README.md"], "not JSON"),
        (["--from-json", "missing.json"], "No such file"),
        (["--heads", "3,2,64"], "multiple"),
        (["--model", MODEL, "--cpu-time"], "--cpu-time"),
    ],
)
def test_errors_are_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mlx_kvq", "benchmark", *arguments])
    with pytest.raises(SystemExit, match=message) as exit_:
        cli.main()
    assert "\n" not in str(exit_.value.code)


def test_a_plot_needs_fp16(tmp_path, monkeypatch):
    rows = [{"op": "attend", "heads": "h", "cache": "int4-srft", "batch": 1, "tokens": 9, "us": 1,
             "us_low": 1, "us_high": 1, "bytes": 1, "of_copy": 1}]  # fmt: skip
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"record": {}, "rows": rows}))
    monkeypatch.setattr(
        sys,
        "argv",
        ["mlx_kvq", "benchmark", "--from-json", str(path), "--plot", str(tmp_path / "x.png")],
    )
    with pytest.raises(SystemExit, match="fp16"):
        cli.main()
