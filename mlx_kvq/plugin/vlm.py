"""``--kv-cache`` for mlx-vlm's commands, as ``programs`` adds it to mlx-lm's.

``mlx_vlm.utils.load``, by which all of them load a model, then enables what was asked, and models
remember their tokenizer for the automatic calibration. mlx-vlm's modules may be half imported
here, too.
"""

import argparse
import functools
import inspect
import sys
from types import ModuleType
from typing import Any

from ..caches import trampoline
from ..stock_names import missing
from .lines import one_line, quiet, say
from .loading import Loaded, enable_asked
from .option import Argparse, asked, typed, wanted

# A module of mlx-vlm -> what it must have.
NEEDED = {"utils": "load", "generate.dispatch": "argparse", "server.cli": "argparse"}


def patch(module: ModuleType) -> None:
    """Give a command of mlx-vlm the option, or change ``mlx_vlm.utils.load``."""
    names: dict[str, Any] = vars(module)
    name = module.__name__.removeprefix("mlx_vlm.")
    if name == "utils":
        function = trampoline.function(names.get("load"))
        if function is None:
            wanted.lacking = "mlx_vlm:utils.load"
        else:
            trampoline.replace(function, _enabling)
    elif names.get("argparse") is argparse:
        names["argparse"] = Argparse()
    elif typed():
        say(f"warning: {missing(f'{name}.argparse', 'mlx_vlm')}")


def _enabling(load):
    signature = inspect.signature(load)

    @functools.wraps(load)
    def wrapper(*args, **kwargs):
        loaded = load(*args, **kwargs)
        named = signature.bind(*args, **kwargs).arguments
        tokenizer = getattr(loaded[1], "tokenizer", loaded[1])
        # host.language_model, without importing mlx-lm where nothing is asked for
        model = getattr(loaded[0], "language_model", loaded[0])
        model._mlx_kvq_loaded = Loaded(str(next(iter(named.values()))), tokenizer)
        if wanted.spec is not None:
            from ..model.enable import enable

            with one_line(is_server="mlx_vlm.server.cli" in sys.modules):
                enable(loaded[0], wanted.spec, verbose=not quiet())
        elif asked() is not None:
            enable_asked(loaded[0], tokenizer)
        return loaded

    return wrapper
