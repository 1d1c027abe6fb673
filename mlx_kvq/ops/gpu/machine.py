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
    if name == "cuda" and int(mx.device_info().get("compute_capability_major", 8)) < 8:
        memory = min(sizes.threadgroup_memory, 60 * 1024)  # Turing has 64 KB
        sizes = replace(sizes, threadgroup_memory=memory)
    return sizes


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
