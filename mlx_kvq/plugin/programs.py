"""mlx-lm's commands: a module ``argparse`` that knows ``--kv-cache``, a ``load`` that enables what
was asked, and what else a command needs for packed caches."""

import argparse
import functools
import os
import sys
from contextlib import suppress
from types import ModuleType
from typing import Any

from ..caches import trampoline
from ..stock_names import missing
from . import loading
from .lines import PackingError, one_line, quiet, say
from .option import Argparse, typed, wanted

# Tokens per step of what scores a text in one step, where little would be read from the cache:
# mlx_lm.perplexity, and mlx_lm.evaluate up to 2048 tokens. As many as are read as in decoding
# (attention.DECODE_QUERIES, which would import mlx).
CHUNK = 8
# What a command's module must have; "argparse" besides.
NEEDED = {
    "benchmark": ("load", "sharded_load"),
    "cache_prompt": ("load",),
    "chat": ("load", "sharded_load"),
    "evaluate": ("load", "MLXLM._score_fn"),
    "generate": ("load", "load_prompt_cache", "main", "generate"),
    "perplexity": ("load", "eval_ppl"),
    "server": ("load", "sharded_load", "ModelProvider.load_default", "run", "LRUPromptCache"),
    "utils": loading.NEEDED,
    "models.cache": ("load_prompt_cache",),
}
_unchecked: list[list] = []  # caches from a file, before the model is loaded
_packed_file = False  # whether there was such a file, with packed caches
_loaded = 0  # models; from the second on, a draft's or a server's, lines name theirs


def patch(module: ModuleType) -> None:
    """Give a command's module the option, or change ``mlx_lm.utils`` or ``mlx_lm.models.cache``."""
    names: dict[str, Any] = vars(module)
    name = module.__name__.removeprefix("mlx_lm.")
    absent = [n for n in NEEDED[name] if not _has(names, n)]
    if name == "models.cache":
        if not absent:
            trampoline.replace(names["load_prompt_cache"], _registering, waiting=True)
        return
    if name == "utils":
        wanted.lacking = f"utils.{absent[0]}" if absent else ""
        if not absent:
            loading.watch(names)
        return
    if names.get("argparse") is not argparse:
        if typed():
            say(f"warning: {missing(f'{name}.argparse')}")
        return
    lacks = f"{name}.{absent[0]}" if absent else ""
    names["argparse"] = Argparse(lacks, is_server=name == "server")
    if absent:
        return
    for load in ("load", "sharded_load"):
        if load in names:
            names[load] = _enabling(names[load], is_server=name == "server")
    if name == "server":
        provider = names["ModelProvider"]
        provider.load_default = _ending_the_server(provider.load_default)
        names["run"] = _keeping_prompts(names["run"], names)
    if name == "generate":
        names["load_prompt_cache"] = _knowing_our_caches(names["load_prompt_cache"])
        names["main"] = _saying_what_is_saved(names["main"], names)
    if name == "perplexity":
        names["eval_ppl"] = _through_the_cache(names["eval_ppl"])
    if name == "evaluate":
        names["MLXLM"]._score_fn = _in_chunks(names["MLXLM"]._score_fn)


def _has(names: dict[str, Any], name: str) -> bool:
    outer, _, inner = name.partition(".")
    found = names.get(outer)
    return callable(getattr(found, inner, None) if inner else found)


def _enabling(load, is_server: bool):
    @functools.wraps(load)
    def wrapper(*args, **kwargs):
        global _packed_file, _loaded
        from_file = bool(_unchecked)
        if _packed_file and not from_file:
            from ..caches.seams import NO_DRAFT

            sys.exit(f"[mlx_kvq] error: {NO_DRAFT}")
        try:
            loaded = load(*args, **kwargs)
        except ValueError as error:
            from ..repositories.section import RepositoryError

            if not isinstance(error, RepositoryError):
                raise
            with one_line(is_server):
                raise
        caches = _unchecked.pop() if from_file else None
        if wanted.spec is None and caches is None:
            return loaded
        with one_line(is_server):
            from ..caches.prompt_file import check
            from ..caches.seams import CLASSES, refuse_kv_bits
            from ..model.enable import enable
            from ..model.report import about

            _loaded += 1
            if wanted.spec is not None:
                name = getattr(vars(loaded[0]).get("_mlx_kvq_loaded"), "name", "")
                with about(name if _loaded > 1 else ""):
                    enable(loaded[0], wanted.spec, tokenizer=loaded[1], verbose=not quiet())
            if caches is not None:
                check(caches, loaded[0])
                if wanted.option.startswith("--kv-bits"):
                    refuse_kv_bits(caches, wanted.option)
                _packed_file = any(isinstance(c, CLASSES) for c in caches)
        return loaded

    return wrapper


def _ending_the_server(load_default):
    """The server loads its own model in a thread, whose end it would survive without a model."""

    @functools.wraps(load_default)
    def wrapper(*args, **kwargs):
        try:
            return load_default(*args, **kwargs)
        except PackingError as error:
            say(f"error: {error}")
            os._exit(1)

    return wrapper


