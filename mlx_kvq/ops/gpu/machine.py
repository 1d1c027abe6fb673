"""Which GPU there is."""

from dataclasses import replace

import mlx.core as mx

from ...format.format import Format
from . import tables
from .tuning import TUNING, Tuning

ROTATIONS = {"srft": 0, "srht": 1, "none": 2}


def language() -> str | None:
    """``"metal"`` or ``"cuda"`` if the default device is such a GPU, else ``None``."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return None
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() else None


def machine() -> str:
    """:func:`language`, or a RuntimeError."""
    if (found := language()) is None:
        raise RuntimeError("The fused kernels need a Metal or CUDA GPU as the default device.")
    return found


def tuning() -> Tuning:
    """Launch sizes of this machine."""
    name = machine()
    sizes = TUNING[name]
    if name == "cuda" and not _is_large():
        memory = min(sizes.threadgroup_memory, 48 * 1024)
        sizes = replace(sizes, threadgroup_memory=memory)
    return sizes


def _is_large() -> bool:
    """Whether a processor of this NVIDIA GPU has room for two large threadgroups: 164 KB or more,
    as in data centers (compute capability 8.0, 9.0 and 10.x), where others have 64 to 128."""
    info = mx.device_info()
    major, minor = (int(info.get(f"compute_capability_{p}", 0)) for p in ("major", "minor"))
    return (major, minor) in ((8, 0), (9, 0)) or major == 10


def ahead() -> int:
    """Layers of a prompt after which evaluation begins (``Tuning.ahead``), 0 without a GPU."""
    return 0 if language() is None else tuning().ahead


def why_not(fmt: Format, dtype: mx.Dtype | None = None) -> str | None:
    """Why the fused kernels do not do this format, in one line, or ``None`` if they do."""
    if fmt.spec.rotation not in ROTATIONS:
        return f"rotation '{fmt.spec.rotation}' has no fused kernel"
    for D in (fmt.layout.k_dim, fmt.layout.v_dim):
        if reason := tables.why_not(D):
            return reason
    if dtype is not None and dtype not in (mx.float16, mx.bfloat16, mx.float32):
        return f"dtype {dtype} is none of float16, bfloat16 and float32"
    return None
