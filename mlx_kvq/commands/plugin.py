"""Adds ``--kv-cache`` to mlx-lm's commands, and a repository's own cache to its ``load``.

mlx-lm has no plug-in point: ``patch`` gets each of its modules right after the import (see
``_startup``). A command's module then sees an ``argparse`` whose parsers know the option, and a
``load`` that enables what was asked; ``mlx_lm.utils`` a ``load`` that enables what a converted
repository says, unless something else was asked; ``mlx_lm.models.cache`` a ``load_prompt_cache``
that knows packed caches. ``patch`` must not import from ``mlx_lm``, which may be half imported.

Where mlx-lm lacks a name of ``NEEDED``, its module stays as it is and ``--kv-cache`` is an error
that names it.
"""

import argparse
import functools
import inspect
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ..caches import trampoline
from ..format.spec import OFF
from ..stock_names import missing
from .options import cache, length, size

HELP = (
    "Keep keys and values packed: 'int4' (short for 'int4-srft', 4.25 bits per value), 'k5v4' "
    "(4.75), 'int5', 'k8v4', 'int8', 'k4v3' (3.9), 'int3' (3.5); 'fp16' is the model's own "
    "cache. Options follow a colon, as in 'int4:recent=64,skip=first': recent (newest tokens read "
    "exactly, default 64), first (first tokens likewise, 4), group_size (channels that share a "
    "scale, default 64, of 3 bits 32), skip (layers left alone: numbers, first, last, joined by "
    "+), high (layers in 8 bits, likewise), budget (bits per value to spend on the layers that "
    "need them: int3:budget=3.5), calibrate=off, rounding=nearest|feedback, "
    "scale=search|absmax|paper, seed. Numbers of tokens may be written as 32K. From mlx_kvq."
)
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
    "utils": ("load", "sharded_load", "load_model", "save"),
    "models.cache": ("load_prompt_cache",),
}
_asked: str | None = None  # --kv-cache of this process
_option = ""  # and how it was asked for
_unchecked: list[list] = []  # caches from a file, before the model is loaded
_packed_file = False  # whether there was such a file, with packed caches
_loaded = 0  # models; from the second on, a draft's or a server's, lines name theirs
_lacking = ""  # what mlx_lm.utils lacks
_waiting: list[tuple[str, weakref.ref]] = []  # path and model last loaded, without a tokenizer yet
_inside = threading.local()  # .load: this thread is in mlx_lm.utils.load
_folder: str | None = None  # --prompt-cache-dir of the server
_folder_bytes = 8 << 30  # and its bound


def patch(module: ModuleType) -> None:
    """Give a command module of mlx-lm the option ``--kv-cache``, or change ``mlx_lm.utils`` or
    ``mlx_lm.models.cache``."""
    global _lacking
    names: dict[str, Any] = vars(module)
    name = module.__name__.removeprefix("mlx_lm.")
    absent = [n for n in NEEDED[name] if not _has(names, n)]
    if name == "models.cache":
        if not absent:
            trampoline.replace(names["load_prompt_cache"], _registering, waiting=True)
        return
    if name == "utils":
        _lacking = f"utils.{absent[0]}" if absent else ""
        if not absent:
            _watch_loading(names)
        return
    if names.get("argparse") is not argparse:
        if any(word.partition("=")[0] == "--kv-cache" for word in sys.argv):
            print(f"[mlx_kvq] warning: {missing(f'{name}.argparse')}", file=sys.stderr)
        return
    lacks = f"{name}.{absent[0]}" if absent else ""
    names["argparse"] = _Argparse(lacks, is_server=name == "server")
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


def _watch_loading(names: dict[str, Any]) -> None:
    """Change what loads and saves models."""
    trampoline.replace(names["load_model"], _remembering)
    trampoline.replace(names["load"], _as_the_repository_says)
    trampoline.replace(names["sharded_load"], _as_the_repository_says)
    trampoline.replace(names["save"], _with_the_calibration)
    if (function := trampoline.function(names.get("load_tokenizer"))) is not None:
        trampoline.replace(function, _completing)


