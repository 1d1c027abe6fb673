"""Attention of one token on an NVIDIA GPU, kernels alone: ours, PyTorch's in fp16, launch sizes;
and how long it takes to read as many bytes.

    N="ncu --clock-control none --cache-control none --csv --metrics gpu__time_duration.sum"
    $N -k regex:kvq_attend python scripts/studies/attend_kernel.py ours > ours.csv
    $N -k regex:kvq_attend python scripts/studies/attend_kernel.py ours --sweep > sweep.csv
    $N --nvtx --nvtx-include "call/" python scripts/studies/attend_kernel.py torch > torch.csv
    python scripts/studies/attend_kernel.py table before.csv ours.csv torch.csv
    $N -k regex:plain_read python scripts/studies/attend_kernel.py read > read.csv
    python scripts/studies/attend_kernel.py table-of-reads read.csv

Each call is preceded by 256 MB written, so that nothing it reads is in the GPU's cache; the first
one of each shape is left out, and the median of the others counts. ``ours`` runs whatever mlx_kvq
PYTHONPATH finds. PyTorch's time is that of all kernels of a call; one backend after the other.
"""

import argparse
import csv
import itertools
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

HEADS = [(12, 2, 128), (32, 8, 128), (4, 1, 256), (14, 2, 64)]
SHAPES = [(1, 512), (1, 4096), (1, 32768), (1, 131072), (16, 8192), (32, 32768)]
CALLS = 5
FLUSH = 64 << 20  # floats
PARTS = (1, 2, 3, 4, 6, 8, 11, 16, 22, 33, 44, 66, 96, 132)  # splits of a sweep
SECOND = ("reduction", "combine")  # kernels of PyTorch's that end a call
# Packed rows of the shapes above, MB, and grids that read them: the fastest one counts.
READ = (0.3, 1.1, 2.2, 8.9, 17.8, 35.6, 71.3, 142.6, 285.2, 1140.9)
GRIDS = ((132, 512), (264, 256), (264, 512), (528, 256), (528, 512), (1056, 256))
PLAIN_READ = """
const uint4* from = (const uint4*)x;
const unsigned n = count[0], step = gridDim.x * blockDim.x;
unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
unsigned sum = 0;
for (; i + (AT_ONCE - 1) * step < n; i += AT_ONCE * step) {
  uint4 v[AT_ONCE];
  #pragma unroll
  for (int j = 0; j < AT_ONCE; j++) v[j] = __ldcs(from + i + j * step);
  #pragma unroll
  for (int j = 0; j < AT_ONCE; j++) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
}
for (; i < n; i += step) {
  const uint4 v = __ldcs(from + i);
  sum ^= v.x ^ v.y ^ v.z ^ v.w;
}
if (sum == 0x9e3779b9u) out[0] = sum;  // so that nothing is left out
"""


