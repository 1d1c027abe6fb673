"""Adds ``--kv-cache`` to the commands of mlx-lm and mlx-vlm, and a repository's own cache to their
``load``.

Neither has a plug-in point: ``patch`` gets each of their modules right after the import (see
``_startup``), when others may be half imported. So nothing of this room imports from ``mlx_lm`` or
``mlx_vlm`` before a function that needs it is called.

- ``option``: the option, and what it was given.
- ``loading``: ``mlx_lm.utils``, whose ``load`` enables what a repository or ``MLX_KVQ_SPEC`` says.
- ``programs``: mlx-lm's commands, whose ``load`` enables what ``--kv-cache`` says.
- ``vlm``: both for mlx-vlm.

Where a module lacks a name that is needed it stays as it is, and ``--kv-cache`` is an error that
names it.
"""

from types import ModuleType


def patch(module: ModuleType) -> None:
    """Give a command's module the option, or change what loads models and prompt caches."""
    if module.__name__.startswith("mlx_vlm."):
        from . import vlm

        vlm.patch(module)
    else:
        from . import programs

        programs.patch(module)
