"""Loading a model: code that its repository brings along runs only if the user says so.

mlx-lm from 0.32 asks for ``trust_remote_code`` before it imports the ``model_file`` that a
``config.json`` names; an older one imports it without asking. Neither may take the answer from a
file.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import mlx_lm
from mlx_lm import utils

from ..files import line, quoted


def load(name: str, *, trust: bool = False) -> tuple[Any, Any]:
    """The model and tokenizer of a repository, local or of the hub.

    Args:
        name (str): As for ``mlx_lm.load``.
        trust (bool): Run the repository's own model and tokenizer code.

    Raises:
        ValueError: If they cannot be loaded; one line says why.
    """
    try:
        with code_allowed(trust):
            tokenizer = {"trust_remote_code": trust}
            options = code_options(mlx_lm.load, trust)
            loaded = mlx_lm.load(name, tokenizer_config=tokenizer, **options)
    except Exception as error:  # of the hub's client, of transformers, of the model
        raise ValueError(f"The model '{line(name)}' cannot be loaded: {line(error)}") from error
    return loaded[0], loaded[1]


def code_options(load: Callable, trust: bool) -> dict[str, Any]:
    """How to tell a ``load`` or ``load_model`` of mlx-lm whether to run a repository's code."""
    asks = "trust_remote_code" in signature(load).parameters
    return {"trust_remote_code": trust} if asks else {}


@contextmanager
def code_allowed(trust: bool) -> Iterator[None]:
    """In here an mlx-lm that does not ask loads no model that brings code along, unless trusted."""
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
