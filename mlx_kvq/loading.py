"""Loading a model: code that its repository brings along runs only if the user says so.

mlx-lm from 0.32 asks for ``trust_remote_code`` before it imports the ``model_file`` that a
``config.json`` names; an older one imports it without asking. Neither may take the answer from a
file.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from types import ModuleType
from typing import Any

import mlx_lm

from .files import line


def load(name: str, *, trust: bool = False) -> tuple[Any, Any]:
    """The model and tokenizer of a repository, local or of the hub.

    Args:
        name (str): As for ``mlx_lm.load``.
        trust (bool): Run the repository's own model and tokenizer code.

    Raises:
        ValueError: If they cannot be loaded; one line says why.
    """
    try:
        tokenizer = {"trust_remote_code": trust}
        loaded = mlx_lm.load(name, tokenizer_config=tokenizer, **code_options(mlx_lm.load, trust))
    except Exception as error:  # of the hub's client, of transformers, of the model
        raise ValueError(f"The model '{line(name)}' cannot be loaded: {line(error)}") from error
    return loaded[0], loaded[1]


def code_options(load: Callable, trust: bool) -> dict[str, Any]:
    """Arguments by which ``load`` or ``load_model`` of mlx-lm runs model code or does not."""
    if "trust_remote_code" in signature(load).parameters:
        return {"trust_remote_code": trust}
    return {} if trust else {"model_config": {"model_file": None}}


@contextmanager
def without_code(module: ModuleType, trust: bool) -> Iterator[None]:
    """Let the ``load`` that a module of an older mlx-lm calls run no model code, unless trusted."""
    original = module.load
    if "trust_remote_code" not in signature(original).parameters:
        module.load = partial(original, **code_options(original, trust))  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.load = original  # type: ignore[attr-defined]
