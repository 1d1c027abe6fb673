"""The KV cache of a converted model repository: its section, its file, its use.

The object ``kv_cache`` of ``config.json`` (:mod:`.section`), and ``kv_cache.safetensors`` with the
calibration; ``docs/repositories.md`` lists the fields. mlx-lm ignores both. Both are checked before
use, and nothing in them is executed.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import mlx.nn as nn
from mlx_lm import utils

from ..calibration.set import METRIC, CalibrationSet, LayerCalibration
from ..files import line, parse_json, printable, quoted, regular
from ..format.spec import Spec
from ..model.enable import enable
from ..model.report import Report, log
from .section import FORMAT, KEY, Layers, RepositoryError, Section

FILE = "kv_cache.safetensors"
LARGEST = 1 << 30  # bytes of a calibration file; 80 layers of 8 heads take 42 MB with the metric
LARGEST_CONFIG = 1 << 26  # bytes of config.json; those of quantized models have some 10^5
# The files of a model repository, by transformers' and mlx-lm's names, beside code that config.json
# and its like name.
CONTENTS = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    FILE, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model",
    "tiktoken.model", "*.tiktoken", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.md", "NOTICE.txt",
)  # fmt: skip
_MODULE = re.compile(r"[A-Za-z_]\w*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass
class Repository:
    """A repository with a section."""

    folder: Path  # holds config.json; a snapshot if the model is from a hub
    given: object  # the section as JSON gave it, unchecked
    name: str  # the folder, or the repository of the hub
    revision: str | None = None  # of the hub's repository

    @property
    def said(self) -> str:
        """The spec, unchecked, for a message."""
        spec = self.given.get("spec") if isinstance(self.given, dict) else None
        return str(spec) if printable(spec) else "cache"

    @property
    def other(self) -> str | None:
        """Name of the program that reads this section, if that is not this one."""
        name = self.given.get("format") if isinstance(self.given, dict) else None
        return name if isinstance(name, str) and name != FORMAT else None

    @cached_property
    def section(self) -> Section:
        return Section.parse(self.given)

    @cached_property
    def calibration(self) -> CalibrationSet | None:
        """From the file, which is fetched if need be. Raises RepositoryError if it is missing,
        damaged, or not the one of the section."""
        if self.section.sha256 is None:
            return None
        path = self.path
        if (size := path.stat().st_size) > LARGEST:
            raise RepositoryError(f"{FILE} has {size} bytes, more than any calibration.")
        if (found := _file_sha256(path)) != self.section.sha256:
            raise RepositoryError(
                f"{FILE} has the SHA-256 {found[:16]}…, and config.json is of "
                f"{self.section.sha256[:16]}…: it is damaged, or of another conversion."
            )
        try:
            return CalibrationSet.load(path)
        except ValueError as error:
            raise RepositoryError(line(error).replace(str(path), FILE)) from None

    @property
    def path(self) -> Path:
        """The calibration file, from the hub if need be: mlx-lm fetches only
        ``model*.safetensors``. Raises RepositoryError if there is none."""
        path = self.folder / FILE
        if not os.path.lexists(path) and not Path(self.name).exists():
            # The model's snapshot, also when the hub has moved on meanwhile.
            commit = self.folder.name if _COMMIT.fullmatch(self.folder.name) else self.revision
            try:
                path = utils._download(self.name, revision=commit, allow_patterns=[FILE]) / FILE
            except Exception as error:
                raise RepositoryError(f"{FILE} cannot be fetched: {line(error)}") from error
        if not os.path.lexists(path):
            raise RepositoryError(f"{FILE} is missing.")
        try:
            regular(path)
        except (OSError, ValueError) as error:
            raise RepositoryError(line(error).replace(str(path), FILE)) from None
        return path

    def offered(self, spec: Spec) -> CalibrationSet | None:
        """The calibration, if there is one with all that ``spec`` needs. Raises RepositoryError if
        the repository's cache cannot be used."""
        if self.other:
            return None
        with _told(self):
            found = self.calibration
        if found is None or spec.rounding != "feedback":
            return found
        return found if all(c.keys.metric is not None for c in found.layers.values()) else None


_unread = False


@contextmanager
def unread() -> Iterator[None]:
    """In here ``mlx_lm.load`` ignores a repository's section."""
    global _unread
    before, _unread = _unread, True
    try:
        yield
    finally:
        _unread = before


def attach(model: nn.Module, folder: Path, given: object) -> None:
    """Remember where ``model`` was loaded from."""
    if not _unread:
        model._mlx_kvq_repository = Repository(Path(folder), given, str(folder))


def of(model: nn.Module) -> Repository | None:
    """The repository that a model was loaded from, if it has a section."""
    return vars(model).get("_mlx_kvq_repository")


def apply(model: nn.Module, *, verbose: bool = True) -> Report | None:
    """Enable the cache of the model's repository, if it has one. Raises RepositoryError if it
    cannot be used for this model."""
    repository = of(model)
    if repository is None:
        return None
    if repository.other:
        if verbose:
            name = quoted(repository.other)
            log(f"the KV cache in config.json is not mlx_kvq's but {name}'s, and not used")
        return None

    with _told(repository):
        section, calibration = repository.section, repository.calibration
        options = {"calibration": calibration, "policy": section.layers, "verbose": False}
        report = enable(model, section.spec, **options)  # type: ignore[arg-type]
    if verbose:
        log(f"{report}; as the model's repository says")
    return report


