"""``decode_speed`` on a tiny model: a line for each cache, of the lengths asked for."""

import re
from types import SimpleNamespace

import decode_speed
from bench_gpu import TINY
from mlx_lm.models import qwen2

from mlx_kvq.measure import model_speed
from mlx_kvq.measure.shapes import SHAPES


def test_lines(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", (qwen2, TINY))
    monkeypatch.setattr(decode_speed, "SECONDS", 0.0)
    asked = {"shape": "tiny", "model": None, "weight_bits": None, "dtype": "float16"}
    names = ["fp16", "int4-srft"]
    made = model_speed.entries(SimpleNamespace(**asked, kv_cache=names))
    for B, T in ((1, 40), (2, 300)):
        lines = decode_speed.measure(made, B, T, 3)
        for name, line in zip(names, lines, strict=True):
            assert line.startswith(f"batch {B}, {T} tokens, {name}: ")
            assert re.search(r"\) ms, \d+ tokens/s, \d.* x, \d+ MB$", line)
        assert ", 1.00 (1.00 to 1.00) x, " in lines[0]
