"""``mlx_lm.utils``: loaded models remember where they are from, and enable what their repository
or ``MLX_KVQ_SPEC`` says; saved ones keep their calibration."""

import functools
import inspect
import os
import threading
import weakref
from dataclasses import dataclass
from typing import Any

from ..caches import trampoline
from .lines import quiet, say
from .option import asked, wanted

NEEDED = ("load", "sharded_load", "load_model", "save")  # of mlx_lm.utils
_waiting: list[tuple[str, weakref.ref]] = []  # path and model last loaded, without a tokenizer yet
_inside = threading.local()  # .load: this thread is in mlx_lm.utils.load


@dataclass(frozen=True)
class Loaded:
    """How a model was loaded; copies of the model do without."""

    name: str
    tokenizer: Any

    def __reduce__(self):
        return Loaded, ("", None)


def watch(names: dict[str, Any]) -> None:
    """Change what loads and saves models, in the names of ``mlx_lm.utils``."""
    trampoline.replace(names["load_model"], _remembering)
    trampoline.replace(names["load"], _as_the_repository_says)
    trampoline.replace(names["sharded_load"], _as_the_repository_says)
    trampoline.replace(names["save"], _with_the_calibration)
    if (function := trampoline.function(names.get("load_tokenizer"))) is not None:
        trampoline.replace(function, _completing)


def enable_asked(model: Any, tokenizer: Any) -> None:
    """Enable what ``MLX_KVQ_SPEC`` says, where a program loads a model."""
    from ..model.enable import enable

    spec = os.environ["MLX_KVQ_SPEC"]
    try:
        enable(model, spec, tokenizer=tokenizer, verbose=not quiet())
    except ValueError as error:
        raise ValueError(f"MLX_KVQ_SPEC={spec}: {error}") from error


def _prepare(model: Any, tokenizer: Any, name: str, revision: str | None = None) -> None:
    """Enable what the repository says, or ``MLX_KVQ_SPEC``, once a model and its tokenizer are
    there. What ``--kv-cache`` says a command's own ``load`` does."""
    model._mlx_kvq_loaded = Loaded(name, tokenizer)
    if (source := vars(model).get("_mlx_kvq_repository")) is not None:
        from ..repositories import repository

        source.name, source.revision = name, revision
        if asked() is None:
            repository.apply(model, verbose=not quiet())
        else:
            option = wanted.option if wanted.spec is not None else f"MLX_KVQ_SPEC={asked()}"
            say(f"{option} in place of the repository's {source.said}")
    if wanted.spec is None and asked() is not None:
        enable_asked(model, tokenizer)


def _remembering(load_model):
    """Models remember the repository that they are from, if that says which cache to use."""

    @functools.wraps(load_model)
    def wrapper(model_path, *args, **kwargs):
        loaded = load_model(model_path, *args, **kwargs)  # the model and its config.json
        if "kv_cache" in loaded[1]:
            from ..repositories import repository

            repository.attach(loaded[0], model_path, loaded[1]["kv_cache"])
        _waiting[:] = [(str(model_path), weakref.ref(loaded[0]))]
        return loaded

    return wrapper


def _as_the_repository_says(load):
    signature = inspect.signature(load)

    @functools.wraps(load)
    def wrapper(*args, **kwargs):
        before, _inside.load = getattr(_inside, "load", False), True
        try:
            loaded = load(*args, **kwargs)
        finally:
            _inside.load = before
        named = signature.bind(*args, **kwargs).arguments
        _prepare(loaded[0], loaded[1], str(next(iter(named.values()))), named.get("revision"))
        return loaded

    return wrapper


def _completing(load_tokenizer):
    """Programs that call ``load_model`` and then ``load_tokenizer``, and never ``load``."""

    @functools.wraps(load_tokenizer)
    def wrapper(model_path, *args, **kwargs):
        tokenizer = load_tokenizer(model_path, *args, **kwargs)
        waiting, _waiting[:] = list(_waiting), []
        for path, reference in waiting:
            model = reference()
            if model is not None and path == str(model_path) and not getattr(_inside, "load", 0):
                _prepare(model, tokenizer, path)
        return tokenizer

    return wrapper


def _with_the_calibration(save):
    """mlx_lm.fuse, convert and others write the config.json that they read, section included."""

    @functools.wraps(save)
    def wrapper(dst_path, src_path_or_repo, model, *args, **kwargs):
        save(dst_path, src_path_or_repo, model, *args, **kwargs)
        if "_mlx_kvq_repository" in vars(model):
            from ..repositories import repository

            repository.copy(model, dst_path)

    return wrapper
