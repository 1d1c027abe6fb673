"""Adds ``--kv-cache`` to mlx-lm's commands, and a repository's own cache to its ``load``.

mlx-lm has no plug-in point: ``patch`` gets each of its modules right after the import (see
``_startup``). A command's module then sees an ``argparse`` whose parsers know the option, and a
``load`` that enables what was asked; ``mlx_lm.utils`` a ``load`` that enables what a converted
repository says, unless something else was asked. ``patch`` must not import from ``mlx_lm``,
which may be half imported.
"""

import argparse
import functools
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from .spec import OFF, Spec

HELP = (
    "Keep keys and values packed, for example 'int4-srft' (4.5 bits per value), 'k8v4-srft', "
    "'int8-srft'; 'fp16' is the model's own cache. From mlx_kvq."
)
# Tokens per step of what scores a text in one step, where nothing would be read from the cache:
# mlx_lm.perplexity, and mlx_lm.evaluate up to 2048 tokens.
CHUNK = 128

_asked: str | None = None  # --kv-cache of this process
_option = ""  # and how it was asked for
_unread = False  # whether load leaves a repository's own cache alone
_unchecked: list[list] = []  # caches from a file, before the model is loaded


def patch(module: ModuleType) -> None:
    """Give a command module of mlx-lm the option ``--kv-cache``, or change ``mlx_lm.utils``."""
    names: dict[str, Any] = vars(module)
    if "load_model" in names:
        names["load_model"] = _remembering(names["load_model"])
        for name in ("load", "sharded_load"):
            if name in names:
                names[name] = _as_the_repository_says(names[name])
        if "save" in names:
            names["save"] = _with_the_calibration(names["save"])
        return
    names["argparse"] = _Argparse("argparse")
    for name in ("load", "sharded_load"):
        if name in names:
            names[name] = _enabling(names[name], is_server="APIHandler" in names)
    if "ModelProvider" in names:
        provider = names["ModelProvider"]
        provider.load_default = _ending_the_server(provider.load_default)
    if "load_prompt_cache" in names:
        names["load_prompt_cache"] = _knowing_our_caches(names["load_prompt_cache"])
    if "eval_ppl" in names:
        names["eval_ppl"] = _through_the_cache(names["eval_ppl"])
    if "MLXLM" in names:
        names["MLXLM"]._score_fn = _in_chunks(names["MLXLM"]._score_fn)


def _spec(text: str) -> str:
    try:
        Spec.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


class _Parser(argparse.ArgumentParser):
    """Adds the option last, below the command's own."""

    def _add_kv_cache(self) -> None:
        if "--kv-cache" not in self._option_string_actions:
            self.add_argument("--kv-cache", type=_spec, metavar="SPEC", help=HELP)

    def format_help(self) -> str:
        self._add_kv_cache()
        return super().format_help()

    def parse_known_args(self, args=None, namespace=None):
        self._add_kv_cache()
        parsed, rest = super().parse_known_args(args, namespace)
        if parsed.kv_cache is not None and getattr(parsed, "kv_bits", None) is not None:
            self.error("--kv-cache and --kv-bits are two ways to quantize the cache: give one")
        global _asked, _option
        _asked, _option = parsed.kv_cache, f"--kv-cache {parsed.kv_cache}"
        if getattr(parsed, "kv_bits", None) is not None:  # quantizes the model's own cache
            _asked, _option = OFF, f"--kv-bits {parsed.kv_bits}"
        return parsed, rest


class _Argparse(ModuleType):
    """The module ``argparse`` with our parser in it."""

    ArgumentParser = _Parser

    def __getattr__(self, name: str) -> Any:
        return getattr(argparse, name)


class _PackingError(ValueError):
    """The model cannot have the cache that was asked for."""


def _ending_the_server(load_default):
    """The server loads its own model in a thread, whose end it would survive without a model."""

    @functools.wraps(load_default)
    def wrapper(*args, **kwargs):
        try:
            return load_default(*args, **kwargs)
        except _PackingError as error:
            print(f"[mlx_kvq] error: {error}", file=sys.stderr, flush=True)
            os._exit(1)

    return wrapper


def _remembering(load_model):
    """Models remember the repository that they are from, if that says which cache to use."""

    @functools.wraps(load_model)
    def wrapper(model_path, *args, **kwargs):
        loaded = load_model(model_path, *args, **kwargs)  # the model and its config.json
        if "kv_cache" in loaded[1] and not _unread:
            from . import repository

            repository.attach(loaded[0], model_path, loaded[1]["kv_cache"])
        return loaded

    return wrapper


