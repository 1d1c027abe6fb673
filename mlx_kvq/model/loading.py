"""Loading a model. Code of its repository runs only if the user says so, never because a file does.

mlx-lm from 0.32 asks for ``trust_remote_code`` before it imports the ``model_file`` of a
``config.json``; an older one does not ask.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import mlx_lm
from mlx_lm import utils

from ..files import line, quoted


def load(name: str, *, trust: bool = False) -> tuple[Any, Any]:
    """The model and tokenizer of a repository, local or of the hub; with ``trust`` its own code may
    run. Raises ValueError if they cannot be loaded; one line says why."""
    tokenizer = {"trust_remote_code": trust}
    try:
        with code_allowed(trust):
            options = code_options(mlx_lm.load, trust)
            loaded = mlx_lm.load(name, tokenizer_config=tokenizer, **options)
    except Exception as error:  # of the hub's client, of transformers, of the model
        raise ValueError(f"The model '{line(name)}' cannot be loaded: {line(error)}") from error
    return loaded[0], loaded[1]


def code_options(load: Callable, trust: bool) -> dict[str, Any]:
    """The argument that lets a ``load`` or ``load_model`` of mlx-lm run a repository's code."""
    asks = "trust_remote_code" in signature(load).parameters
    return {"trust_remote_code": trust} if asks else {}


@contextmanager
def code_allowed(trust: bool) -> Iterator[None]:
    """In here an mlx-lm that does not ask loads no model with code of its own, unless trusted."""
    original = utils.load_config
    if trust or code_options(utils.load_model, trust):
        yield
        return

    def load_config(*args, **kwargs):
        config = original(*args, **kwargs)
        if (name := config.get("model_file")) is not None:
            raise ValueError(
                f"it brings code of its own along, {quoted(name)}, which runs only with "
                "--trust-remote-code"
            )
        return config

    utils.load_config = load_config
    try:
        yield
    finally:
        utils.load_config = original
