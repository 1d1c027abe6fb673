"""Long texts at temperature 0 after a long context: where each cache leaves the model's own text,
how near the two tokens were there, and how the model rates what each wrote.

Every cache reads the same documents and continues them by ``--tokens`` tokens, whatever comes: no
end of text stops it. Then the model reads each continuation with its own cache, in chunks: the
perplexity of each text, and at the first token that differs the logit of the model's own choice
over that of the other one (``margin``: under it a rounding may turn the choice).

    MLX_KVQ_BACKEND=reference MLX_ENABLE_TF32=0 python scripts/studies/long_generation.py \\
        --model MODEL --text novel.txt --context 16K --json long.json

A text that repeats itself has a low perplexity: ``new`` is the part of its runs of 8 tokens that
are there once.
"""

import argparse
import copy
import json
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from texts import documents_of
from tqdm import tqdm

from mlx_kvq.calibration import automatic
from mlx_kvq.calibration.set import CalibrationSet
from mlx_kvq.commands.benchmark import record
from mlx_kvq.commands.options import length
from mlx_kvq.files import read_text, replacing
from mlx_kvq.measure.baselines import candidate, own
from mlx_kvq.measure.evaluate import load_model
from mlx_kvq.measure.quality import read
from mlx_kvq.measure.rivals import label
from mlx_kvq.model.report import log

CACHES = ("fp16", "int8-srft", "k8v4-srft", "int4-srft")
RUN = 8  # tokens


def feed(model: nn.Module, caches: list, ids: list[int], chunk: int, advance) -> None:
    for i in range(0, len(ids), chunk):
        model(mx.array(ids[i : i + chunk])[None], cache=caches)
        mx.eval([c.state for c in caches])
        advance(len(ids[i : i + chunk]))


def continued(model, caches: list, last: int, tokens: int, advance) -> list[int]:
    """The ``tokens`` most likely tokens, one after the other, after what ``caches`` hold and the
    token ``last``."""
    steps = generate_step(mx.array([last]), model, max_tokens=tokens, prompt_cache=caches)
    found = []
    for token, _ in steps:
        found.append(int(token))
        advance(1)
    return found


def rated(
    model: nn.Module, caches: list, last: int, written: list[int], chunk: int, at: int | None,
    others: tuple[int, int],
) -> tuple[float, float]:  # fmt: skip
    """Mean loss of a continuation, nats per token, and log p(others[0]) - log p(others[1]) of its
    token number ``at``, or 0; by the model with ``caches``, which hold all before ``last``."""
    ids = mx.array([last, *written])[None]
    plan = [(i, min(i + chunk, len(written)), 1) for i in range(0, len(written), chunk)]
    total, margin = 0.0, 0.0
    for (start, end, _), got in zip(plan, read(model, caches, ids, plan), strict=True):
        assert got is not None
        targets = ids[:, start + 1 : end + 1, None]
        total -= mx.take_along_axis(got, targets, axis=-1).sum().item()  # type: ignore[assignment]
        if at is not None and start <= at < end:
            row = got[0, at - start]
            margin = (row[others[0]] - row[others[1]]).item()  # type: ignore[assignment]
    return total / len(written), margin


def part_new(written: list[int]) -> float:
    runs = [tuple(written[i : i + RUN]) for i in range(len(written) - RUN + 1)]
    return len(set(runs)) / max(1, len(runs))