def _as_the_repository_says(load):
    signature = inspect.signature(load)

    @functools.wraps(load)
    def wrapper(*args, **kwargs):
        loaded = load(*args, **kwargs)
        if (source := vars(loaded[0]).get("_mlx_kvq_repository")) is not None:
            from . import repository

            given = signature.bind(*args, **kwargs).arguments
            source.name, source.revision = str(next(iter(given.values()))), given.get("revision")
            if _asked is None:
                repository.apply(loaded[0])
            else:
                said = source.said
                print(f"[mlx_kvq] {_option} in place of the repository's {said}", file=sys.stderr)
        return loaded

    return wrapper


def _with_the_calibration(save):
    """mlx_lm.fuse, convert and others write the config.json that they read, section included."""

    @functools.wraps(save)
    def wrapper(dst_path, src_path_or_repo, model, *args, **kwargs):
        save(dst_path, src_path_or_repo, model, *args, **kwargs)
        if "_mlx_kvq_repository" in vars(model):
            from . import repository

            repository.copy(model, dst_path)

    return wrapper


@contextmanager
def unread() -> Iterator[None]:
    """``mlx_lm.load`` without a repository's own cache, for what is about to write one."""
    global _unread
    before, _unread = _unread, True
    try:
        yield
    finally:
        _unread = before


def _enabling(load, is_server: bool):
    @functools.wraps(load)
    def wrapper(*args, **kwargs):
        try:
            loaded = load(*args, **kwargs)
        except ValueError as error:
            from .repository import RepositoryError

            if not isinstance(error, RepositoryError):
                raise
            if is_server:
                raise _PackingError(str(error)) from error
            sys.exit(f"[mlx_kvq] error: {error}")
        caches = _unchecked.pop() if _unchecked else None
        if _asked is None and caches is None:
            return loaded
        from .model import enable
        from .prompt_cache import check
        from .seams import refuse_kv_bits

        try:
            if _asked is not None:
                enable(loaded[0], _asked, tokenizer=loaded[1])
            if caches is not None:
                check(caches, loaded[0])
                if _option.startswith("--kv-bits"):
                    refuse_kv_bits(caches, _option)
        except ValueError as error:
            if is_server:  # answers the request with it and goes on
                raise _PackingError(str(error)) from error
            sys.exit(f"[mlx_kvq] error: {error}")
        return loaded

    return wrapper


def _knowing_our_caches(load_prompt_cache):
    """Loads packed caches, and keeps them until the model is there that they must fit."""

    @functools.wraps(load_prompt_cache)
    def wrapper(file_name, return_metadata=False):
        from mlx_lm.models import cache as stock

        from . import seams

        seams.install()
        try:
            caches, metadata = stock.load_prompt_cache(file_name, return_metadata=True)
        except (OSError, ValueError) as error:
            sys.exit(f"[mlx_kvq] error: {error}")
        _unchecked.append(caches)
        return (caches, metadata) if return_metadata else caches

    return wrapper


def _through_the_cache(eval_ppl):
    """mlx_lm.perplexity runs without a cache; a packed one it reads, chunk by chunk."""

    @functools.wraps(eval_ppl)
    def wrapper(model, *args, **kwargs):
        from .seams import CacheFactory

        if not isinstance(vars(model).get("make_cache"), CacheFactory):
            return eval_ppl(model, *args, **kwargs)
        import mlx.core as mx

        def chunked(tokens):
            cache = model.make_cache()
            steps = range(0, tokens.shape[1], CHUNK)
            return mx.concatenate(
                [model(tokens[:, i : i + CHUNK], cache=cache) for i in steps], axis=1
            )

        print(f"[mlx_kvq] perplexity over chunks of {CHUNK} tokens", file=sys.stderr)
        return eval_ppl(chunked, *args, **kwargs)

    return wrapper


def _in_chunks(score):
    """mlx_lm.evaluate's scoring of a text, which would read no cache in its first 2048 tokens."""

    @functools.wraps(score)
    def wrapper(self, inputs, cache=None, **kwargs):
        if _asked is not None and cache is None:
            kwargs.setdefault("step_size", CHUNK)
        return score(self, inputs, cache, **kwargs)

    return wrapper