def ours(spec: str, sweep: bool) -> None:
    import mlx.core as mx

    from mlx_kvq import ops
    from mlx_kvq.format.format import make_format
    from mlx_kvq.format.spec import Spec
    from mlx_kvq.ops import gpu
    from mlx_kvq.ops.gpu import tuning
    from mlx_kvq.ops.packed import First, Packed

    asked = Spec.parse(spec)
    if asked is None:
        raise SystemExit("fp16 has no kernel here: 'torch' times PyTorch's")
    normal, flush = tuning.TUNING["cuda"], mx.zeros((FLUSH,))
    for (Hq, Hkv, D), (B, T) in itertools.product(HEADS, SHAPES):
        fmt = make_format(asked, D)
        k, v = (mx.random.normal((1, Hkv, 2048, D)).astype(mx.float16) for _ in range(2))
        one = ops.quantize_pack(k, v, fmt)[0]
        room = -(-T // 256) * 256 + 256
        rows = mx.contiguous(mx.tile(one, (B, 1, -(-room // 2048), 1))[:, :, :room])
        tail, first = (
            mx.random.normal((B, Hkv, n, 2 * D)).astype(mx.bfloat16) for n in (fmt.recent_at(T), 4)
        )
        q = mx.random.normal((B, Hq, 1, D)).astype(mx.float16)
        mx.eval(rows, tail, first, q)
        packed = Packed(rows, T, fmt, tail, None, First(first, 4))
        for name, sizes, parts in _sizes(normal, sweep, B * Hkv, D, T):
            tuning.TUNING["cuda"] = sizes
            ops.forget()
            for _ in range(CALLS):
                mx.eval(flush + 1.0)
                mx.eval(gpu.attend(q, packed, D**-0.5, parts=parts))
            size = rows.nbytes / room * T
            print(f"MARK {name} {Hq}/{Hkv} {D} {B} {T} {size:.0f}", flush=True)
        tuning.TUNING["cuda"] = normal
        mx.clear_cache()


def _sizes(normal, sweep: bool, parallel: int, D: int, tokens: int):
    """Name, launch sizes and number of splits."""
    yield "ours", normal, None
    if sweep:
        all_keys = (32, 64) if D <= 64 else (32,)
        for keys, groups in itertools.product(all_keys, (4, 8) if D > 128 else (8,)):
            sizes = replace(normal, keys=keys, short_keys=keys, simd_groups=groups, busy=1 << 30)
            for parts in PARTS:
                enough = parts == 1 or parts * parallel >= 16
                if enough and parts * parallel <= 560 and parts * keys <= tokens:
                    yield f"{keys},{groups},{parts}", sizes, parts


def torch() -> None:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as attend

    flush = torch.zeros(FLUSH, device="cuda")
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    for (Hq, Hkv, D), (B, T) in itertools.product(HEADS, SHAPES):
        q, k, v = (
            torch.randn(B, H, L, D, device="cuda", dtype=torch.float16)
            for H, L in ((Hq, 1), (Hkv, T), (Hkv, T))
        )
        for name, backend in backends.items():
            with sdpa_kernel(backend):
                attend(q, k, v, enable_gqa=True)
                for _ in range(CALLS):
                    flush.add_(1.0)
                    torch.cuda.synchronize()
                    torch.cuda.nvtx.range_push("call")
                    attend(q, k, v, enable_gqa=True)
                    torch.cuda.nvtx.range_pop()
                    torch.cuda.synchronize()
            print(f"MARK {name} {Hq}/{Hkv} {D} {B} {T} {2 * k.nbytes}", flush=True)
        del q, k, v
        torch.cuda.empty_cache()


def plain_read() -> None:
    """Read so many bytes and do nothing with them: what no kernel of attention can beat."""
    import mlx.core as mx

    names = {"input_names": ["x", "count"], "output_names": ["out"]}
    make: Callable = partial(mx.fast.cuda_kernel, name="plain_read", source=PLAIN_READ)
    kernel = make(**names)
    flush = mx.zeros((FLUSH,))
    for size in READ:
        n = int(size * 1e6) // 16
        x = mx.random.randint(0, 1 << 30, (4 * n,)).astype(mx.uint32)
        count = mx.array([n], mx.uint32)
        mx.eval(x, count)
        for (blocks, threads), at_once in itertools.product(GRIDS, (4, 8)):
            for _ in range(CALLS):
                mx.eval(flush + 1.0)
                mx.eval(
                    kernel(
                        inputs=[x, count],
                        output_shapes=[(8,)],
                        output_dtypes=[mx.uint32],
                        grid=(blocks * threads, 1, 1),
                        threadgroup=(threads, 1, 1),
                        template=[("AT_ONCE", at_once)],
                    )
                )
            print(f"MARK {size} {blocks},{threads},{at_once} {16 * n}", flush=True)


def read(text: str) -> dict[tuple[str, ...], tuple[float, float]]:
    """(name, heads, D, batch, tokens) -> µs and bytes, from what ncu and this script printed."""
    marks: list[list[str]] = []
    calls: list[float] = []
    head: list[str] = []
    for line in text.splitlines():
        if line.startswith("MARK "):
            marks.append(line.split()[1:])
        elif line.startswith('"'):
            row = next(csv.reader([line]))
            if row[0] == "ID":
                head = row
                continue
            kernel = dict(zip(head, row, strict=True))
            time = float(kernel["Metric Value"].replace(",", ""))
            time *= {"ns": 1e-3, "us": 1.0, "ms": 1e3}[kernel["Metric Unit"]]
            if any(word in kernel["Kernel Name"] for word in SECOND):
                calls[-1] += time
            else:
                calls.append(time)
    if len(calls) != CALLS * len(marks):
        raise ValueError(f"{len(calls)} calls for {len(marks)} shapes, not {CALLS} each")
    found = {}
    for i, (*key, size) in enumerate(marks):
        found[tuple(key)] = statistics.median(calls[CALLS * i + 1 : CALLS * (i + 1)]), float(size)
    return found


def table(files: list[Path]) -> str:
    """The shapes of all files beside one another, with TB/s of ours, and × the best fp16."""
    columns: dict[str, dict] = {}
    for file in files:
        for (name, *shape), value in read(file.read_text(encoding="utf-8")).items():
            column = file.stem if name == "ours" else name
            columns.setdefault(column, {})[tuple(shape)] = value
    others = [name for name in columns if name in ("cudnn", "flash")]
    mine = [name for name in columns if name not in others]
    head = ["heads q/kv, D", "batch", "tokens", *mine, "TB/s", *others, "× best fp16"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for shape in columns[mine[-1]]:
        heads, D, B, T = shape
        time, size = columns[mine[-1]][shape]
        best = min((columns[o][shape][0] for o in others), default=float("nan"))
        cells = [f"{heads}, {D}", B, T, *(f"{columns[m][shape][0]:.1f}" for m in mine)]
        cells += [f"{size / time / 1e6:.2f}", *(f"{columns[o][shape][0]:.1f}" for o in others)]
        lines.append("| " + " | ".join([*cells, f"{best / time:.2f}"]) + " |")
    return "\n".join(lines)


def table_of_reads(files: list[Path]) -> str:
    """The fastest grid of each size."""
    best: dict[str, tuple[float, float]] = {}
    for file in files:
        for (size, _), found in read(file.read_text(encoding="utf-8")).items():
            best[size] = min(found, best.get(size, found))
    lines = ["| MB | a plain read, µs | TB/s |", "|--:|--:|--:|"]
    cells = ((size, time, bytes_ / time / 1e6) for size, (time, bytes_) in best.items())
    lines += [f"| {size} | {time:.1f} | {rate:.2f} |" for size, time, rate in cells]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["ours", "torch", "read", "table", "table-of-reads"])
    parser.add_argument("files", nargs="*", type=Path, help="of a table: ncu's output")
    parser.add_argument("--kv-cache", default="int4-srft", help="of ours")
    parser.add_argument("--sweep", action="store_true", help="of ours: many launch sizes")
    args = parser.parse_args()
    if args.what == "ours":
        ours(args.kv_cache, args.sweep)
    elif args.what == "torch":
        torch()
    elif args.what == "read":
        plain_read()
    else:
        print((table if args.what == "table" else table_of_reads)(args.files))


if __name__ == "__main__":
    main()