def asked() -> str | None:
    """``--kv-cache`` of this process, or else ``MLX_KVQ_SPEC``, for programs without the option."""
    return _asked if _asked is not None else os.environ.get("MLX_KVQ_SPEC") or None


def from_option() -> bool:
    """Whether this process has the option ``--kv-cache``, rather than the variable."""
    return _asked is not None


def enable_asked(model: Any, tokenizer: Any) -> None:
    """Enable what ``MLX_KVQ_SPEC`` says, where a program loads a model."""
    from ..model.enable import enable

    spec = os.environ["MLX_KVQ_SPEC"]
    try:
        enable(model, spec, tokenizer=tokenizer, verbose=not quiet())
    except ValueError as error:
        raise ValueError(f"MLX_KVQ_SPEC={spec}: {error}") from error


def lacking(name: str, program: str) -> None:
    """``--kv-cache`` is an error that names what a program lacks."""
    global _lacking
    _lacking = f"{program}:{name}"


def _has(names: dict[str, Any], name: str) -> bool:
    outer, _, inner = name.partition(".")
    found = names.get(outer)
    return callable(getattr(found, inner, None) if inner else found)


class _Parser(argparse.ArgumentParser):
    """Adds the option last, below the command's own."""

    lacking = ""  # what the command's module lacks
    is_server = False
    _ours: argparse.Action | None = None

    def _add_kv_cache(self) -> None:
        self.register("type", int, length)
        if "--kv-cache" not in self._option_string_actions:
            self._ours = self.add_argument(
                "--kv-cache", dest="mlx_kvq_cache", type=cache(), metavar="SPEC", help=HELP
            )
            if self.is_server:
                self._add_folder()

    def _add_folder(self) -> None:
        self.add_argument(
            "--prompt-cache-dir",
            dest="mlx_kvq_folder",
            metavar="DIR",
            help="Keep the caches of prompts of 512 tokens and more in files of this folder, also "
            "beyond this process. From mlx_kvq.",
        )
        self.add_argument(
            "--prompt-cache-dir-bytes",
            dest="mlx_kvq_folder_bytes",
            type=size,
            default=_folder_bytes,
            metavar="SIZE",
            help="Bytes of these files, such as 20GB (default: 8GB); the least recently used go.",
        )

    def format_help(self) -> str:
        self._add_kv_cache()
        return super().format_help()

    def parse_known_args(self, args=None, namespace=None):
        self._add_kv_cache()
        parsed, rest = super().parse_known_args(args, namespace)
        global _asked, _option, _folder, _folder_bytes
        _folder = getattr(parsed, "mlx_kvq_folder", None)
        _folder_bytes = getattr(parsed, "mlx_kvq_folder_bytes", _folder_bytes)
        if self._ours is None:
            say(
                f"warning: {self.prog} has an option --kv-cache that is not mlx_kvq's; "
                "mlx_kvq.enable(model, …) packs a cache from Python"
            )
        asked = None if self._ours is None else parsed.mlx_kvq_cache
        bits = getattr(parsed, "kv_bits", None)
        if asked is not None and bits is not None:
            self.error("--kv-cache and --kv-bits are two ways to quantize the cache: give one")
        if asked is not None and asked.strip() != OFF:
            self._check(getattr(parsed, "max_kv_size", None))
        _asked, _option = asked, f"--kv-cache {asked}"
        if bits is not None:  # quantizes the model's own cache
            _asked, _option = OFF, f"--kv-bits {bits}"
        return parsed, rest

    def _check(self, max_kv_size: object) -> None:
        """End the command where it cannot do what is asked."""
        if isinstance(max_kv_size, int) and max_kv_size < 1:
            self.error(f"--max-kv-size is at least 1, got {max_kv_size}")
        try:
            for name in filter(None, (self.lacking, _lacking)):
                program, _, rest = name.rpartition(":")
                raise missing(rest, program or "mlx_lm")
            from .. import stock_names

            stock_names.check()
            from ..caches.seams import install

            install()
        except ValueError as error:
            self.exit(1, f"[mlx_kvq] error: {error}\n")


