"""Hooks ``--kv-cache`` into mlx-lm's command lines, which have no plug-in point.

The one line of ``mlx_kvq.pth`` makes every interpreter start in the environment import this
file. So it imports only what a bare start has loaded already, never prints and costs a fraction
of a millisecond (``scripts/time_startup.py``). It leaves one finder behind, which does nothing
until a command module of mlx-lm, or one of its modules that load, is imported. Without the line,
``import mlx_kvq`` imports this file, after mlx-lm perhaps.
"""

import os
import sys

TYPE_CHECKING = False

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import CodeType, ModuleType
    from typing import Any


TYPE_CHECKING = False  # see __init__.py
COMMANDS = frozenset(
    {
        "mlx_lm.benchmark",
        "mlx_lm.cache_prompt",
        "mlx_lm.chat",
        "mlx_lm.evaluate",
        "mlx_lm.generate",
        "mlx_lm.perplexity",
        "mlx_lm.server",
    }
)
VLM_COMMANDS = frozenset({"mlx_vlm.generate.dispatch", "mlx_vlm.server.cli"})
# Every command and the Python API load models by utils, and saved caches by models.cache.
MODULES = COMMANDS | VLM_COMMANDS | {"mlx_lm.models.cache", "mlx_lm.utils", "mlx_vlm.utils"}
# What `python -m mlx_lm.<command>` runs instead of a second copy of the module: the patched one.
# (import_module, because the function mlx_lm.generate hides the module of that name.)
RUN_AS_MAIN = """\
from importlib import import_module
module = import_module("{name}")
globals().update((k, v) for k, v in vars(module).items() if not k.startswith("__"))
if __name__ == "__main__":
    module.main()
"""


class Finder:
    """Lets the other finders find one of the modules and wraps its loader."""

    _searching: "set[str]" = set()

    @classmethod
    def find_spec(
        cls, name: str, path: "Any" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        # The second test ends the recursion with hooks that search sys.meta_path as this one does.
        if name not in MODULES or name in cls._searching:
            return None
        cls._searching.add(name)
        try:
            for finder in sys.meta_path:
                find_spec = getattr(finder, "find_spec", None)
                spec = find_spec(name, path, target) if find_spec else None
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):
                        spec.loader = Loader(spec.loader)
                    return spec
        finally:
            cls._searching.discard(name)
        return None


class Loader:
    """A module's own loader in everything but the patch after the module has run."""

    def __init__(self, loader: "Any"):
        self._loader = loader

    def __getattr__(self, name: str) -> "Any":
        return getattr(self._loader, name)

    def exec_module(self, module: "ModuleType") -> None:
        self._loader.exec_module(module)
        patch(module)

    def get_code(self, name: str) -> "CodeType | None":
        code = self._loader.get_code(name)
        # runpy, which is `python -m`, executes this code and never calls exec_module.
        for_runpy = sys._getframe(1).f_globals.get("__name__") == "runpy"
        if for_runpy and code is not None and "__main__" in code.co_consts:
            return compile(RUN_AS_MAIN.format(name=name), f"<mlx_kvq: run {name}>", "exec")
        return code


def patch(module: "ModuleType") -> None:
    """Call the plug-in; whatever fails there, mlx-lm goes on as if mlx_kvq were absent."""
    before = dict(vars(module))
    try:
        from mlx_kvq.plugin import patch as patch_command

        patch_command(module)
    except Exception as error:
        vars(module).update(before)
        if Finder in sys.meta_path:
            # No further module is patched, so there is no second warning either.
            sys.meta_path.remove(Finder)
            warn(module.__name__, error)


def warn(name: str, error: Exception) -> None:
    if sys.stderr is not None:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(
            f"[mlx_kvq] warning: cannot add --kv-cache to {name}, mlx-lm runs without it "
            f"({reason}). MLX_KVQ_DISABLE=1 turns mlx_kvq off.",
            file=sys.stderr,
        )


if os.environ.get("MLX_KVQ_DISABLE", "") in ("", "0"):
    sys.meta_path.insert(0, Finder)
    for _name in MODULES.intersection(sys.modules):
        if not getattr(getattr(sys.modules[_name], "__spec__", None), "_initializing", False):
            patch(sys.modules[_name])
