"""The machine and the installation, for reports."""

import platform
from importlib.metadata import PackageNotFoundError, version

import mlx.core as mx

from .. import __version__


def machine() -> dict[str, str]:
    device = mx.default_device()
    info = mx.device_info() if device.type == mx.DeviceType.gpu else {}
    return {
        "mlx_kvq": __version__,
        "mlx": _version("mlx"),
        "mlx-lm": _version("mlx-lm"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": str(info.get("device_name", platform.processor() or platform.machine())),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"
