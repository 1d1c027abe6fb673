"""A stand-in for ``mx.fast.metal_kernel`` that runs where there is no Metal."""

import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from mlx_kvq import ops
from mlx_kvq.ops import passed
from mlx_kvq.ops.gpu import machine

from .arrays import to_mlx
from .counters import Counters
from .errors import KernelError
from .execute import run

_real_metal_kernel = mx.fast.metal_kernel


def traced_source(trace, arrays: list[mx.array]) -> str:
    """The Metal source of the one custom kernel that ``trace(*arrays)`` calls.

    MLX generates it on every system while a function is exported, and writes it to the file
    behind the primitive's name: two strings, each after its length.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "traced.mlxfn"
        mx.export_function(str(path), trace, *arrays)
        data = path.read_bytes()
    at = data.index(b"CustomKernel") + len(b"CustomKernel")
    texts = []
    for _ in range(2):
        (length,) = struct.unpack_from("<Q", data, at)
        texts.append(data[at + 8 : at + 8 + length].decode())
        at += 8 + length
    return texts[1]


class Emulated:
    """What ran: ``counters`` has one ``Counters`` per launch, ``errors`` each ``KernelError``."""

    def __init__(self):
        self.counters: list[Counters] = []
        self.errors: list[KernelError] = []


class StandIn:
    """What ``metal_kernel`` returns: called like MLX's kernel, it returns evaluated arrays."""

    def __init__(self, mode: str, seed: int, seen: "Emulated", keywords: dict):
        self.kernel = _real_metal_kernel(**keywords)
        self.keep_strides = not keywords.get("ensure_row_contiguous", True)
        self.mode = mode
        self.seed = seed
        self.seen = seen
        self.sources: dict[tuple, str] = {}

    def source(self, arrays: list[mx.array], **keywords) -> str:
        """The generated source for these inputs; it depends on dtypes and on what is small."""
        kinds = tuple((a.dtype, a.size < 8, a.ndim == 0) for a in arrays)
        template = tuple(keywords.get("template") or ())
        key = (kinds, template, tuple(keywords["output_dtypes"]))
        if key not in self.sources:
            shapes = [mx.zeros(a.shape, a.dtype) for a in arrays]
            self.sources[key] = traced_source(
                lambda *x: self.kernel(inputs=list(x), **keywords), shapes
            )
        return self.sources[key]

    def __call__(
        self,
        *,
        inputs,
        output_shapes,
        output_dtypes,
        grid,
        threadgroup,
        template=None,
        init_value=None,
        verbose=False,
        stream=None,
    ) -> list[mx.array]:
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        keywords = {
            "output_shapes": output_shapes,
            "output_dtypes": output_dtypes,
            "grid": grid,
            "threadgroup": threadgroup,
            "template": template,
        }
        source = self.source(arrays, **keywords)
        if verbose:
            print(source)
        try:
            outputs, counters = run(
                source,
                arrays,
                output_shapes,
                output_dtypes,
                grid,
                threadgroup,
                mode=self.mode,
                seed=self.seed,
                init_value=init_value,
                keep_strides=self.keep_strides,
            )
        except KernelError as error:
            self.seen.errors.append(error)
            raise
        self.seen.counters.append(counters)
        return [to_mlx(x, dtype) for x, dtype in zip(outputs, output_dtypes, strict=True)]


def metal_kernel(
    name: str,
    input_names,
    output_names,
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options=None,
    *,
    mode: str = "checked",
    seed: int = 0,
    seen: "Emulated | None" = None,
) -> StandIn:
    """As ``mx.fast.metal_kernel``; the kernel runs in the emulator.

    Args:
        mode (str), seed (int): As for ``run``.
        seen (Emulated, optional): Gets the ``Counters`` of each call; ``.seen`` of the result.
    """
    keywords = {
        "name": name,
        "input_names": input_names,
        "output_names": output_names,
        "source": source,
        "header": header,
        "ensure_row_contiguous": ensure_row_contiguous,
        "atomic_outputs": atomic_outputs,
        "compile_options": compile_options,
    }
    return StandIn(mode, seed, seen or Emulated(), keywords)


@contextmanager
def emulated(mode: str = "fast", seed: int = 0, keep: bool = False) -> Iterator[Emulated]:
    """Inside, ``mx.fast.metal_kernel`` is the emulator's, and mlx_kvq believes in Metal. Passed
    trials are kept on disk only with ``keep``.

    ``mlx_kvq.ops.gpu.machine.language`` returns ``"metal"``. What ``mlx_kvq.ops`` remembers is
    dropped on both ways, so no kernel built outside runs inside, nor the reverse.

    Raises:
        KernelError: On leaving, the first one that the package swallowed to fall back to other
            code; ``errors.clear()`` prevents that.
    """
    seen = Emulated()

    def stand_in(*args, **keywords):
        return metal_kernel(*args, **keywords, mode=mode, seed=seed, seen=seen)

    before, language, path = mx.fast.metal_kernel, machine.language, passed.path
    ops.forget()
    if not keep:
        passed.path = lambda: None
    mx.fast.metal_kernel = stand_in
    machine.language = lambda: "metal"
    try:
        yield seen
    finally:
        mx.fast.metal_kernel = before
        machine.language, passed.path = language, path
        ops.forget()
    if seen.errors:
        raise seen.errors[0]