def _keeping_prompts(run, names: dict[str, Any]):
    """The server's ``run``, whose prompt cache is then one over ``--prompt-cache-dir``."""

    @functools.wraps(run)
    def wrapper(host, port, model_provider, *args, **kwargs):
        if wanted.folder is not None:
            import mlx.core as mx

            from ..caches import prefix

            with one_line(is_server=False):
                if mx.distributed.init().size() > 1:  # whose ranks must reuse the same tokens
                    raise ValueError("--prompt-cache-dir is for a server of one process")
                try:
                    folder = prefix.Folder(wanted.folder, wanted.folder_bytes, say)
                except OSError as error:
                    raise ValueError(
                        f"--prompt-cache-dir {wanted.folder}: {error.strerror}"
                    ) from None

            def model():
                # A draft model's caches are in the same list, and it has no identity of its own.
                draft = getattr(model_provider, "draft_model", None)
                return model_provider.model if draft is None else None

            names["LRUPromptCache"] = lambda size, *more: prefix.StoredPrompts(
                folder, model, max_size=size
            )
        return run(host, port, model_provider, *args, **kwargs)

    return wrapper


def _saying_what_is_saved(main, names: dict[str, Any]):
    """mlx_lm.generate's command ends with a line of what its packed caches hold. Its caches are
    made here, as ``generate`` would make them, to have them at the end."""

    def generate(model, *args, **kwargs):
        from mlx_lm.models.cache import make_prompt_cache

        from ..model.report import log, saved

        caches = kwargs.get("prompt_cache")
        if caches is None:
            caches = make_prompt_cache(model, max_kv_size=kwargs.get("max_kv_size"))
            if (draft := kwargs.get("draft_model")) is not None:
                caches += make_prompt_cache(draft)
            kwargs["prompt_cache"] = caches
        text = stock(model, *args, **kwargs)
        if line := saved(caches):
            sys.stdout.flush()  # where both go into one file, the line is the last
            log(line)
        return text

    stock = names["generate"]

    @functools.wraps(main)
    def wrapper():
        if not quiet():
            names["generate"] = generate
        try:
            return main()
        finally:
            names["generate"] = stock

    return wrapper


def _registering(original):
    """``load_prompt_cache`` of a process where nothing is enabled: a packed file installs what it
    needs, any other is mlx-lm's business."""

    def load_prompt_cache(file_name, *args, **kwargs):
        try:
            return original(file_name, *args, **kwargs)
        except Exception:  # of an older mlx-lm not always a KeyError
            if not _is_packed(file_name):
                raise
        from .. import stock_names

        stock_names.check()
        from mlx_lm.models import cache as stock

        from ..caches import seams

        seams.install()  # in place of this one
        return stock.load_prompt_cache(file_name, *args, **kwargs)

    return load_prompt_cache


def _is_packed(file_name) -> bool:
    """Whether a safetensors header is that of packed caches."""
    try:
        with open(file_name, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return b'"0.mlx_kvq"' in file.read(min(size, 1 << 26))
    except OSError:
        return False


def _knowing_our_caches(load_prompt_cache):
    """Loads packed caches, and keeps them until the model is there that they must fit."""

    @functools.wraps(load_prompt_cache)
    def wrapper(file_name, return_metadata=False):
        from ..caches.seams import install
        from ..stock_names import NotSupportedError

        with suppress(NotSupportedError):  # any other file is mlx-lm's business
            install()
        try:
            caches, metadata = load_prompt_cache(file_name, return_metadata=True)
        except (OSError, ValueError) as error:
            sys.exit(f"[mlx_kvq] error: {error}")
        _unchecked.append(caches)
        return (caches, metadata) if return_metadata else caches

    return wrapper


def _through_the_cache(eval_ppl):
    """mlx_lm.perplexity runs without a cache; a packed one it reads, chunk by chunk."""

    @functools.wraps(eval_ppl)
    def wrapper(model, *args, **kwargs):
        from ..stock import factory_of

        if (make_cache := factory_of(model)) is None:
            return eval_ppl(model, *args, **kwargs)
        import mlx.core as mx

        def chunked(tokens):
            cache = make_cache()
            steps = range(0, tokens.shape[1], CHUNK)
            return mx.concatenate(
                [model(tokens[:, i : i + CHUNK], cache=cache) for i in steps], axis=1
            )

        say(f"perplexity over chunks of {CHUNK} tokens")
        return eval_ppl(chunked, *args, **kwargs)

    return wrapper


def _in_chunks(score):
    """mlx_lm.evaluate's scoring of a text, which would read no cache in its first 2048 tokens."""

    @functools.wraps(score)
    def wrapper(self, inputs, cache=None, **kwargs):
        if wanted.spec is not None and cache is None:
            kwargs.setdefault("step_size", CHUNK)
        return score(self, inputs, cache, **kwargs)

    return wrapper
