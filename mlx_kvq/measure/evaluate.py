"""``mlx_kvq evaluate``: the quality and the size of each kind of cache.

Text is fed in chunks: every token after the first chunk attends to stored tokens. The baseline is
the model's own cache.
"""

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from .. import __version__, arguments
from ..caches.attention import BLOCK, DECODE_QUERIES
from ..calibration.set import CalibrationSet
from ..files import read_text, replacing
from ..format.spec import Spec
from ..model.loading import load
from .baselines import Contender, bytes_per_token, candidate, check_name, own
from .quality import Estimate, Result, measure, pieces, summarize
from .rivals import Rival, label


@dataclass
class Evaluation:
    """The figures of one run; ``print`` gives the table."""

    setting: dict  # model, dtype, windows, tokens, chunk, versions
    results: list[Result]  # the baseline first

    def __getitem__(self, name: str) -> Result:
        return next(r for r in self.results if r.name == name)

    def __str__(self) -> str:
        return self.table()

    def table(self, markdown: bool = False) -> str:
        """Aligned text, or a Markdown table, with the notes below it."""
        head = ["cache", "bytes/token", "KL", "KL 99 %", "top-1", "perplexity", "change"]
        recall = any(r.recall is not None for r in self.results)
        rows = [[*head, "recall"] if recall else head]
        for r in self.results:
            percent = r.change.map(lambda part: 100 * part)
            row = [
                label(r.name),
                f"{r.bytes_per_token:.0f}",
                f"{r.kl.mean:.4f}{_range(r.kl, '.4f')}",
                f"{r.kl_p99:.3f}",
                f"{100 * r.top1:.1f} %",
                f"{r.perplexity.mean:.2f}{_range(r.perplexity, '.2f')}",
                f"{percent.mean:+.2f} %{_range(percent, '+.2f')}",
            ]
            if r is self.results[0]:  # the baseline itself
                row[2], row[3], row[6] = "0", "0", ""
            rows.append([*row, f"{r.recall}/{r.prompts}"] if recall else row)
        return "\n".join([*_layout(rows, markdown), *self._notes(markdown)])

    def _notes(self, markdown: bool) -> list[str]:
        notes = [
            f"{_fed(self.setting)}; KL in nats per token, from {self.results[0].name}; 95 % "
            "intervals over windows, on a log scale, the change's from paired differences.",
            *(f"{r.name}: {r.note}." for r in self.results if r.note),
        ]
        return ["", "\n\n".join(notes) if markdown else "\n".join(notes)]

    def to_dict(self) -> dict:
        return {"setting": self.setting, "results": [asdict(r) for r in self.results]}

    def save(self, path: str | os.PathLike) -> None:
        """Write everything, every window's figures included, as JSON, whole or not at all."""
        # JSON has no NaN: null stands for the ends of an interval of a single window.
        found = json.loads(json.dumps(self.to_dict()), parse_constant=lambda name: None)
        with replacing(path) as part:
            part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def evaluate(
    model: nn.Module,
    tokenizer,
    specs: Sequence[str | Spec],
    texts: Sequence[str],
    *,
    windows: int = 16,
    tokens: int = 1024,
    chunk: int = DECODE_QUERIES,
    decode: int = 0,
    batch: int = 1,
    recall: Sequence[dict] = (),
    calibration: CalibrationSet | None = None,
    progress: bool = True,
) -> Evaluation:
    """Compare kinds of caches on the same model and text.

    Args:
        model (nn.Module): A model from ``mlx_lm.load``; in fp32 its own rounding does not add to
            that of the caches.
        tokenizer: Its tokenizer.
        specs (Sequence): Spec strings, and ``"fp16"``, ``"kv8"``, ``"kv4"`` (mlx-lm's own
            quantized cache, group size 64, from the first token on), ``"kivi"`` and ``"kvarn"``
            (fake-quantized: :mod:`mlx_kvq.measure.rivals`).
        texts (Sequence): Texts that the model has not seen.
        windows (int): Windows per text, one after the other from its beginning.
        tokens (int): Tokens in a window, more than ``chunk``.
        chunk (int): Tokens fed at a time; the first chunk of a window is not scored. Up to 8 are
            read like decoded tokens, more like a prompt, which reads its block exactly.
        decode (int): If not 0, a window is a prompt, read in chunks and not scored, and the last
            ``decode`` tokens are fed one at a time, as in generation; less than ``tokens``.
        batch (int): Windows fed side by side.
        recall (Sequence): ``{"prompt": …, "answer": …}``; the answer is exact if the model,
            fed in chunks and then decoding greedily, writes it.
        calibration (CalibrationSet, optional): For every spec that does not say
            ``calibrate=off``; without one they are calibrated as :func:`mlx_kvq.enable` does.
        progress (bool): Show progress bars, and a line on each spec, on stderr.

    Returns:
        Evaluation: One result per cache, the model's own cache first.

    Raises:
        ValueError: If a spec is unknown or not possible for this model, if a text is too
            short, or if a size makes no sense.
    """
    arguments.model(model)
    _check(specs, texts, windows, tokens, chunk, decode, batch)
    data = [w for i, t in enumerate(texts) for w in _windows(tokenizer, t, windows, tokens, i)]
    exact = own(model)
    options = {"calibration": calibration, "tokenizer": tokenizer, "verbose": progress}
    tried = [exact, *(candidate(model, s, **options) for s in dict.fromkeys(specs))]

    sizes: dict[str, float] = {}
    batches = -(-len(data) // batch)
    steps = batches * len(tried) * len(pieces(tokens, chunk, decode))
    with tqdm(total=steps, desc="text", unit="chunk", disable=not progress) as bar:
        scores = measure(
            model,
            {c.name: c.make for c in tried},
            mx.array(data),
            chunk,
            bar.update,
            lambda name, caches: sizes.__setitem__(name, bytes_per_token(caches)),
            batch,
            decode,
        )
    results = [summarize(c.name, scores[c.name], scores[exact.name], sizes[c.name]) for c in tried]
    for result, c in zip(results, tried, strict=True):
        result.note = "; ".join(filter(None, [c.note, "" if decode else _note(c, chunk)]))
    if recall:
        with tqdm(total=len(recall) * len(tried), desc="recall", disable=not progress) as bar:
            for result, c in zip(results, tried, strict=True):
                result.recall, result.prompts = 0, len(recall)
                for item in recall:
                    result.recall += answers(model, tokenizer, c, item, chunk)
                    bar.update()
    setting = {
        "model": type(model).__module__.rpartition(".")[2],
        "dtype": exact.name.partition("(")[2].rstrip(")"),
        "texts": len(texts), "windows": len(data), "tokens": tokens, "chunk": chunk,
        "decode": decode,
        "device": str(mx.default_device()), "platform": platform.platform(),
        "versions": {"mlx_kvq": __version__, **{p: version(p) for p in ("mlx", "mlx-lm")}},
    }  # fmt: skip
    return Evaluation(setting, results)


def _check(specs, texts, windows: int, tokens: int, chunk: int, decode: int, batch: int) -> None:
    sizes = {"windows": windows, "tokens": tokens, "chunk": chunk, "batch": batch}
    for name, given in sizes.items():
        arguments.integer(name, given)
    arguments.integer("decode", decode, 0)
    if decode and decode >= tokens:
        raise ValueError(f"decode={decode} tokens of a window of {tokens} leave no prompt.")
    for name, several in (("specs", specs), ("texts", texts)):
        if isinstance(several, str | Spec):
            raise ValueError(f"{name} is a list, got {several!r:.60}.")
    if not decode and tokens <= chunk:
        raise ValueError(
            f"{windows} windows of {tokens} tokens in chunks of {chunk}: a window needs more "
            "tokens than a chunk, and there must be one of each at least."
        )
    if not texts:
        raise ValueError("There is no text to evaluate on.")
    for spec in specs:
        check_name(spec)


def _fed(setting: dict) -> str:
    """How the windows of an evaluation were fed, in words."""
    start = "{windows} windows of {tokens} tokens in chunks of {chunk}".format(**setting)
    if decode := setting.get("decode"):
        return f"{start}, the last {decode} one at a time, which are scored"
    return f"{start}, the first chunk not scored"


def _note(cache: Contender, chunk: int) -> str:
    """Chunks of a prompt read more tokens exactly than decoding does."""
    if Rival.parse(cache.name) and chunk > DECODE_QUERIES:
        return (
            f"read as a prompt, whose chunks of {chunk} read themselves exactly; --chunk 1 reads "
            "as decoding does"
        )
    spec = Spec.parse(cache.name) if "-" in cache.name else None
    if spec is None or not spec.recent or chunk <= DECODE_QUERIES:
        return ""
    return (
        f"read as a prompt, whose tokens read their block of {BLOCK} exactly; --chunk "
        f"{DECODE_QUERIES} reads as decoding does"
    )


def answers(model: nn.Module, tokenizer, cache: Contender, item: dict, chunk: int) -> bool:
    """Whether greedy decoding after ``item["prompt"]`` writes ``item["answer"]`` exactly."""
    prompt = mx.array(tokenizer.encode(item["prompt"]))
    caches = cache.make()
    for start in range(0, prompt.size, chunk):
        logits = model(prompt[None, start : start + chunk], cache=caches)
        mx.eval(logits)
    return writes(model, tokenizer, caches, logits, item["answer"])


def writes(model: nn.Module, tokenizer, caches: list, logits: mx.array, answer: str) -> bool:
    """Whether greedy decoding writes ``answer`` after what ``caches`` hold; ``logits`` [1, L, V]
    are the last ones so far."""
    answer, written = answer.strip(), []
    for _ in range(len(tokenizer.encode(f" {answer}")) + 1):
        written.append(int(logits[0, -1].argmax()))
        text = tokenizer.decode(written).strip()
        if len(text) >= len(answer) or not answer.startswith(text):
            break
        logits = model(mx.array([written[-1:]]), cache=caches)
    return text.startswith(answer)


def _windows(tokenizer, text: str, windows: int, tokens: int, place: int) -> list[list[int]]:
    """``windows`` pieces of a text; where the model expects it, each begins with BOS."""
    bos = getattr(tokenizer, "bos_token_id", None)
    start = [bos] if bos is not None and tokenizer.encode("a")[:1] == [bos] else []
    size = tokens - len(start)
    need = windows * size
    # A token is seldom longer than 16 characters; encoding all of a long text takes a while.
    for part in dict.fromkeys((text[: 16 * need], text)):
        ids = tokenizer.encode(part, add_special_tokens=False)
        if len(ids) >= need:
            return [start + ids[i * size : (i + 1) * size] for i in range(windows)]
    raise ValueError(
        f"Text {place + 1} has {len(ids)} tokens, and {windows} windows of {tokens} need {need}: "
        f"{len(ids) // size} windows fit."
    )


def read_recall(path: str | os.PathLike, limit: int | None = None) -> list[dict]:
    """Key-recall prompts from a JSON-lines file of ``{"prompt": …, "answer": …}``. Raises
    ValueError if the file is missing or a line is something else."""
    items: list[dict] = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            items.append({key: str(item[key]) for key in ("prompt", "answer")})
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f'{path}, line {number}: not {{"prompt": …, "answer": …}} in JSON.'
            ) from None
    if not items:
        raise ValueError(f"{path} holds no prompts.")
    return items[:limit]


def load_model(name: str):
    """:func:`mlx_kvq.model.loading.load`, with a clear error for a missing directory."""
    local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if local and not Path(name).is_dir():
        raise ValueError(f"There is no model directory {name}.")
    return load(name)


def _layout(rows: list[list[str]], markdown: bool) -> list[str]:
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return [lines[0], "|---" + "|--:" * (len(rows[0]) - 1) + "|", *lines[1:]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def _range(e: Estimate, form: str) -> str:
    return "" if math.isnan(e.low) else f" [{e.low:{form}}, {e.high:{form}}]"
