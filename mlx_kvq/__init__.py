"""A rotated int4 key/value cache for mlx-lm."""

# Every interpreter start runs this file (see _startup.py), so it imports nothing: names are
# loaded on first use, and type checkers take this constant for typing.TYPE_CHECKING.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from . import ops
    from .caches.prefix import PrefixCache
    from .calibration.fit import calibrate
    from .calibration.set import CalibrationSet
    from .format.spec import Spec
    from .measure.evaluate import evaluate
    from .model.enable import disable, enable, make_prompt_cache
    from .repositories.convert import convert

__version__ = "0.1.0"

__all__ = [
    "CalibrationSet",
    "PrefixCache",
    "Spec",
    "__version__",
    "calibrate",
    "convert",
    "disable",
    "enable",
    "evaluate",
    "make_prompt_cache",
    "ops",
]

_MODULES = {
    "CalibrationSet": "calibration.set",
    "PrefixCache": "caches.prefix",
    "Spec": "format.spec",
    "calibrate": "calibration.fit",
    "convert": "repositories.convert",
    "disable": "model.enable",
    "enable": "model.enable",
    "evaluate": "measure.evaluate",
    "make_prompt_cache": "model.enable",
    "ops": "ops",
}


# What needs mlx-lm, and says so if this one is not supported.
_LED = {"PrefixCache", "calibrate", "convert", "disable", "enable", "evaluate", "make_prompt_cache"}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if name in _LED:
        import_module(f"{__name__}.stock_names").check()
    if name == "calibrate":  # what records queries takes attention sinks only through a seam
        import_module(f"{__name__}.caches.seams").install()
    module = import_module(f"{__name__}.{_MODULES[name]}")
    value = module if name == _MODULES[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


from . import _startup as _startup  # noqa: E402  # an installed start-up line has done so already
