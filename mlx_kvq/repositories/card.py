"""The model card (README.md) of a converted repository, as the Hugging Face hub reads it.

A card that is there keeps its text and its metadata; ours is a block between two comments, which
the next conversion replaces.
"""

import platform
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard

from ..files import line, replacing
from ..model.report import Report

if TYPE_CHECKING:
    from ..measure.evaluate import Evaluation


TAGS = ("mlx", "mlx_kvq", "kv-cache-quantization")
OURS = "kv_cache"  # argument of our results' metrics, by which the next conversion finds them
_BLOCK = re.compile(r"<!-- mlx_kvq -->.*?<!-- /mlx_kvq -->\n?", re.DOTALL)


def load(folder: Path) -> ModelCard:
    """The card of the repository in ``folder``, an empty one if there is none.

    Raises:
        ValueError: If the metadata of its README.md cannot be read.
    """
    path = folder / "README.md"
    try:
        return ModelCard.load(path) if path.is_file() else _empty()
    except Exception as error:  # of the YAML library or of huggingface_hub
        raise ValueError(f"The metadata of '{path}' cannot be read: {line(error)}") from error


def make(
    folder: Path,
    name: str,
    report: Report,
    sizes: list[float],
    evaluation: "Evaluation | None",
    texts: list[str],
    note: str = "",
) -> ModelCard:
    """The card of the repository in ``folder``, with what it says of the cache.

    Args:
        folder (Path): The repository; its README.md is read, not written.
        name (str): What a user types to load it.
        report (Report): What the cache does to the model.
        sizes (list): Bytes per token, measured: in fp16 and packed.
        evaluation (Evaluation, optional): fp16 and the cache on ``texts``.
        texts (list): Their names.
        note (str): What else is to be said of the evaluation.

    Raises:
        ValueError: As :func:`load`.
    """
    card = load(folder)
    data: Any = card.data
    data.library_name = data.library_name or "mlx"
    data.pipeline_tag = data.pipeline_tag or "text-generation"
    tags = [data.tags] if isinstance(data.tags, str) else list(data.tags or ())
    data.tags = [*tags, *(tag for tag in TAGS if tag not in tags)]
    others = [r for r in data.eval_results or () if OURS not in (r.metric_args or {})]
    results = others if evaluation is None else others + _results(evaluation, texts)
    data.eval_results = results or None
    data.model_name = (data.model_name or name) if results else None
    block = _block(name, report, sizes, evaluation, texts, note)
    text = card.text.strip()
    if _BLOCK.search(text):
        text = _BLOCK.sub(lambda _: block, text, count=1)
    else:
        text = f"{text or f'# {Path(name).name}'}\n\n{block}"
    card.text = f"\n{text.rstrip()}\n"
    return card


def write(folder: Path, card: ModelCard) -> None:
    """Write README.md; one that was there stays whole until the new one is complete."""
    target = folder / "README.md"
    with replacing(target) as part:
        card.save(part)
        if target.exists():
            shutil.copymode(target, part)


def _empty() -> ModelCard:
    return ModelCard("---\n{}\n---\n")


def _block(name, report, sizes, evaluation, texts, note) -> str:
    before, after = sizes
    what = str(report).removeprefix(f"{report.spec}: ")
    lines = [
        "<!-- mlx_kvq -->",
        "## KV cache",
        "",
        f"Keys and values of this model are kept as `{report.spec}`: {what}. Where mlx_kvq is "
        "installed beside mlx-lm, no option is needed:",
        "",
        "```sh",
        f'mlx_lm.generate --model {name} --prompt "Hello"',
        "```",
        "",
        "`--kv-cache fp16` turns it off and another `--kv-cache` replaces it. Without mlx_kvq "
        "this is an ordinary mlx-lm model.",
        "",
        "| cache | bytes per token, all layers |",
        "|---|--:|",
        f"| fp16 | {before:.0f} |",
        f"| {report.spec} | {after:.0f} ({before / after:.2f} times fewer) |",
        "",
    ]
    if recent := report.spec.recent:
        lines += [f"To them come, for each sequence, the newest {recent} tokens as in fp16.", ""]
    if evaluation is not None:
        s = evaluation.setting
        versions = ", ".join(f"{k} {v}" for k, v in s["versions"].items())
        lines += [
            f"### Measured on {', '.join(texts)}",
            "",
            evaluation.table(markdown=True),
            "",
            f"{note}Computed in {s['dtype']} on {_machine(s['device'])}; {versions}.",
            "",
        ]
    return "\n".join([*lines, "<!-- /mlx_kvq -->", ""])


def _machine(device: str) -> str:
    where = "GPU" if "gpu" in device else "CPU"
    return f"the {where} of a machine with {platform.system()} {platform.machine()}"


def _results(evaluation: "Evaluation", texts: list[str]) -> list[EvalResult]:
    """Figures for the hub's model index: perplexity of both caches, KL and recall of ours."""
    fp16, ours = evaluation.results[1:3]
    figures = [
        ("perplexity", "Perplexity", fp16.name, fp16.perplexity.mean),
        ("perplexity", "Perplexity", ours.name, ours.perplexity.mean),
        ("kl_divergence", "KL from the model's own cache", ours.name, ours.kl.mean),
    ]
    for r in (fp16, ours):
        if r.recall is not None:
            figures.append(("exact_match", "Key recall", r.name, r.recall / r.prompts))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=", ".join(texts),
            metric_type=kind,
            metric_name=f"{label}, {cache}",
            metric_value=round(value, 6),
            metric_args={OURS: cache},
        )
        for kind, label, cache, value in figures
    ]
