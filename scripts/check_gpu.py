"""Check and time the fused kernels on this machine's GPU (Metal or CUDA).

    python scripts/check_gpu.py                 # every check, then the timings
    python scripts/check_gpu.py --times --batch 32 --length 32768
    python scripts/check_gpu.py --tune          # launch sizes of attention, best first

Checks compare with the reference backend on the CPU. Timings are of dependent chains (each launch
waits for the one before, as in decoding) over buffers that together exceed the L2 cache; the
median of several windows after a warm-up, per call.
"""

import argparse
import itertools
import statistics
import time
from dataclasses import replace

import mlx.core as mx

from mlx_kvq import fused, reference, tuning
from mlx_kvq.format import Calibration, make_format
from mlx_kvq.spec import Spec

DIMS = (64, 80, 96, 112, 128, 192, 256)
FORMATS = [("int4-srft", D) for D in DIMS] + [
    ("int4-srft:group_size=64", 128),
    ("int4-srft:group_size=128", 128),
    ("int4-srft:group_size=24", 96),
    ("int4-srft:group_size=8", 64),
    ("int4-srft:group_size=16", 128),
    ("int4-srft:group_size=40", 80),
    ("int8-srft", 64),
    ("int8-srft", 128),
    ("int8-srft", 256),
    ("int8-srft:group_size=16", 128),
    ("k8v4-srft", 128),
    ("k8v4-srft", 80),
    ("int4-srht", 128),
    ("int4-none", 128),
    ("int4-srft:scale=paper", 128),
    ("int8-srft:scale=paper", 128),
    ("int4-srft:scale=absmax", 256),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only the checks")
    parser.add_argument("--times", action="store_true", help="only the timings")
    parser.add_argument("--tune", action="store_true", help="only the search for launch sizes")
    parser.add_argument("--spec", default="int4-srft")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--heads", default="12,2", help="query heads, KV heads")
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--length", type=int, default=None)
    args = parser.parse_args()
    machine = fused.language()
    if machine is None:
        raise SystemExit("The default device is neither a Metal nor a CUDA GPU.")
    print(f"{machine}: {mx.device_info()}")
    every = not (args.check or args.times or args.tune)
    if args.check or every:
        check_all()
    Hq, Hkv = (int(x) for x in args.heads.split(","))
    shapes = [(1, 1024), (1, 4096), (1, 32768), (8, 8192), (32, 32768)]
    if args.batch or args.length:
        shapes = [(args.batch or 1, args.length or 4096)]
    if args.times or every:
        time_all(args.spec, args.dim, Hq, Hkv, shapes)
    if args.tune:
        for B, T in shapes:
            tune(args.spec, args.dim, Hq, Hkv, B, T, machine)


# ---- checks -----------------------------------------------------------------------------------
def check_all() -> None:
    mx.random.seed(1)
    failures = 0
    started = time.perf_counter()
    for spec, D in FORMATS:
        fmt = make_format(Spec.parse(spec), D)
        failures += report(f"{spec} D={D}", check_format(fmt, D))
    fmt = make_format(Spec.parse("int4-srft"), 192, 128)
    failures += report("int4-srft D=192,128", check_format(fmt, 192))
    fmt = calibrated(128, 2)
    failures += report("int4-srft D=128 calibrated", check_format(fmt, 128))
    for L, G, options in itertools.product(
        (1, 2, 8),
        (1, 2, 4, 6, 8, 16),
        ({}, {"mask": "causal"}, {"mask": "bool"}, {"mask": "add", "sinks": True},
         {"mask": "causal", "starts": True, "window": 100}),
    ):  # fmt: skip
        name = f"attend D=128 GQA={G} L={L} {options}"
        failures += report(name, check_attend(fmt, 128, G, L, 700, **options), quiet=True)
    print(f"{failures} failures, {time.perf_counter() - started:.0f} s")
    if failures:
        raise SystemExit(1)


def calibrated(D: int, Hkv: int):
    def arrays():
        a = [mx.random.normal((Hkv, D)) for _ in range(3)]
        return Calibration(0.5 * a[0], mx.exp(0.5 * a[1]), mx.exp(0.3 * a[2]))

    return make_format(Spec.parse("int4-srft"), D, keys=arrays(), values=arrays())


def report(name: str, errors: dict[str, float], quiet: bool = False) -> int:
    limits = {"codes": 1e-3, "dequantize": 0.0, "one split": 2e-3, "splits": 2e-3}
    bad = [k for k, x in errors.items() if not x <= limits[k]]
    if bad or not quiet:
        text = "  ".join(f"{k} {x:.2g}" for k, x in errors.items())
        print(f"{'FAIL' if bad else 'ok  '} {name}: {text}", flush=True)
    return len(bad)


def on_cpu(function, *args, **keywords):
    with mx.stream(mx.cpu):
        out = function(*args, **keywords)
        mx.eval(out)
    return out


def worst(got: mx.array, want: mx.array) -> float:
    """Largest error of a vector relative to the vector, in the Euclidean norm."""
    with mx.stream(mx.cpu):
        got, want = got.astype(mx.float32), want.astype(mx.float32)
        size = mx.maximum(mx.linalg.norm(want, axis=-1), 1e-6)
        error = mx.linalg.norm(got - want, axis=-1) / size
        return float("inf") if mx.any(mx.isnan(error)).item() else error.max().item()


def check_format(fmt, D: int) -> dict[str, float]:
    lay = fmt.layout
    B, H, T = 2, 2, 300
    # Strided as models hand them over: [B, T, H, D] in memory.
    k = mx.random.normal((B, T, H, lay.k_dim)).astype(mx.float16).swapaxes(1, 2)
    v = mx.random.normal((B, T, H, lay.v_dim)).astype(mx.float16).swapaxes(1, 2)
    got = fused.quantize_pack(k, v, fmt)
    few = fused.quantize_pack(k[:1, :, :3], v[:1, :, :3], fmt)
    mx.eval(got, few)
    want = on_cpu(reference.quantize_pack, k, v, fmt)
    with mx.stream(mx.cpu):
        wrong = (got != want).mean().item() / 8
        wrong = max(wrong, (few != want[:1, :, :3]).mean().item() / 8)
    out = {"codes": wrong}
    different = 0.0
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        for a, b in zip(
            fused.dequantize(want, T - 5, fmt, dtype),
            on_cpu(reference.dequantize, want, T - 5, fmt, dtype),
            strict=True,
        ):
            mx.eval(a)
            with mx.stream(mx.cpu):
                different = max(different, (a != b).mean().item())
    out["dequantize"] = different
    return out | check_attend(fmt, D, 4, 1, T)


def check_attend(
    fmt, D, G, L, T, mask=None, sinks=None, starts=None, window=None
) -> dict[str, float]:
    lay = fmt.layout
    B, H = 2, 2
    k = mx.random.normal((B, H, T, lay.k_dim))
    v = mx.random.normal((B, H, T, lay.v_dim))
    rows = on_cpu(reference.quantize_pack, k, v, fmt)
    spare = mx.full((B, H, 20, rows.shape[-1]), 0xFFFFFFFF, dtype=mx.uint32)  # NaN scales
    rows = on_cpu(mx.concatenate, [rows, spare], axis=2)
    q = mx.random.normal((B, L, H * G, lay.k_dim)).astype(mx.float16).swapaxes(1, 2)
    if mask == "bool":
        mask = mx.random.uniform(shape=(B, 1, L, T)) < 0.7
    elif mask == "add":
        mask = mx.random.normal((H * G, L, T)).astype(mx.float16)
    arguments = {
        "mask": mask,
        "sinks": None if sinks is None else mx.random.normal((H * G,)),
        "starts": None if starts is None else mx.array([3, 77], dtype=mx.int32),
        "window": window,
    }
    mx.eval(q, [a for a in arguments.values() if isinstance(a, mx.array)])
    out = {}
    machine = fused.language()
    normal = tuning.TUNING[machine]
    for name, forced in (("one split", 1 << 20), ("splits", 0)):
        tuning.TUNING[machine] = replace(normal, single=forced)
        fused.forget()
        got = fused.attend(q, rows, T, fmt, D**-0.5, **arguments)
        mx.eval(got)
        want = on_cpu(reference.attend, q, rows, T, fmt, D**-0.5, **arguments)
        out[name] = worst(got, want)
    tuning.TUNING[machine] = normal
    fused.forget()
    return out


# ---- timings ----------------------------------------------------------------------------------
def seconds(chain, calls: int, windows: int = 7) -> float:
    """Median time of one call; ``chain()`` returns the last of ``calls`` dependent results."""
    until = time.perf_counter() + 0.3
    while time.perf_counter() < until:
        mx.eval(chain())
    taken = []
    for _ in range(windows):
        mx.synchronize()
        start = time.perf_counter()
        mx.eval(chain())
        mx.synchronize()
        taken.append((time.perf_counter() - start) / calls)
    return statistics.median(taken)


def copies(nbytes: int) -> int:
    """Buffers to cycle through: 512 MB at least, and never fewer than 2."""
    return max(2, min(64, -(-(512 << 20) // nbytes)))


def random_rows(fmt, B, Hkv, T, n) -> list[mx.array]:
    k = mx.random.normal((1, 1, 1024, fmt.layout.k_dim)).astype(mx.float16)
    row = fused.quantize_pack(k, k[..., : fmt.layout.v_dim], fmt)
    reps = -(-T // 1024)
    out = [
        mx.contiguous(mx.tile(row, (B, Hkv, reps, 1))[:, :, :T]) + mx.array(0, mx.uint32)
        for _ in range(n)
    ]
    mx.eval(out)
    return out


def time_copy() -> None:
    x = mx.random.normal((256 << 20,)).astype(mx.float32)  # 1 GiB
    mx.eval(x)

    def chain():
        y = x
        for _ in range(4):
            y = mx.abs(y)
        return y

    t = seconds(chain, 4)
    print(f"device copy: {2 * x.nbytes / t / 1e9:.0f} GB/s (read and written)")


def time_all(spec: str, D: int, Hq: int, Hkv: int, shapes) -> None:
    time_copy()
    fmt = make_format(Spec.parse(spec), D)
    print(f"{spec} D={D} heads {Hq}/{Hkv}, {fmt.layout.words * 4} bytes a row")
    print("  B   length |  attend ms   GB/s | SDPA fp16 ms   GB/s | speed-up | dequantize ms")
    for B, T in shapes:
        mine, theirs = time_attend(fmt, Hq, Hkv, B, T), time_sdpa(D, Hq, Hkv, B, T)
        packed, plain = B * Hkv * T * fmt.layout.words * 4, B * Hkv * T * D * 4
        whole = time_dequantize(fmt, Hkv, B, T)
        print(
            f"{B:3d} {T:8d} | {mine * 1e3:10.4f} {packed / mine / 1e9:6.0f} "
            f"| {theirs * 1e3:12.4f} {plain / theirs / 1e9:6.0f} | {theirs / mine:7.2f}x "
            f"| {whole * 1e3:10.4f}",
            flush=True,
        )
    for B, L in ((1, 1), (32, 1), (1, 4096)):
        print(f"quantize_pack B={B} L={L}: {time_pack(fmt, Hkv, B, L) * 1e6:.1f} us", flush=True)
    for L in (2, 4, 8):
        t = time_attend(fmt, Hq, Hkv, 1, 8192, L)
        s = time_sdpa(D, Hq, Hkv, 1, 8192, L)
        print(f"attend B=1 length 8192, {L} queries: {t * 1e6:.1f} us, SDPA {s * 1e6:.1f} us")


def time_attend(fmt, Hq, Hkv, B, T, L=1) -> float:
    n = copies(B * Hkv * T * fmt.layout.words * 4)
    buffers = random_rows(fmt, B, Hkv, T, n)
    q = mx.random.normal((B, Hq, L, fmt.layout.k_dim)).astype(mx.float16)
    calls = max(n, 16)

    def chain():
        x = q
        for i in range(calls):
            o = fused.attend(x, buffers[i % n], T, fmt, 0.1, "causal")
            x = o if o.shape == q.shape else mx.depends([q], [o])[0]
        return x

    return seconds(chain, calls)


def time_sdpa(D, Hq, Hkv, B, T, L=1) -> float:
    n = copies(B * Hkv * T * D * 4)
    k = [mx.random.normal((B, Hkv, T, D)).astype(mx.float16) for _ in range(n)]
    v = [mx.random.normal((B, Hkv, T, D)).astype(mx.float16) for _ in range(n)]
    q = mx.random.normal((B, Hq, L, D)).astype(mx.float16)
    mx.eval(k, v, q)
    calls = max(n, 16)
    mask = "causal" if L > 1 else None

    def chain():
        x = q
        for i in range(calls):
            x = mx.fast.scaled_dot_product_attention(x, k[i % n], v[i % n], scale=0.1, mask=mask)
        return x

    return seconds(chain, calls)


def time_dequantize(fmt, Hkv, B, T) -> float:
    rows = random_rows(fmt, B, Hkv, T, 2)

    def chain():
        k = None
        for i in range(4):
            x = rows[i % 2] if k is None else mx.depends([rows[i % 2]], [k])[0]
            k, _ = fused.dequantize(x, T, fmt, mx.float16)
        return k

    return seconds(chain, 4)


def time_pack(fmt, Hkv, B, L) -> float:
    k = mx.random.normal((B, L, Hkv, fmt.layout.k_dim)).astype(mx.float16).swapaxes(1, 2)
    v = mx.random.normal((B, L, Hkv, fmt.layout.v_dim)).astype(mx.float16).swapaxes(1, 2)
    mx.eval(k, v)

    def chain():
        rows = None
        for _ in range(32):
            x = k if rows is None else mx.depends([k], [rows])[0]
            rows = fused.quantize_pack(x, v, fmt)
        return rows

    return seconds(chain, 32)


def tune(spec: str, D: int, Hq: int, Hkv: int, B: int, T: int, machine: str) -> None:
    fmt = make_format(Spec.parse(spec), D)
    normal = tuning.TUNING[machine]
    results = []
    for keys, groups, total in itertools.product((16, 32), (2, 4, 8), (132, 264, 396, 528)):
        tuning.TUNING[machine] = replace(
            normal, keys=keys, simd_groups=groups, threadgroups=total, busy=1 << 30
        )
        fused.forget()
        if tuning.attend_shape(fmt.layout, tuning.TUNING[machine]) != (groups, keys):
            continue
        parts = fused.attend_parts(fmt, B, Hq, Hkv, 1, T)
        results.append((time_attend(fmt, Hq, Hkv, B, T), keys, groups, total, parts))
    tuning.TUNING[machine] = normal
    fused.forget()
    print(f"B={B} length {T}: ms, keys, SIMD groups, threadgroups, splits")
    for t, *sizes in sorted(results)[:12]:
        print(f"  {t * 1e3:.4f} {sizes}", flush=True)


if __name__ == "__main__":
    main()
