"""Attention of one token under PyTorch's cuDNN and flash backends, at the shapes of bench_gpu.py.

    python scripts/bench_torch.py --json OUT/torch.json   # CUDA, about two minutes

For comparison on the same card; PyTorch is no dependency of mlx_kvq, which this does not import.
Times are without the host: replays of a CUDA graph that holds a chain of calls, in which the
output of a call is the query of the next, over caches that together are larger than L2. K and V
are slices of buffers with a capacity that is a multiple of 256, as a KV cache's are. Contenders are
replayed in turn; medians and quartiles over the rounds.
"""

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

SHAPES = [(12, 2, 128), (4, 1, 256), (32, 8, 128), (14, 2, 64)]  # query heads, KV heads, head size
SIZES = [(1, 512), (1, 4000), (1, 32000), (1, 130000), (16, 8192), (32, 32000)]  # batch, tokens
BACKENDS = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION"}
WORDS = {"fp16": "float16", "bf16": "bfloat16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--beyond", type=int, default=160, metavar="MB", help="above the L2 cache")
    parser.add_argument("--budget", type=float, default=240, help="seconds in all")
    parser.add_argument("--dtypes", nargs="+", choices=WORDS, default=list(WORDS))
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("quartiles take at least 2 rounds")
    try:
        import torch
    except ImportError:
        raise SystemExit("bench_torch.py needs PyTorch with CUDA; it is not installed.") from None
    if not torch.cuda.is_available():
        raise SystemExit(f"bench_torch.py needs a CUDA GPU; torch {torch.__version__} sees none.")
    record, rows = describe(torch), []
    for name, value in record.items():
        print(f"{name:8} {value}", flush=True)
    started = time.perf_counter()
    for heads in SHAPES:
        for B, T in SIZES:
            if time.perf_counter() - started > args.budget:
                print(f"left out, no time: {heads}, batch {B}, {T} tokens")
                continue
            rows += measure(torch, heads, B, T, args)
            torch.cuda.empty_cache()
            if args.json:
                part = args.json.with_name(f"{args.json.name}.part")
                part.write_text(
                    json.dumps({"record": record, "rows": rows}, indent=1, ensure_ascii=False),
                    encoding="utf-8",
                )
                part.replace(args.json)


def describe(torch) -> dict:
    """Versions, card, command."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python scripts/bench_torch.py {shlex.join(sys.argv[1:])}".strip(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(),
    }


def measure(torch, heads, B: int, T: int, args) -> list[dict]:
    """Rows of every backend and dtype at one shape; one that fails gets a row that says why."""
    Hq, Hkv, D = heads
    replays, notes, names = {}, {}, []
    for dtype in args.dtypes:
        caches = fill(torch, heads, B, T, getattr(torch, WORDS[dtype]), args.beyond)
        for backend in BACKENDS:
            name = f"torch {backend} {dtype}"
            names.append(name)
            try:
                check(torch, backend, caches[0], heads)
                replays[name] = captured(torch, backend, caches, heads)
            except Exception as error:  # this backend has no such operation here
                notes[name] = " ".join(f"{type(error).__name__}: {error}".split())[:120]
    times: dict[str, list[float]] = {name: [] for name in replays}
    for r in range(args.rounds + 3):
        for name, (graph, calls, _) in replays.items():
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            graph.replay()
            last.record()
            last.synchronize()
            if r >= 3:  # warm-up before
                times[name].append(1e3 * first.elapsed_time(last) / calls)
    rows = []
    size = B * 2 * (Hkv * T + Hq) * D * 2
    for name in names:
        row: dict = {"op": "attend", "heads": f"{Hq} q / {Hkv} kv, D = {D}", "cache": name}
        row |= {"batch": B, "tokens": T}
        if name in notes:
            rows.append({**row, "note": notes[name]})
        else:
            low, middle, high = statistics.quantiles(times[name], n=4, method="inclusive")
            rows.append(row | {"us": middle, "us_low": low, "us_high": high, "bytes": size})
        print(", ".join(str(v) for v in rows[-1].values()), flush=True)
    return rows


def fill(torch, heads, B: int, T: int, dtype, beyond: int) -> list[tuple]:
    """Caches of random content, together larger than ``beyond`` MB; keys and values are slices."""
    _, Hkv, D = heads
    capacity = -(-T // 256) * 256
    copies = max(2, -(-(beyond << 20) // (4 * B * Hkv * T * D)))
    shape = (B, Hkv, capacity, D)
    return [
        tuple(torch.randn(shape, device="cuda", dtype=dtype)[:, :, :T] for _ in range(2))
        for _ in range(copies)
    ]


def attend(torch, backend: str, q, cache):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([getattr(SDPBackend, BACKENDS[backend])]):
        return torch.nn.functional.scaled_dot_product_attention(q, *cache, enable_gqa=True)


def query(torch, heads, cache):
    Hq, _, D = heads
    return torch.randn((cache[0].shape[0], Hq, 1, D), device="cuda", dtype=cache[0].dtype)


def check(torch, backend: str, cache, heads) -> None:
    """The backend gives what fp32 gives, on the first sequence."""
    Hq, Hkv, _ = heads
    q, part = query(torch, heads, cache)[:1], tuple(x[:1] for x in cache)
    got = attend(torch, backend, q, part).float()
    k, v = (x.float().repeat_interleave(Hq // Hkv, dim=1) for x in part)
    weights = (q.float() @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    error = (got - weights @ v).norm() / (weights @ v).norm()
    if not error < 2e-2:
        raise ValueError(f"wrong by {error:.2g}")


def captured(torch, backend: str, caches: list[tuple], heads) -> tuple:
    """A graph of at least eight calls, one after the other, over all caches; their number; and
    what the graph reads, to be kept while it is replayed."""
    calls = max(8, min(len(caches), 512))
    order = [caches[i % len(caches)] for i in range(calls)]
    q = query(torch, heads, caches[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for cache in order[:3]:
            attend(torch, backend, q, cache)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x = q
        for cache in order:
            x = attend(torch, backend, x, cache)
    graph.replay()
    torch.cuda.synchronize()
    return graph, calls, (q, caches)


if __name__ == "__main__":
    main()