@contextmanager
def _told(repository: Repository) -> Iterator[None]:
    """Errors say which repository, and how to run without its cache."""
    try:
        yield
    except ValueError as error:
        raise RepositoryError(
            f"The KV cache of '{repository.name}' cannot be used: {line(error)} The model runs "
            "without it with '--kv-cache fp16', or with MLX_KVQ_DISABLE=1."
        ) from error


def copy(model: nn.Module, folder: str | Path) -> None:
    """Copy the calibration file beside a ``config.json`` that was written with its section."""
    repository = of(model)
    if repository is None or repository.other or repository.section.sha256 is None:
        return
    if read_config(Path(folder)).get(KEY) == repository.given:
        shutil.copyfile(repository.path, Path(folder) / FILE)


def read_config(folder: Path, name: str = "config.json") -> dict:
    """Raise RepositoryError if there is no readable ``config.json``, or no other of that name."""
    path = folder / name
    try:
        if (size := regular(path).st_size) > LARGEST_CONFIG:
            raise RepositoryError(f"{name} in '{folder}' has {size} bytes, more than any.")
        text = path.read_bytes()
    except OSError as error:
        raise RepositoryError(
            f"'{folder}' is not a model repository: {name} cannot be read ({error.strerror})."
        ) from None
    except ValueError as error:
        raise RepositoryError(line(error)) from None
    try:
        config = parse_json(text)
    except ValueError as error:
        raise RepositoryError(f"{name} in '{folder}' {error}.") from None
    if not isinstance(config, dict):
        raise RepositoryError(f"{name} in '{folder}' is {quoted(config)}, not an object.")
    return config


def contents(folder: Path) -> list[Path]:
    """The files of a repository, and nothing else in its folder. Raises RepositoryError if one of
    them is no file, or a link out of the hub's own cache, which may publish a private file."""
    found = {path for pattern in CONTENTS for path in folder.glob(pattern)}
    # A glob without a star passes over a link to nothing.
    found |= {folder / name for name in CONTENTS if os.path.lexists(folder / name)}
    for path in sorted(found):
        _check_link(path, folder)
    return sorted(found | _code(folder))


def _check_link(path: Path, folder: Path) -> None:
    from huggingface_hub import constants

    try:
        regular(path)
    except (OSError, ValueError) as error:
        raise RepositoryError(line(error)) from None
    target, cache = path.resolve(), Path(constants.HF_HUB_CACHE).resolve()
    here = folder.resolve() / path.relative_to(folder)
    if target != here and not target.is_relative_to(cache):
        raise RepositoryError(
            f"'{line(path)}' is a link to '{line(target)}', which is not in the hub's cache: put a "
            "copy in its place to upload it."
        )


def _code(folder: Path) -> set[Path]:
    """The Python files that ``config.json`` and its like name, and the files that these import."""
    from transformers.dynamic_module_utils import get_relative_imports

    modules: set[str] = set()
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        if (folder / name).is_file():
            config = read_config(folder, name)
            modules.add(str(config.get("model_file", "")).removesuffix(".py"))
            named = config.get("auto_map")
            entries = named.values() if isinstance(named, dict) else ()
            classes = [c for e in entries for c in (e if isinstance(e, list) else [e])]
            modules.update(str(c).partition(".")[0] for c in classes)
    found: set[Path] = set()
    while modules:
        module = modules.pop()
        path = folder / f"{module}.py"
        if path in found or not _MODULE.fullmatch(module) or not os.path.lexists(path):
            continue
        _check_link(path, folder)
        found.add(path)
        modules.update(get_relative_imports(path))
    return found


def write(
    folder: Path, spec: Spec, layers: Layers, calibration: CalibrationSet | None,
    made: Mapping[str, str | int],
) -> Section:  # fmt: skip
    """Write or replace a repository's section and its file.

    An interruption leaves the old section, none or the new one, but never a section with another
    one's file.
    """
    config = read_config(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{KEY}-") as name:
        part = Path(name)
        sha256 = None
        if calibration is not None:
            if spec.rounding == "nearest":
                calibration = _without_metric(calibration)
            calibration.save(part / FILE)
            sha256 = _file_sha256(part / FILE)
        section = Section(spec, layers, sha256, made)
        if config.pop(KEY, None) is not None:
            _write_json(part / "plain.json", config, folder)
            os.replace(part / "plain.json", folder / "config.json")
        _write_json(part / "config.json", {**config, KEY: section.to_dict()}, folder)
        if calibration is not None:
            os.replace(part / FILE, folder / FILE)
        else:
            (folder / FILE).unlink(missing_ok=True)
        os.replace(part / "config.json", folder / "config.json")
    return section


def _write_json(path: Path, config: dict, folder: Path) -> None:
    path.write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
    shutil.copymode(folder / "config.json", path)


def _without_metric(calibration: CalibrationSet) -> CalibrationSet:
    """For ``rounding=nearest``: the metric [Hkv, D, D] is D times as large as the rest."""
    layers = {
        path: LayerCalibration(replace(c.keys, **{METRIC: None}), c.values)
        for path, c in calibration.layers.items()
    }
    return CalibrationSet(layers, calibration.metadata)


def _file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
