"""The model card (README.md) of a converted repository, as the Hugging Face hub reads it.

An existing card keeps its text and its metadata; ours is a block between two comments, which the
next conversion replaces.
"""

import platform
import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..files import line, replacing
from ..measure.evaluate import Evaluation
from ..model.report import Report

TAGS = ("mlx", "mlx_kvq", "kv-cache-quantization")
OURS = "kv_cache"  # argument of our results' metrics: the next conversion replaces those
_BLOCK = re.compile(r"<!-- mlx_kvq -->.*?<!-- /mlx_kvq -->\n?", re.DOTALL)
_TEXT = """\
<!-- mlx_kvq -->
## KV cache

Keys and values of this model are kept as `{spec}`: {what}. Where mlx_kvq is installed beside \
mlx-lm, no option is needed:

```sh
mlx_lm.generate --model {name} --prompt "Hello"
mlx_lm.server --model {name} --port 8080   # for any OpenAI client; requests are batched
```

`--kv-cache fp16` turns it off and another `--kv-cache` replaces it. Without mlx_kvq this is an \
ordinary mlx-lm model.

| cache | bytes per token, all layers |
|---|--:|
| fp16 | {fp16:.0f} |
| {spec} | {packed:.0f} ({times:.2f} times fewer) |

{more}<!-- /mlx_kvq -->
"""


def load(folder: Path) -> ModelCard:
    """The card of the repository in ``folder``, an empty one if there is none. Raises ValueError if
    the metadata of its README.md cannot be read."""
    path = folder / "README.md"
    try:
        return ModelCard.load(path) if path.is_file() else ModelCard("---\n{}\n---\n")
    except Exception as error:  # of the YAML library or of huggingface_hub
        raise ValueError(f"The metadata of '{path}' cannot be read: {line(error)}") from error


def make(
    folder: Path,
    name: str,
    report: Report,
    sizes: list[float],
    evaluation: Evaluation | None,
    texts: list[str],
    note: str = "",
) -> ModelCard:
    """The card of the repository in ``folder``, which users call ``name``, with a block about the
    cache: ``sizes`` are bytes per token in fp16 and packed, ``evaluation`` has both on ``texts``,
    ``note`` is a sentence about it. Errors as in :func:`load`."""
    card = load(folder)
    data: Any = card.data
    data.library_name = data.library_name or "mlx"
    data.pipeline_tag = data.pipeline_tag or "text-generation"
    tags = [data.tags] if isinstance(data.tags, str) else list(data.tags or ())
    data.tags = [*tags, *(tag for tag in TAGS if tag not in tags)]
    results = [r for r in data.eval_results or () if OURS not in (r.metric_args or {})]
    if evaluation is not None:
        results += _results(evaluation, texts)
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
    """Write README.md, whole or not at all."""
    target = folder / "README.md"
    with replacing(target) as part:
        card.save(part)
        if target.exists():
            shutil.copymode(target, part)


def _block(name, report, sizes, evaluation, texts, note) -> str:
    spec, (fp16, packed), more = report.spec, sizes, ""
    if spec.exact:
        more = f"To them come, for each sequence, {spec.exact} as in fp16.\n\n"
    if evaluation is not None:
        s = evaluation.setting
        unit = "GPU" if "gpu" in s["device"] else "CPU"
        versions = ", ".join(f"{k} {v}" for k, v in s["versions"].items())
        more += (
            f"### Measured on {', '.join(texts)}\n\n{evaluation.table(markdown=True)}\n\n"
            f"{note}Computed in {s['dtype']} on the {unit} of a machine with {platform.system()} "
            f"{platform.machine()}; {versions}.\n\n"
        )
    values = {"spec": spec, "what": str(report).removeprefix(f"{spec}: "), "name": name}
    times = fp16 / packed
    return _TEXT.format(fp16=fp16, packed=packed, times=times, more=more, **values)


def _results(evaluation: Evaluation, texts: list[str]) -> list[EvalResult]:
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
