"""Where the Metal sources are: in the package once installed, beside it in a checkout."""

from pathlib import Path


def kernels_path() -> Path:
    """The folder of kernel sources.

    Raises:
        FileNotFoundError: If the installation holds no such folder.
    """
    package = Path(__file__).resolve().parents[2]
    places = (package / "kernels", package.parent / "kernels")
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"The kernel sources of mlx_kvq are neither in {places[0]} nor in {places[1]}. "
        "The installation is incomplete: run 'pip install --force-reinstall --no-deps mlx-kvq'."
    )


def kernel_source(name: str) -> str:
    """The text of one kernel source.

    Args:
        name (str): File name in the folder, for example ``"dots.metal"``.

    Raises:
        FileNotFoundError: If there is no such file; the message lists what there is.
    """
    folder = kernels_path()
    path = folder / name
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_file())) or "no file"
        raise FileNotFoundError(
            f"There is no kernel source {name!r} in {folder}, which has: {known}."
        )
    return path.read_text(encoding="utf-8")
