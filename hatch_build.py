"""What a wheel's metadata and an editable install need besides pyproject.toml."""

import re
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface


class StartupLineHook(BuildHookInterface):
    """Gives an editable install the start-up line that the wheel has."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        # Used by editable builds only, and instead of pyproject's force-include: that would also
        # copy kernels/ into site-packages, where the copy would go stale.
        build_data["force_include_editable"]["mlx_kvq.pth"] = "mlx_kvq.pth"


class ReadmeHook(MetadataHookInterface):
    """README.md with absolute links: PyPI shows it where no other file of the project is."""

    def update(self, metadata: dict[str, Any]) -> None:
        address = metadata["urls"]["Repository"]
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        text = re.sub(r"(!\[[^]]*\]\()(?!https?://)", rf"\g<1>{address}/raw/main/", text)  # images
        text = re.sub(r"\]\((?!https?://|#)", f"]({address}/blob/main/", text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
