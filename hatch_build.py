"""Gives an editable install the start-up line that the wheel has."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StartupLineHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        # Used by editable builds only, and instead of pyproject's force-include: that would also
        # copy kernels/ into site-packages, where the copy would go stale.
        build_data["force_include_editable"]["mlx_kvq.pth"] = "mlx_kvq.pth"
