"""Scale on paper: bytes are those of ``mlx_kvq fit``, and the tables those of docs."""

import json

import pytest
import scale
from configs import Model

from mlx_kvq.commands import fit

ROOT = scale.DATA.parents[2]


@pytest.fixture(scope="module")
def data():
    return json.loads(scale.DATA.read_text())


def rate(rows, *wanted):
    (found,) = [
        r.rate for r in rows if (r.machine, r.model, r.cache, r.tokens, r.sequences) == wanted
    ]
    return found


def test_the_tables_of_docs(data):
    page = (ROOT / "docs" / "performance.md").read_text()
    assert scale.tables(data) == page.partition(scale.BEGIN)[2].partition(scale.END)[0]


def test_what_does_not_fit_has_no_rate(data):
    given = data["models"]["Llama-3.1-8B"]
    model = Model("Llama-3.1-8B", given["config"], data["weight_bits"])
    left = scale.limit("M1", "16GB") - model.weights - fit.RESERVE
    assert scale.limit("H200", "139GB") == 139 << 30 and left < (16 << 30) * 2 / 3
    for r in scale.rows(data):
        if (r.machine, r.model) == ("M1", "Llama-3.1-8B"):
            fits = model.plan(r.cache).bytes(r.tokens, r.sequences) <= left
            assert (r.rate is not None) == fits


def test_a_step_by_hand(data):
    """M1, Llama-3.1-8B, fp16, one sequence of 4K: 8.03e9 weights of 4.5 bits at 58.7 GB/s."""
    apple = data["apple"]["M1"]
    best, worst = apple["heads"]["32/8/128"]["1 x 4096"][:2]
    weights = 8.03e9 * 4.5 / 8 / apple["bandwidth"]
    expected = [weights + 32 * (t / 1e6 + apple["layer"]) for t in (worst, best)]
    got = rate(scale.rows(data), "M1", "Llama-3.1-8B", "fp16", 4096, 1)
    assert [1 / r for r in got] == pytest.approx(expected, rel=1e-3)


def test_many_sequences_are_bound_by_products(data):
    """64 rows of 1.54e9 weights take longer by operations than by bytes."""
    low, high = rate(scale.rows(data), "M1", "Qwen2.5-1.5B", "int4-srft", 4096, 64)
    products = 2 * 64 * 1.54e9 / data["apple"]["M1"]["flops"]
    assert low < high < 64 / products


def test_an_h200_waits_for_its_host(data):
    for cache in scale.CACHES:
        got = rate(scale.rows(data), "H200", "Qwen2.5-1.5B", cache, 4096, 1)
        assert got == pytest.approx((1 / 28 / 0.00019,) * 2)


def test_a_gb_holds_tokens(data):
    """Llama-3.1-8B in fp16: 32 layers, 8 heads, 128 channels of keys and of values, two bytes."""
    line = next(line for line in scale.density(data) if "Llama" in line)
    assert line.split("|")[2].strip() == f"{(1 << 30) / (32 * 8 * 256 * 2) / 1000:.3g}"


def test_text():
    assert scale.text(None) == "no room"
    assert scale.text((4.96, 22.1)) == "5.0–22"
    assert scale.text((1234.4, 1234.0)) == "1,234"
