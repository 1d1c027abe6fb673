"""Checks of the arguments of public functions: one error that names the argument."""

from typing import Any

import mlx.nn as nn


def integer(name: str, given: object, least: int = 1, *, optional: bool = False) -> None:
    """Raise ValueError unless ``given`` is an integer, ``least`` or more, or None if optional."""
    if given is None and optional:
        return
    if isinstance(given, bool) or not isinstance(given, int) or given < least:
        raise ValueError(f"{name} is an integer, at least {least}, got {given!r}.")


def model(given: object) -> None:
    """Raise ValueError unless ``given`` is a model with layers."""
    if not isinstance(given, nn.Module) or not hasattr(given, "layers"):
        raise ValueError(
            f"model is a model from mlx_lm.load or mlx_vlm.load, got a {type(given).__name__}."
        )


def instance(name: str, given: Any, kinds: tuple[type, ...], said: str) -> None:
    """Raise ValueError unless ``given`` is None or one of ``kinds``; ``said`` describes them."""
    if given is not None and not isinstance(given, kinds):
        raise ValueError(f"{name} is {said}, got a {type(given).__name__}.")
