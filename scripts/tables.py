"""The tables of README.md and docs/performance.md, as markdown, from measured JSON.

    python scripts/tables.py OUT/ops.json OUT/models.json OUT/torch.json real_models.json

The files are those of ``mlx_kvq benchmark --json``, bench_gpu.py, bench_torch.py and
studies/real_models.py, whose intervals are 95 % by bootstrap. Each table is
headed by what it was measured with. Times are medians with quartiles, factors the median quotient
of interleaved rounds with quartiles.
"""

import argparse
import json
from pathlib import Path

from mlx_kvq.measure.rivals import label

MADE_BY = ("device", "mlx", "mlx-lm", "torch", "cudnn", "commit", "date")

BASES = ("fp16", "fp16-even")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    for path in parser.parse_args().files:
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            record, rows = result["record"], result["rows"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path}: no result of a benchmark ({error}).") from None
        print(heading(record))
        for table in tables(rows):
            print(f"\n{table}")
        print(classes(rows))


def heading(record: dict) -> str:
    """What a table was measured with, and the command."""
    parts = [
        str(record[k]) if k == "device" else f"{k} {record[k]}" for k in MADE_BY if k in record
    ]
    return f"{', '.join(parts)}: `{record.get('command', 'unknown command')}`"


def tables(rows: list[dict]) -> list[str]:
    """Markdown of every table that these rows make."""
    studied = [r for r in rows if "kind" in r]
    if studied:
        return quality(studied)
    ops = [r for r in rows if "op" in r]
    found = [operation([r for r in ops if r["op"] == op], op) for op in _unique(ops, "op")]
    models = [r for r in rows if "model" in r]
    if models:
        found += [end_to_end(models), summary(models)]
    return found


def classes(rows: list[dict]) -> str:
    """The cache classes that were measured, and what could not be."""
    used = dict.fromkeys((r["cache"], r["class"]) for r in rows if "class" in r)
    lines = [f"Caches: {', '.join(f'{name} {cls}' for name, cls in used)}."] if used else []
    for r in rows:
        if "note" in r and "op" in r:
            lines.append(
                f"{r['heads']}, batch {r['batch']}, {r['tokens']}, {r['cache']}: {r['note']}"
            )
    return "\n" + "\n\n".join(lines) + "\n"


def operation(rows: list[dict], op: str) -> str:
    """A row per shape; columns for µs of each cache, and for times faster than fp16."""
    caches = _unique(rows, "cache")
    # Own caches against every base that some row was compared with.
    compared = [
        (c, base)
        for base in BASES
        for c in caches
        if c not in BASES and any(f"x_{base}" in r for r in rows if r["cache"] == c)
    ]
    header = [op, "batch", "tokens", *(f"{c}, µs" for c in caches)]
    header += [f"{c} × {base}" for c, base in compared]
    lines = []
    for heads, B, T in dict.fromkeys((r["heads"], r["batch"], r["tokens"]) for r in rows):
        at = {r["cache"]: r for r in rows if (r["heads"], r["batch"], r["tokens"]) == (heads, B, T)}
        cells = [heads, str(B), str(T), *(_micros(at.get(c)) for c in caches)]
        cells += [_factor(at.get(c), f"x_{base}") for c, base in compared]
        lines.append(cells)
    return _markdown(header, lines)


def quality(rows: list[dict]) -> list[str]:
    """Of each model and context what each cache costs, with notes, and what it recalls."""
    found = []
    scored = [r for r in rows if r["kind"] == "quality"]
    for model, context in dict.fromkeys((r["model"], r["context"]) for r in scored):
        here = [r for r in scored if (r["model"], r["context"]) == (model, context)]
        found.append(f"{model}, {context:,} tokens of context, {_documents(here)}:")
        found.append(_quality([r for r in here if "failed" not in r]))
        found += [f"{r['cache']} failed: {r['failed']}" for r in here if "failed" in r]
    notes = (f"{r['model']}, {r['cache']}: {r['note']}." for r in scored if r.get("note"))
    found += dict.fromkeys(notes)
    recalled = [r for r in rows if r["kind"] == "recall" and "failed" not in r]
    for model in _unique(recalled, "model"):
        here = [r for r in recalled if r["model"] == model]
        contexts = sorted(_unique(here, "context"))
        at = {(r["cache"], r["context"]): f"{r['recall']} of {r['prompts']}" for r in here}
        header = [f"codes recalled, {model}, tokens", *(f"{c:,}" for c in contexts)]
        lines = [
            [label(name), *(at.get((name, c), "–") for c in contexts)]
            for name in _unique(here, "cache")
        ]
        found.append(_markdown(header, lines))
    return found


