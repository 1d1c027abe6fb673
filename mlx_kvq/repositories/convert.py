"""``mlx_kvq convert``: a model repository with its KV cache.

Either ``mlx_lm.convert``, with all its options, and then the cache; or the cache alone, added in
place. A new repository is complete or does not exist, and an interruption leaves an old one usable.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import mlx.core as mx
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import validate_repo_id

from .. import __version__
from ..caches.packed import PackedCache
from ..calibration.fit import calibrate, sample_text
from ..files import line, size
from ..format.spec import OFF, Spec
from ..measure.baselines import bytes_per_token, candidate
from ..measure.evaluate import evaluate
from ..model.enable import enable
from ..model.loading import code_allowed, load
from ..model.report import log
from ..stock import leaves
from . import card as model_card
from . import repository

WINDOW, WINDOWS = 1024, 16  # tokens and windows of an evaluation, at most
LEAST = 512  # tokens of a text to evaluate on
SAMPLE, HELD_OUT = "built-in sample", "held-out text"  # names of texts in a card


def convert(
    hf_path: str | None = None,
    mlx_path: str | Path = "mlx_model",
    *,
    kv_cache: str | Spec = "int4-srft",
    calibration_text: str | Sequence[str] | None = None,
    evaluate_on: dict[str, str] | None = None,
    recall: Sequence[dict] = (),
    upload_repo: str | None = None,
    private: bool = False,
    progress: bool = True,
    **options,
) -> Path:
    """Convert a model to MLX and add a packed, calibrated KV cache; or add it to a model that is
    converted already.

    Args:
        hf_path (str, optional): As for ``mlx_lm.convert``. Without it ``mlx_path`` is a local
            repository that gets the cache in place.
        mlx_path (str or Path): The repository.
        kv_cache (str or Spec): The repository's cache, for example ``"int4-srft"``.
        calibration_text (str or Sequence of str, optional): As for :func:`mlx_kvq.calibrate`.
        evaluate_on (dict, optional): Name -> text that the model has not seen. The model card
            then has perplexity, KL and ``recall`` on it, and the names.
        recall (Sequence): ``{"prompt": …, "answer": …}``, as for :func:`mlx_kvq.evaluate`.
        upload_repo (str, optional): Repository of the Hugging Face hub to upload to.
        private (bool): Make that repository a private one.
        progress (bool): Show progress bars.
        options: Those of ``mlx_lm.convert``: ``quantize``, ``q_bits``, ``dtype`` …

    Returns:
        Path: ``mlx_path``.

    Raises:
        ValueError: If anything given cannot be used, or the upload fails; a message says what.
    """
    spec = Spec.parse(kv_cache)
    if spec is None:
        raise ValueError(f"'{OFF}' is what a model has without a section: use mlx_lm.convert.")
    if spec.calibrate == "off" and calibration_text is not None:
        raise ValueError(f"{spec} says calibrate=off, but a calibration text is given.")
    if recall and not evaluate_on:
        raise ValueError("Recall is part of the evaluation: give a text to evaluate on.")
    if private and upload_repo is None:
        raise ValueError("Nothing is uploaded that could be private: give --upload-repo.")
    if upload_repo is not None:
        validate_repo_id(upload_repo)
    if unknown := set(options) - set(_defaults()):
        raise TypeError(f"mlx_lm.convert takes no {', '.join(sorted(unknown))}.")
    target = Path(mlx_path)
    name = upload_repo or target.absolute().name
    trust = bool(options.get("trust_remote_code"))
    texts = evaluate_on or {}
    try:
        if hf_path is not None:
            with _converted(hf_path, target, options) as folder:
                _add(folder, name, spec, calibration_text, texts, recall, trust, progress)
        else:
            _check_in_place(target, options)
            if upload_repo is not None:
                repository.contents(target)
            _add(target, name, spec, calibration_text, texts, recall, trust, progress)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"'{target}' cannot be written: {reason}.") from error
    if upload_repo is not None:
        upload(target, upload_repo, private=private)
    return target


def _check_in_place(target: Path, options: dict) -> None:
    """Errors before the minutes of work."""
    defaults = _defaults()
    for name, value in options.items():
        if value != defaults[name] and name != "trust_remote_code":
            raise ValueError(
                f"{name} cannot be applied in place: give --hf-path to convert a model."
            )
    if not target.is_dir():
        raise ValueError(
            f"There is no repository '{target}' to add a cache to: give its --mlx-path, or "
            "--hf-path to convert a model."
        )
    repository.read_config(target)
    model_card.load(target)


@contextmanager
def _converted(hf_path: str, target: Path, options: dict) -> Iterator[Path]:
    """The folder of a converted model, which becomes ``target`` when the block ends."""
    if target.exists():
        raise ValueError(
            f"'{target}' exists already. Give another --mlx-path; or leave --hf-path out to add "
            "a cache to the model that is there."
        )
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{target.name}-") as folder:
        part = Path(folder) / "model"
        try:
            with repository.unread(), code_allowed(bool(options.get("trust_remote_code"))):
                import_module("mlx_lm.convert").convert(hf_path, str(part), **options)
        except Exception as error:
            raise ValueError(f"'{hf_path}' cannot be converted: {line(error)}") from error
        yield part
        os.rename(part, target)


def _defaults() -> dict:
    parameters = signature(import_module("mlx_lm.convert").convert).parameters
    return {k: p.default for k, p in parameters.items() if k not in ("hf_path", "mlx_path")}


def _add(
    folder: Path, name: str, spec: Spec, texts: str | Sequence[str] | None,
    evaluate_on: dict[str, str], recall: Sequence[dict], trust: bool, progress: bool,
) -> None:  # fmt: skip
    """Calibrate, evaluate and write the section, its file and the card."""
    with repository.unread():
        model, tokenizer = load(str(folder), trust=trust)
    windows = _windows(tokenizer, evaluate_on) if evaluate_on else {}
    calibration = None
    made = {"mlx_kvq": __version__, "mlx": version("mlx"), "mlx-lm": version("mlx-lm")}
    if spec.calibrate != "off":
        calibration = calibrate(model, tokenizer, texts, progress=progress)
        notes = "text", "tokens", "length", "positions"
        made |= {k: v for k, v in calibration.metadata.items() if k in notes}
    shows = progress and spec.budget is not None  # that takes its time
    report = enable(model, spec, calibration=calibration, tokenizer=tokenizer, verbose=shows)
    assert report is not None  # fp16 is refused
    own = leaves(model.make_cache())
    layers = {path: c.format.spec.bits for path, c in own if isinstance(c, PackedCache)}
    evaluation = None
    if evaluate_on:
        if mx.default_device().type == mx.DeviceType.cpu:
            model.set_dtype(mx.float32)  # half precision is only emulated there
        options: dict[str, Any] = {"recall": recall, "calibration": calibration, **windows}
        specs, held_out = [OFF, str(spec)], list(evaluate_on.values())
        evaluation = evaluate(model, tokenizer, specs, held_out, progress=progress, **options)
    sizes = [_bytes_per_token(model, tokenizer, c, calibration) for c in (OFF, spec)]
    seen = SAMPLE in evaluate_on and calibration is not None and texts is None
    note = "The calibration is from this text, which flatters the cache. " if seen else ""
    # The card first: it can fail.
    card = model_card.make(folder, name, report, sizes, evaluation, list(evaluate_on), note)
    repository.write(folder, spec, layers, calibration, made)
    model_card.write(folder, card)
    log(f"{name}: {report}")


def _windows(tokenizer, texts: dict[str, str]) -> dict[str, int]:
    """As many windows as the shortest text has, at most 16 of 1024 tokens."""
    most = 16 * WINDOW * WINDOWS  # characters
    tokens = min(len(tokenizer.encode(t[:most], add_special_tokens=False)) for t in texts.values())
    window = min(WINDOW, tokens // 2)
    if tokens < LEAST:
        raise ValueError(
            f"A text of {tokens} tokens is too short to evaluate on: {LEAST} are the least."
        )
    return {"windows": min(WINDOWS, tokens // window), "tokens": window}


def _bytes_per_token(model, tokenizer, spec, calibration) -> float:
    caches = candidate(model, spec, calibration=calibration, tokenizer=tokenizer).make()
    model(mx.array([tokenizer.encode(sample_text())[:128]]), cache=caches)
    return bytes_per_token(caches, tail=False)


def upload(folder: str | Path, name: str, *, private: bool = False) -> None:
    """Upload the files of a repository (:func:`mlx_kvq.repositories.repository.contents`) to the
    hub's repository ``name`` in one commit; lists them on stderr first. Raises ValueError if that
    fails; the folder stays whole."""
    folder = Path(folder)
    files = repository.contents(folder)
    log(f"uploading to {name}:")
    for path in files:
        log(f"{size(path):>12}  {path.relative_to(folder)}")
    parts = {folder / p.relative_to(folder).parts[0] for p in files}
    if others := sorted(line(p.name) for p in folder.iterdir() if p not in parts):
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
        log(f"not of the repository, and left out: {', '.join(others[:8])}{more}")
    try:
        api = HfApi()
        url = api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.model_info(url.repo_id).private:
            raise ValueError("the repository exists already and is public.")
        api.create_commit(
            url.repo_id,
            [CommitOperationAdd(p.relative_to(folder).as_posix(), p) for p in files],
            commit_message="Upload with mlx_kvq",
        )
    except Exception as error:  # the client raises those of its HTTP library, too
        again = f"upload({str(folder)!r}, {name!r}{', private=True' if private else ''})"
        raise ValueError(
            f"'{folder}' is complete but could not be uploaded to '{name}': {line(error)} "
            f'Try again with: python -c "from mlx_kvq.repositories.convert import upload; {again}"'
        ) from error
    log(f"uploaded to {url}")
