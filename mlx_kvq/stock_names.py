"""The names that the package's modules import from mlx-lm, checked beforehand."""

from importlib import import_module

NAMES = {
    "models.base": ("create_causal_mask",),
    "models.cache": (
        "CacheList",
        "KVCache",
        "QuantizedKVCache",
        "RotatingKVCache",
        "_BaseCache",
        "create_attention_mask",
        "dynamic_roll",
    ),
}


class NotSupportedError(ValueError):
    """This mlx-lm lacks a name that a seam needs."""


def missing(name: str, program: str = "mlx_lm") -> NotSupportedError:
    """The error for a name in a program's package."""
    version = import_module(program).__version__
    return NotSupportedError(f"{program} {version} is not supported: {name} is missing")


def check() -> None:
    """Raise NotSupportedError if one of ``NAMES`` is missing."""
    for module, names in NAMES.items():
        try:
            found = import_module(f"mlx_lm.{module}")
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.startswith("mlx_lm."):
                raise
            raise missing(module) from None
        for name in names:
            if not hasattr(found, name):
                raise missing(f"{module}.{name}")