def study(
    model: nn.Module, makers: dict[str, Callable[[], list]], ids: list[int], args, advance
) -> list[dict]:
    """Rows of one document; the model's own cache comes first."""
    prompt, last = ids[:-1], ids[-1]
    before = own(model).make()
    feed(model, before, prompt, args.chunk, advance)
    rows: list[dict] = []
    first: list[int] = []
    for name, make in {"own": None, **makers}.items():
        if make is None:
            caches = copy.deepcopy(before)
        else:
            caches = make()
            feed(model, caches, prompt, args.chunk, advance)
        written = continued(model, caches, last, args.tokens, advance)
        first = first or written
        apart = [i for i, (a, b) in enumerate(zip(first, written, strict=True)) if a != b]
        at = apart[0] if apart else None
        both = (first[at], written[at]) if at is not None else (0, 0)
        scored = copy.deepcopy(before)
        loss, margin = rated(model, scored, last, written, args.chunk, at, both)
        advance(args.tokens)
        rows.append(
            {
                "cache": name, "parts_at": at, "tokens_there": both if apart else None,
                "margin": margin if apart else None, "perplexity": math.exp(loss),
                "new": part_new(written), "written": written,
            }
        )  # fmt: skip
        mx.clear_cache()
    return rows


def table(rows: list[dict]) -> str:
    head = [
        "document",
        "cache",
        "parts at token",
        "margin, nats",
        "perplexity",
        f"new runs of {RUN}",
    ]
    lines = [head, ["---", "---", *["--:"] * 4]]
    for r in rows:
        apart = r["parts_at"] is not None
        lines.append(
            [
                f"{r['text']} {r['document']}", label(r["cache"]),
                str(r["parts_at"]) if apart else "never", f"{r['margin']:.4f}" if apart else "–",
                f"{r['perplexity']:.4f}", f"{100 * r['new']:.0f} %",
            ]
        )  # fmt: skip
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    description = (__doc__ or "").partition("\n\n")[0]
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="a folder")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--kv-cache", nargs="+", default=list(CACHES), metavar="SPEC")
    parser.add_argument("--context", type=length, default=length("16K"), help="tokens of text")
    parser.add_argument("--tokens", type=int, default=2000, help="to be written")
    parser.add_argument("--documents", type=int, default=1, help="of each text, if they fit")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--calibration", metavar="FILE", help="instead of the automatic one")
    parser.add_argument("--dtype", default="float32", help="to compute in")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    try:
        run(args)
    except ValueError as error:
        raise SystemExit(f"long_generation.py: {error}") from None


def run(args: argparse.Namespace) -> None:
    texts = {Path(path).name: read_text(path) for path in args.text}
    given = CalibrationSet.load(args.calibration) if args.calibration else None
    model, tokenizer = load_model(args.model)
    model.set_dtype(getattr(mx, args.dtype))
    ids = {n: tokenizer.encode(t, add_special_tokens=False) for n, t in texts.items()}
    documents = documents_of(tokenizer, ids, args.documents, args.context)
    if not documents:
        raise ValueError(f"No text has {args.context} tokens.")
    most = getattr(model.args, "max_position_embeddings", None)
    if most is not None and args.context + args.tokens > most:
        raise ValueError(f"{args.context} and {args.tokens} tokens: the model takes {most}.")
    calibration = given or automatic.automatic(model, tokenizer, log)
    options = {"calibration": calibration, "tokenizer": tokenizer}
    makers = {n: candidate(model, n, **options).make for n in args.kv_cache}
    rows: list[dict] = []
    total = len(documents) * (1 + len(makers)) * (args.context - 1 + 2 * args.tokens)
    with tqdm(total=total, unit="token", mininterval=1, dynamic_ncols=True) as bar:
        for number, document in enumerate(documents):
            place = {"text": document.text, "document": number}
            found = study(model, makers, document.ids, args, bar.update)
            for row in found:
                text = tokenizer.decode(row.pop("written"))
                rows.append({**place, **row, "continuation": text})
            save(args, rows)
    print(table(rows))


def save(args: argparse.Namespace, rows: list[dict]) -> None:
    if args.json:
        names = ("context", "tokens", "chunk", "dtype")
        setting = {"model": Path(args.model).name, **{n: getattr(args, n) for n in names}}
        made = {**record(), "command": shlex.join(["python", *sys.argv])}
        result = {"record": made, "setting": setting, "rows": rows}
        with replacing(args.json) as part:
            part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