def _documents(rows: list[dict]) -> str:
    """How many there were, and of which texts."""
    documents: list[dict] = next((r["decode"]["documents"] for r in rows if "decode" in r), [])
    return f"{len(documents)} documents of {', '.join(_unique(documents, 'text'))}"


def _quality(rows: list[dict]) -> str:
    header = [
        "cache", "bytes a token", "KL as decoding reads", "geometric", "top-1", "perplexity",
        "KL as prompts read",
    ]  # fmt: skip
    lines = []
    for r in rows:
        d = r["decode"]
        change = {k: f"{100 * (v - 1):+.2f}" for k, v in d["perplexity_ratio"].items()}
        cells = [label(r["cache"]), f"{r['bytes_per_token']:,.0f}", _kl(d["kl"])]
        cells += [_nats(d["geometric"]["mean"]), f"{100 * d['top1']['mean']:.1f} %"]
        cells.append(f"{change['mean']} [{change['low']}, {change['high']}] %")
        lines.append([*cells, _kl(r["prompt"]["kl"]) if "prompt" in r else "–"])
    return _markdown(header, lines)


def _kl(e: dict) -> str:
    return f"{_nats(e['mean'])} [{_nats(e['low'])}, {_nats(e['high'])}]"


def _nats(x: float) -> str:
    if x < 1e-5:
        return "< 0.00001"
    return f"{x:.{5 if x < 1e-3 else 4 if x < 1 else 2}f}"


def end_to_end(rows: list[dict]) -> str:
    """A row per model, batch, context and cache."""
    header = [
        "model", "batch", "context", "cache", "ms/token", "decoding × fp16", "tokens/s",
        "prefill, s", "prefill × fp16", "cache, MB", "smaller ×", "peak of prefill, MB",
    ]  # fmt: skip
    lines = []
    for r in rows:
        cells = [r["model"], str(r["batch"]), str(r["context"]), r["cache"]]
        if "note" in r:
            lines.append([*cells, r["note"], *[""] * (len(header) - 5)])
            continue
        smaller = r.get("smaller_than_fp16")
        lines.append(
            [
                *cells,
                _spread(r["ms"], r["ms_low"], r["ms_high"], digits=2),
                _factor(r, "x_fp16"),
                f"{r['tokens_per_s']:.0f}",
                _spread(r["prefill_s"], r["prefill_low"], r["prefill_high"], digits=3),
                _factor(r, "prefill_x_fp16"),
                f"{r['cache_bytes'] / 1e6:.1f}",
                f"{smaller:.2f}" if smaller else "",
                f"{r['prefill_peak_bytes'] / 1e6:.0f}",
            ]
        )
    return _markdown(header, lines)


def summary(rows: list[dict]) -> str:
    """Factors over fp16, a column per context: the table of README.md."""
    measured = [r for r in rows if "x_fp16" in r and r["cache"] != "fp16"]
    contexts = sorted({r["context"] for r in measured})
    lines = []
    for model, cache, B in dict.fromkeys((r["model"], r["cache"], r["batch"]) for r in measured):
        at = {
            r["context"]: r
            for r in measured
            if (r["model"], r["cache"], r["batch"]) == (model, cache, B)
        }
        base = {
            r["context"]: r
            for r in rows
            if (r["model"], r["cache"], r["batch"]) == (model, "fp16", B) and "note" not in r
        }
        name = f"{model}, {cache}" + (f", batch {B}" if B > 1 else "")
        for title, key in (("decoding", "x_fp16"), ("prefill", "prefill_x_fp16")):
            lines.append([f"{title}, {name}", *(_factor(at.get(T), key) for T in contexts)])
        peaks = [
            f"{at[T]['prefill_peak_bytes'] / base[T]['prefill_peak_bytes']:.2f}"
            if T in at and T in base
            else "–"
            for T in contexts
        ]
        lines.append([f"peak memory of prefill, {name}, of fp16's", *peaks])
    return _markdown(["tokens of context", *map(str, contexts)], lines)


def _unique(rows: list[dict], key: str) -> list:
    return list(dict.fromkeys(r[key] for r in rows))


def _spread(middle: float, low: float, high: float, *, digits: int) -> str:
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def _micros(row: dict | None) -> str:
    if row is None or "us" not in row:
        return "–"
    return _spread(row["us"], row["us_low"], row["us_high"], digits=1)


def _factor(row: dict | None, key: str) -> str:
    return _spread(*row[key], digits=2) if row and key in row else "–"


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *lines])


if __name__ == "__main__":
    main()
