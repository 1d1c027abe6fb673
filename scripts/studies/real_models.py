"""A real model with many caches at several contexts: KL, perplexity, recall and bytes, in one JSON.

All caches read the same documents. A document is a prompt, read in chunks, then ``--decode`` tokens
one at a time. Two things are scored: these tokens (leg ``decode``), and every few of the prompt's
last chunk (leg ``prompt``: as prompts read, where a chunk reads more of itself exactly; a packed
cache reads all of its first 512 tokens so). The model is loaded once, its own logits are computed
once for each document and context, and the automatic calibration once. Every figure is written as
soon as it is there; the same command goes on where an earlier one stopped. Several models may be in
one file.

    MLX_KVQ_BACKEND=reference MLX_ENABLE_TF32=0 python scripts/studies/real_models.py \\
        --model MODEL --text novel.txt articles.txt --recall recall.jsonl --json real_models.json

``scripts/tables.py real_models.json`` prints the tables, ``scripts/pictures.py`` draws it from
``docs/pictures``. Intervals are 95 %, by bootstrap over documents and their tokens. Recall: codes
stand in a text of that many tokens, each is asked for by a copy of the cache that read the text.
"""

import argparse
import copy
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from codes import CODES, Codes, codes_of, facts_of
from texts import Document, documents_of
from tqdm import tqdm

from mlx_kvq.caches.attention import DECODE_QUERIES
from mlx_kvq.calibration import automatic
from mlx_kvq.calibration.set import CalibrationSet
from mlx_kvq.commands.benchmark import record
from mlx_kvq.commands.options import length
from mlx_kvq.files import line, read_text, replacing
from mlx_kvq.format.spec import BITS
from mlx_kvq.measure.baselines import Contender, bytes_per_token, candidate, check_name, own
from mlx_kvq.measure.evaluate import load_model, writes
from mlx_kvq.measure.quality import Piece, compare, read
from mlx_kvq.model.report import log
from mlx_kvq.stock import longest_context

PLAIN = "recent=0,first=0"
PAPER = f"int4-srft:group_size=64,scale=paper,calibrate=off,{PLAIN}"
GROUPS = {
    "default": ("fp16", "int8-srft", "k8v4-srft", "int4-srft"),
    # What each part brings alone, and more of it.
    "parts": (
        "int4-srft:first=0", "int4-srft:recent=0", f"int4-srft:{PLAIN}",
        "int4-srft:calibrate=off", f"int4-srft:calibrate=off,{PLAIN}",
        "int4-srft:group_size=32", "int4-srft:recent=16", "int4-srft:recent=256",
        "int4-srft:rounding=feedback",
    ),
    # Block schemes keep up to a block exactly: compare them with recent=64 and recent=128.
    "rivals": ("kv4", "kv8", "kivi", "kivi:first=4", "kvarn", "kvarn:first=4"),
    # Rotations and the paper's scale with all else of the default, and as the paper has them.
    "ablations": (
        "int4-srht", "int4-householder", "int4-quaternion", "int4-none", "int4-srft:scale=paper",
        PAPER, *(PAPER.replace("srft", r) for r in ("srht", "householder", "quaternion", "none")),
    ),
    # Fewer bits than int4, as far as this version has them.
    "low": (
        *(f"{bits}-srft" for bits in BITS if bits not in ("int4", "int8", "k8v4")),
        "kivi:bits=3", "kvarn:bits=3", "kivi:bits=2", "kvarn:bits=2",
    ),
}  # fmt: skip
CONTEXTS, RECALLED = (1024, 8192, 32768), (1024, 8192, 30720)
LEGS = ("decode", "prompt")
RESAMPLES = 2000
FLOOR = 1e-9  # nats; rounding can make the KL of a certain token negative