class _Argparse(ModuleType):
    """The module ``argparse`` with our parser in it."""

    def __init__(self, lacking: str = "", is_server: bool = False):
        super().__init__("argparse")
        own = {"lacking": lacking, "is_server": is_server}
        self.ArgumentParser = type("ArgumentParser", (_Parser,), own)

    def __getattr__(self, name: str) -> Any:
        return getattr(argparse, name)


def argparse_with_option() -> ModuleType:
    """The module ``argparse`` whose parsers know ``--kv-cache``."""
    return _Argparse()


def say(line: str) -> None:
    print(f"[mlx_kvq] {line}", file=sys.stderr, flush=True)


@contextmanager
def one_line(is_server: bool) -> Iterator[None]:
    """End the command with one line where what was asked for cannot be had; a server answers the
    request with it and goes on."""
    try:
        yield
    except ValueError as error:
        if is_server:
            raise _PackingError(str(error)) from error
        sys.exit(f"[mlx_kvq] error: {error}")
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)


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


def _keeping_prompts(run, names: dict[str, Any]):
    """The server's ``run``, whose prompt cache is then one over ``--prompt-cache-dir``."""

    @functools.wraps(run)
    def wrapper(host, port, model_provider, *args, **kwargs):
        if _folder is not None:
            import mlx.core as mx

            from ..caches import prefix

            with one_line(is_server=False):
                if mx.distributed.init().size() > 1:  # whose ranks must reuse the same tokens
                    raise ValueError("--prompt-cache-dir is for a server of one process")
                try:
                    folder = prefix.Folder(_folder, _folder_bytes, say)
                except OSError as error:
                    raise ValueError(f"--prompt-cache-dir {_folder}: {error.strerror}") from None

            def model():
                # A draft model's caches are in the same list, and it has no identity of its own.
                draft = getattr(model_provider, "draft_model", None)
                return model_provider.model if draft is None else None

            names["LRUPromptCache"] = lambda size, *more: prefix.StoredPrompts(
                folder, model, max_size=size
            )
        return run(host, port, model_provider, *args, **kwargs)

    return wrapper


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


@dataclass(frozen=True)
class Loaded:
    """How a model was loaded; copies of the model do without."""

    name: str
    tokenizer: Any

    def __reduce__(self):
        return Loaded, ("", None)


def _as_the_repository_says(load):
    signature = inspect.signature(load)

    @functools.wraps(load)
    def wrapper(*args, **kwargs):
        before, _inside.load = getattr(_inside, "load", False), True
        try:
            loaded = load(*args, **kwargs)
        finally:
            _inside.load = before
        given = signature.bind(*args, **kwargs).arguments
        _prepare(loaded[0], loaded[1], str(next(iter(given.values()))), given.get("revision"))
        return loaded

    return wrapper


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
            option = _option if _asked is not None else f"MLX_KVQ_SPEC={asked()}"
            say(f"{option} in place of the repository's {source.said}")
    if _asked is None and asked() is not None:
        enable_asked(model, tokenizer)


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
        if _asked is None and caches is None:
            return loaded
        with one_line(is_server):
            from ..caches.prompt_file import check
            from ..caches.seams import CLASSES, refuse_kv_bits
            from ..model.enable import enable
            from ..model.report import about

            _loaded += 1
            if _asked is not None:
                name = getattr(vars(loaded[0]).get("_mlx_kvq_loaded"), "name", "")
                with about(name if _loaded > 1 else ""):
                    enable(loaded[0], _asked, tokenizer=loaded[1], verbose=not quiet())
            if caches is not None:
                check(caches, loaded[0])
                if _option.startswith("--kv-bits"):
                    refuse_kv_bits(caches, _option)
                _packed_file = any(isinstance(c, CLASSES) for c in caches)
        return loaded

    return wrapper


def quiet() -> bool:
    return os.environ.get("MLX_KVQ_QUIET", "") not in ("", "0")


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