def caches_of(only: list[str]) -> list[str]:
    """The caches of these groups, or names of caches; each once. Raises ValueError for others."""
    names: dict[str, None] = {}
    for given in only:
        if given not in GROUPS:
            try:
                check_name(given)
            except ValueError as error:
                raise ValueError(f"--only takes groups ({', '.join(GROUPS)}). {error}") from None
        names |= dict.fromkeys(GROUPS.get(given, (given,)))
    return list(names)


def plan_of(context: int, decode: int, chunk: int, scored: int) -> list[Piece]:
    """A prompt of ``context`` tokens in chunks, of whose last one about ``scored`` tokens count,
    then single ones. A prompt of one chunk reads back nothing, so chunks are at most half of it."""
    starts = list(range(0, context, min(chunk, context // 2)))
    plan = [(a, b, 0) for a, b in zip(starts, [*starts[1:], context], strict=True)]
    a, b, _ = plan[-1]
    plan[-1] = (a, b, max(1, (b - a) // scored) if scored else 0)
    return plan + [(i, i + 1, 1) for i in range(context, context + decode)]


def batches(windows: mx.array, batch: int) -> Iterator[mx.array]:
    for first in range(0, windows.shape[0], batch):
        yield windows[first : first + batch]


@dataclass
class Task:
    """Documents of one context, how they are fed, and the model's own logits."""

    context: int
    documents: list[Document]
    plan: list[Piece]
    batch: int
    # Of each batch, the log-probabilities after each piece of which tokens are scored.
    exact: list[list[mx.array]] = field(default_factory=list)

    @property
    def windows(self) -> mx.array:
        return mx.array([d.ids for d in self.documents])

    def feed(self, model, make: Callable[[], list], advance) -> Iterator[tuple[int, Piece, Any]]:
        """(batch, piece, log-probabilities) of every piece that is scored."""
        for i, some in enumerate(batches(self.windows, self.batch)):
            self.caches = make()
            for piece, got in zip(
                self.plan, read(model, self.caches, some, self.plan), strict=True
            ):
                if got is not None:
                    yield i, piece, got
                advance(1)

    def read_own(self, model: nn.Module, advance: Callable[[int], object]) -> None:
        self.exact = [[] for _ in batches(self.windows, self.batch)]
        for i, _, got in self.feed(model, own(model).make, advance):
            mx.eval(got)
            self.exact[i].append(got)

    def score(self, readings: Iterator[tuple[int, Piece, Any]]) -> dict[str, "Leg"]:
        """The legs of a cache from what :meth:`feed` gives."""
        parts: dict[str, dict[int, list]] = {leg: {} for leg in LEGS}
        windows = list(batches(self.windows, self.batch))
        exact = [iter(logits) for logits in self.exact]
        for i, (start, end, step), got in readings:
            targets = windows[i][:, start + 1 : end + 1][:, ::step]
            figures = compare(next(exact[i]), got, targets)
            mx.eval(figures)
            leg = "decode" if start >= self.context else "prompt"
            parts[leg].setdefault(i, []).append([np.array(f, dtype=np.float64) for f in figures])
        return {leg: Leg.joined(list(found.values())) for leg, found in parts.items() if found}

    def own(self) -> dict[str, "Leg"]:
        """The legs of the model's own cache: the losses to compare with."""
        scored = [piece for piece in self.plan if piece[2]]
        pairs = ((i, *x) for i, e in enumerate(self.exact) for x in zip(scored, e, strict=True))
        return self.score(pairs)


@dataclass
class Leg:
    """The scores of one cache in one leg, [documents, tokens] each."""

    kl: np.ndarray
    same: np.ndarray
    loss: np.ndarray

    @classmethod
    def joined(cls, batches: list[list[list[np.ndarray]]]) -> "Leg":
        rows = [[np.concatenate(p, axis=1) for p in zip(*b, strict=True)] for b in batches]
        return cls(*(np.concatenate(p) for p in zip(*rows, strict=True)))


def geometric(kl: np.ndarray, axis=None):
    return np.exp(np.log(np.maximum(kl, FLOOR)).mean(axis=axis))


def resampled(x: np.ndarray, seed: int = 0) -> np.ndarray:
    """Draws of documents with replacement, and of the tokens of each, [RESAMPLES, all tokens]. The
    same shape and seed draw the same places."""
    rng = np.random.default_rng(seed)
    documents, tokens = x.shape
    rows = rng.integers(0, documents, (RESAMPLES, documents, 1))
    places = rng.integers(0, tokens, (RESAMPLES, documents, tokens))
    return x[rows, places].reshape(RESAMPLES, -1)


def interval(value, draws: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(draws, (0.025, 0.975))
    return {"mean": float(value), "low": float(low), "high": float(high)}


def summary(leg: Leg, own: Leg, texts: list[str]) -> dict:
    """The figures of one leg, with each document's and each token's KL."""
    kl, difference = leg.kl, leg.loss - own.loss
    draws = resampled(kl)
    each = [
        {
            "text": text, "kl": float(kl[i].mean()), "geometric": float(geometric(kl[i])),
            "top1": float(leg.same[i].mean()),
            "perplexity_ratio": float(np.exp(difference[i].mean())),
        }
        for i, text in enumerate(texts)
    ]  # fmt: skip
    changes = np.exp(resampled(difference).mean(axis=1))
    return {
        "kl": interval(kl.mean(), draws.mean(axis=1)),
        "geometric": interval(geometric(kl), geometric(draws, axis=1)),
        "top1": interval(leg.same.mean(), resampled(leg.same).mean(axis=1)),
        "perplexity": float(np.exp(leg.loss.mean())),
        "perplexity_ratio": interval(np.exp(difference.mean()), changes),
        "documents": each,
        "tokens": [[float(f"{x:.3e}") for x in row] for row in kl],
    }


def recall(model, tokenizer, make, texts: list[Codes], chunk: int, advance) -> list[int]:
    """How many codes of each text are written exactly."""
    found = []
    for text in texts:
        caches, ids = make(), mx.array(text.ids)[None]
        for i in range(0, ids.shape[1], chunk):
            model(ids[:, i : i + chunk], cache=caches)
            mx.eval([c.state for c in caches])
            advance(1)
        found.append(0)
        for question, code in text.questions:
            asked = mx.array(tokenizer.encode(question, add_special_tokens=False))[None]
            copied = copy.deepcopy(caches)
            for i in range(0, asked.shape[1], DECODE_QUERIES):
                logits = model(asked[:, i : i + DECODE_QUERIES], cache=copied)
            found[-1] += writes(model, tokenizer, copied, logits, code)
            advance(1)
    return found


@dataclass
class Kept:
    """The JSON file: what is in it already, and how a row gets in."""

    path: Path
    data: dict

    @classmethod
    def open(cls, path: Path) -> "Kept":
        if not path.exists():
            return cls(path, {"record": {}, "models": {}, "rows": []})
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {line(error)}") from None
        if not isinstance(data, dict) or not {"record", "models", "rows"} <= set(data):
            raise ValueError(f"{path} was not written by this script: give another --json.")
        return cls(path, data)

    def setting(self, model: str, given: dict) -> None:
        """Raise ValueError if the file holds figures of this model that were made otherwise."""
        before = self.data["models"].setdefault(model, given)
        if other := [k for k in given if before.get(k) != given[k]]:
            said = ", ".join(f"{k} {before.get(k)!r}, now {given[k]!r}" for k in other)
            raise ValueError(f"{self.path} holds {model} with {said}: give another --json.")

    def has(self, key: dict) -> bool:
        rows = (row for row in self.data["rows"] if "failed" not in row)
        return any(all(row.get(k) == v for k, v in key.items()) for row in rows)

    def add(self, key: dict, figures: dict) -> None:
        """Put a row in place of one of the same key, and write the file."""
        rows = [r for r in self.data["rows"] if any(r.get(k) != v for k, v in key.items())]
        commit = self.data["record"].get("commit")
        self.data["rows"] = [*rows, {**key, **figures, "commit": commit}]
        self.write(self.path)

    def write(self, path: Path, tokens: bool = True) -> None:
        """The whole file, or what pictures and tables need of it."""
        data = copy.deepcopy(self.data)
        for row in [] if tokens else data["rows"]:
            for leg in LEGS:
                row.get(leg, {}).pop("tokens", None)
        with replacing(path) as part:
            part.write_text(json.dumps(data, indent=None if tokens else 1) + "\n", "utf-8")


@dataclass
class Study:
    """One model, and everything that its caches share."""

    args: argparse.Namespace
    model: nn.Module
    tokenizer: Any
    texts: dict[str, list[int]]
    calibration: CalibrationSet | None
    kept: Kept
    bar: tqdm
    made: dict[str, Contender] = field(default_factory=dict)

    def contender(self, name: str) -> Contender:
        if name not in self.made:
            options = {"calibration": self.calibration, "tokenizer": self.tokenizer}
            self.made[name] = candidate(self.model, name, **options)
        return self.made[name]

    def key(self, kind: str, context: int, cache: str) -> dict:
        model = Path(self.args.model).name
        return {"kind": kind, "model": model, "context": context, "cache": cache}

    def missing(self, kind: str, context: int) -> list[str]:
        wanted = {"prompts": CODES * self.args.recall_texts} if kind == "recall" else {}
        keys = {n: self.key(kind, context, n) | wanted for n in self.args.caches}
        return [name for name, key in keys.items() if not self.kept.has(key)]

    def attempt(self, kind: str, context: int, cache: str, work: Callable[[str], dict]) -> None:
        """Keep what ``work`` gives, or say why it failed and go on with the next."""
        self.bar.set_description(f"{kind} at {context}: {cache}")
        began, before = time.perf_counter(), self.bar.n
        try:
            figures = work(cache)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            figures = {"failed": line(error)}
            self.bar.write(f"{context}, {cache} failed: {line(error)}", file=sys.stderr)
            self.bar.total -= self.share(kind, context) - (self.bar.n - before)
        figures["seconds"] = round(time.perf_counter() - began, 1)
        self.kept.add(self.key(kind, context, cache), figures)
        mx.clear_cache()

    def task(self, context: int) -> Task:
        args = self.args
        need = context + args.decode + 1
        documents = documents_of(self.tokenizer, self.texts, args.documents, need)
        if not documents:
            raise ValueError(f"No text has {need} tokens: {', '.join(self.texts)}.")
        plan = plan_of(context, args.decode, args.chunk, args.prompt)
        return Task(context, documents, plan, args.batch)

    def quality(self, context: int) -> None:
        """KL, perplexity and bytes of every cache that is missing at this context."""
        names = self.missing("quality", context)
        if not names:
            return
        task = self.task(context)
        self.bar.set_description(f"own logits at {context}")
        task.read_own(self.model, self.bar.update)
        exact, texts = task.own(), [d.text for d in task.documents]

        def work(name: str) -> dict:
            contender = self.contender(name)
            legs = task.score(task.feed(self.model, contender.make, self.bar.update))
            found: dict = {leg: summary(x, exact[leg], texts) for leg, x in legs.items()}
            size = bytes_per_token(task.caches)
            return {"bytes_per_token": size, "note": contender.note, **found}

        for name in names:
            self.attempt("quality", context, name, work)

    def recall(self, context: int, texts: list[Codes]) -> None:
        """Exact codes of every cache that is missing at this context."""
        args = self.args

        def work(name: str) -> dict:
            make = self.contender(name).make
            right = recall(self.model, self.tokenizer, make, texts, args.chunk, self.bar.update)
            return {"recall": sum(right), "prompts": CODES * len(texts), "texts": right}

        for name in self.missing("recall", context):
            self.attempt("recall", context, name, work)

    def share(self, kind: str, context: int) -> int:
        """Calls of the model for one cache."""
        args = self.args
        if kind == "recall":
            return args.recall_texts * (-(-context // args.chunk) + CODES)
        task = self.task(context)
        return len(task.plan) * -(-len(task.documents) // args.batch)

    def steps(self, kind: str, contexts: list[int]) -> int:
        """Calls of the model that are left."""
        total = 0
        for context in contexts:
            if left := len(self.missing(kind, context)):
                total += self.share(kind, context) * (left + (kind == "quality"))
        return total


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder")
    parser.add_argument("--text", nargs="+", required=True, help="held-out texts")
    parser.add_argument("--json", type=Path, required=True, help="goes on if it is there")
    parser.add_argument("--only", nargs="+", default=list(GROUPS), metavar="GROUP",
                        help=f"groups ({', '.join(GROUPS)}) or caches")  # fmt: skip
    parser.add_argument("--contexts", type=length, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--documents", type=int, default=6, help="of each text, if they fit")
    parser.add_argument("--decode", type=int, default=64, help="tokens after a prompt")
    parser.add_argument("--prompt", type=int, default=128, help="scored tokens of a prompt")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a prompt at once")
    parser.add_argument("--batch", type=int, default=1, help="documents side by side")
    parser.add_argument("--calibration", metavar="FILE", help="instead of the automatic one")
    parser.add_argument("--recall", metavar="FILE", help="prompts with codes, JSON lines")
    parser.add_argument("--recall-contexts", type=length, nargs="+", default=list(RECALLED))
    parser.add_argument("--recall-texts", type=int, default=4, help=f"with {CODES} codes each")
    parser.add_argument("--dtype", default="float32", help="to compute in")
    parser.add_argument("--slim", type=Path, help="also write it without the tokens' KL")
    return parser


def capped(contexts: list[int], most: int | None, besides: int) -> list[int]:
    """The contexts that the model allows, shortest first; says which are left out."""
    fit = [c for c in sorted(set(contexts)) if most is None or c + besides <= most]
    if left := sorted(set(contexts) - set(fit)):
        log(f"left out: {', '.join(map(str, left))} tokens of context: the model takes {most}")
    return fit


def main() -> None:
    args = arguments().parse_args()
    try:
        run(args)
    except ValueError as error:
        raise SystemExit(f"real_models.py: {error}") from None


def run(args: argparse.Namespace) -> None:
    args.caches = caches_of(args.only)
    facts = facts_of(args.recall) if args.recall else []
    texts = {Path(path).name: read_text(path) for path in args.text}
    kept = Kept.open(args.json)
    given = CalibrationSet.load(args.calibration) if args.calibration else None
    names = ("documents", "decode", "prompt", "chunk", "dtype")
    setting = {name: getattr(args, name) for name in names} | {"texts": list(texts)}
    setting["calibration"] = Path(args.calibration).name if args.calibration else "automatic"
    kept.setting(Path(args.model).name, setting)
    kept.data["record"] = {**record(), "command": shlex.join(["python", *sys.argv])}
    model, tokenizer = load_model(args.model)
    model.set_dtype(getattr(mx, args.dtype))
    calibration = given or automatic.automatic(model, tokenizer, log)
    most = longest_context(model)
    contexts = capped(args.contexts, most, args.decode)
    recalled = capped(args.recall_contexts, most, 64) if facts else []
    ids = {n: tokenizer.encode(t, add_special_tokens=False) for n, t in texts.items()}
    codes = {c: codes_of(tokenizer, facts, ids, args.recall_texts, c) for c in recalled}
    with tqdm(unit="call", mininterval=1, dynamic_ncols=True) as bar:
        study = Study(args, model, tokenizer, ids, calibration, kept, bar)
        bar.reset(study.steps("quality", contexts) + study.steps("recall", recalled))
        for context in contexts:
            study.quality(context)
        for context, found in codes.items():
            study.recall(context, found)
    if args.slim:
        kept.write(args.slim, tokens=False)


if __name__ == "__main__":
    main()
