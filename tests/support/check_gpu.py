"""Check the fused kernels on this machine's GPU (Metal or CUDA), or search for launch sizes.

    python -m tests.support.check_gpu                  # the op matrix of tests/, against the oracle
    python -m tests.support.check_gpu --full           # each format, dtype, rule (thousands)
    python -m tests.support.check_gpu --launches 3     # every kernel once, for compute-sanitizer
    python -m tests.support.check_gpu --tune --batch 32 --length 32768

The matrix runs in several processes, because most of its time goes into compiling kernels: on CUDA
half a second for each that is not kept from before, or 3 to 5 s with MLX_KVQ_COMPILED=0. Cases come
in the order of the list, the most telling first; a line tells of every few. Where time is short, a
limit, or slices by the cases' names, which are their values in the order of
tests/support/op_cases.py (64x64-32-k8v4-srht-paper-fp16-...):

    python -m tests.support.check_gpu --limit 300         # seconds; says what is left then
    python -m tests.support.check_gpu --match '^(64|80|96|112)x'         # about half of the cases
    python -m tests.support.check_gpu --match '^(128|192|256)x'          # the other half
    python -m tests.support.check_gpu --match 'decode steps'             # prepared steps alone
    python -m tests.support.check_gpu --match feedback                   # keys rounded with it
    python -m tests.support.check_gpu --vector-rows 4     # attention by the kernel that Metal takes

The exit status is 1 if a case failed, 2 if none did and some are left. Under compute-sanitizer
(here format 3 of LAUNCHES, our kernels only):

    compute-sanitizer --tool racecheck --kernel-name kernel_substring=kvq \\
        python -m tests.support.check_gpu --launches 3
"""

import argparse
import itertools
import multiprocessing
import os
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.metadata import version

import mlx.core as mx
import numpy as np

from mlx_kvq import ops
from mlx_kvq.format.format import Format, make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.format.transform import Calibration
from mlx_kvq.measure.timing import interleave
from mlx_kvq.ops import cubins, plain
from mlx_kvq.ops import gpu as fused
from mlx_kvq.ops.gpu import attention, handover, nvrtc, tuning
from tests.support import calls, feedback, op_matrix

CHUNK = 4  # cases that a process takes at a time
STEPS = "decode steps"  # the name of check_steps among the cases
HANDED = "code that MLX is handed"  # of check_handed, CUDA only
FEEDBACK = "feedback"  # of check_feedback

# Specs, head sizes, calibrated or not: each way through each kernel at least once.
LAUNCHES = [
    ("int4-srft", 128, False),
    ("int4-srft:group_size=24", 96, True),
    ("int8-srft", 80, True),
    ("k8v4-srft:group_size=64", 256, True),
    ("int4-srht:scale=paper", 64, True),
    ("int4-none:group_size=56,scale=absmax", 112, False),
    ("int4-srft:group_size=8", 192, True),
    ("int3-srft", 128, True),
    ("k4v3-srft", 80, False),
    ("k5v4-srft", 128, True),
    ("int5-srft", 80, False),
    ("int4-srft:rounding=feedback", 128, True),
    ("k4v3-srft:group_size=48,rounding=feedback", 96, True),
    ("k5v4-srft:rounding=feedback", 64, True),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the product of formats and dtypes")
    parser.add_argument("--match", default="", metavar="REGEX", help="only cases with such names")
    parser.add_argument("--processes", type=int, default=min(15, os.cpu_count() or 1))
    parser.add_argument("--limit", type=float, default=3600, help="seconds for the op matrix")
    parser.add_argument("--vector-rows", type=int, metavar="N", help="of the launch sizes")
    parser.add_argument("--launches", type=int, metavar="N", help="kernels of LAUNCHES[N], once")
    parser.add_argument("--tune", action="store_true", help="search for launch sizes of attention")
    parser.add_argument("--spec", default="int4-srft")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--heads", default="12,2", help="query heads, KV heads")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=4096)
    args = parser.parse_args()
    machine = ops.language()
    if machine is None:
        raise SystemExit("The default device is neither a Metal nor a CUDA GPU.")
    print(f"{machine}: {mx.device_info()['device_name']}, mlx {version('mlx')}")
    rows = tuning.TUNING[machine].vector_rows if args.vector_rows is None else args.vector_rows
    with_vectors(machine, rows)
    if args.launches is not None:
        launch_all(*LAUNCHES[args.launches])
    elif args.tune:
        Hq, Hkv = (int(x) for x in args.heads.split(","))
        tune(args.spec, args.dim, Hq, Hkv, args.batch, args.length, machine)
    else:
        own = [HANDED] if machine == "cuda" and cubins.asked() else []
        own += [STEPS, *(f"{FEEDBACK} {spec} {D}" for spec, D in feedback.FORMATS)]
        cases = [*own, *(op_matrix.product() if args.full else op_matrix.CASES)]
        cases = [case for case in cases if re.search(args.match, str(case))]
        if not cases:
            parser.error(f"no case has a name that matches {args.match!r}")
        sys.exit(check_matrix(cases, args.processes, args.limit, machine, rows))


def with_vectors(machine: str, rows: int) -> None:
    """Choose which of the two kernels attend takes for one token, in this process."""
    tuning.TUNING[machine] = replace(tuning.TUNING[machine], vector_rows=rows)


# ---- the op matrix ----------------------------------------------------------------------------
def check_matrix(cases: list, processes: int, limit: float, machine: str, rows: int) -> int:
    """Every case on fresh random data, as far as ``limit`` seconds allow; prints what failed and
    the largest errors. 1 if a case failed, 2 if none did and some are left."""
    started, finished, failures = time.time(), 0, 0
    largest: dict[str, float] = {}
    some = [cases[i : i + CHUNK] for i in range(0, len(cases), CHUNK)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, with_vectors, (machine, rows)) as pool:
        jobs = [pool.submit(check_some, chunk, started + limit) for chunk in some]
        for job in as_completed(jobs):
            try:
                found = job.result()
            except BrokenProcessPool as error:
                print(f"FAIL a process died: {error}", flush=True)
                failures += 1
                break
            for case, errors, failure in found:
                finished += 1
                if failure:
                    failures += 1
                    print(f"FAIL {case}: {failure}", flush=True)
                for name, error in errors.items():
                    name = f"{name} {case.dtype}" if name == "attend" else name
                    largest[name] = max(largest.get(name, 0.0), error)
            seconds = time.time() - started
            print(f"{seconds:4.0f} s: {finished} of {len(cases)}, {failures} failed", flush=True)
    print("largest errors: " + ", ".join(f"{k} {v:.2g}" for k, v in sorted(largest.items())))
    left = len(cases) - finished
    seconds = time.time() - started
    print(f"{finished} of {len(cases)} done, {failures} failed, {left} left, {seconds:.0f} s")
    return 1 if failures else 2 if left else 0


def check_some(cases: list, end: float) -> list[tuple]:
    """Case, errors, failure of each; no case is begun after ``end``, in seconds since 1970."""
    found = []
    for case in cases:
        if time.time() > end:
            break
        errors, failure = {}, ""
        with open(os.devnull, "w") as quiet, redirect_stdout(quiet):  # a case prints its seed
            try:
                if case == STEPS:
                    check_steps()
                elif case == HANDED:
                    check_handed()
                elif str(case).startswith(FEEDBACK):
                    _, spec, D = case.split()
                    check_feedback(spec, int(D))
                else:
                    errors = op_matrix.check(fused, case, fused=True)
            except Exception as error:
                failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        found.append((case, errors, failure))
    return found


def check_steps() -> None:
    """Prepared decode steps give, bit for bit, what the plain launches give: over lengths that
    change the number of splits, growing buffers, batches with starts, a window, a tail."""
    specs = [
        "int4-srft:recent=0,first=0",
        "int4-srft:recent=0,seed=1",
        "int4-srft",
        "int4-srft:recent=5",
    ]
    formats = [make_format(Spec.parse(spec), 128) for spec in specs]
    for B, window in ((1, None), (3, None), (1, 400)):
        k = mx.random.normal((B, 2, 2048, 128)).astype(mx.float16)
        rows = calls.quantize_pack(fused, k, k, formats[0])
        starts = None if B == 1 else mx.array([0, 5, 300], mx.int32)
        for length in (*range(250, 2048, 97), 300, 2048):
            held = rows[:, :, : -(-length // 256) * 256]
            q = mx.random.normal((B, 12, 1, 128)).astype(mx.float16)
            for f in formats:
                tail = None
                if f.recent:
                    tail = mx.random.normal(
                        (B, 2, f.recent_at(length), 256)
                    )  # fp32 beside fp16 keys
                options = {"starts": starts, "window": window, "tail": tail}
                got = calls.attend(ops, q, held, length, f, 0.1, **options)
                want = calls.attend(fused, q, held, length, f, 0.1, **options)
                assert mx.array_equal(got, want), f"step of {length} tokens, {options}"
                one = k[:, :, length - 1 : length]
                if tail is None:
                    got, want = (calls.quantize_pack(m, one, one, f) for m in (ops, fused))
                    assert mx.array_equal(got, want), f"packing token {length}"
                    continue
                arguments = one, one, f, tail, tail.shape[2]
                (packed, got), want = ops.quantize_pack(*arguments), fused.keep_exact(*arguments)
                same = mx.array_equal(got, want)
                same &= mx.array_equal(ops.keep_exact(*arguments), want)
                same &= mx.array_equal(ops.pack_rotated(want[:, :, -1:], f), packed)
                assert same, f"token {length} with a tail"
    check_starts(formats[1:])


def check_starts(formats: list[Format]) -> None:
    """Replayed launches where sequences begin give what plain ones give, with the first tokens in
    the tail and without."""
    x = mx.random.normal((2, 2, 70, 128)).astype(mx.float16)
    for f, size in itertools.product(formats, (6, 90)):
        for _ in range(2):
            got = ops.pack_start(x, -x, f, size, 256)
        begin = x[:, :, : f.first]
        rows, tail = fused.quantize_pack(x, -x, f, None, size, 256)
        first = tail[:, :, 20 : 20 + f.first]
        if size < 70:
            first = fused.keep_exact(begin, -begin, f, tail, f.first)
        pairs = zip(got, (rows, tail, first), strict=True)
        assert all(mx.array_equal(a, b) for a, b in pairs), f"a start, {size} tokens kept"


def check_feedback(spec: str, D: int) -> None:
    """Rows of keys rounded with feedback, of a prompt and of one token, against plain operations
    on the CPU: MLX on CUDA multiplies fp32 in TF32. Each with hundreds of groups: of a few, one
    that falls on the other side is a large part."""
    fmt = feedback.weighted(spec, D)
    for dtype, B, L in ((mx.float16, 2, 77), (mx.bfloat16, 128, 1), (mx.float32, 2, 300)):
        k, v = (mx.random.normal((B, L, 2, D)).astype(dtype).swapaxes(1, 2) for _ in "kv")
        tail = mx.random.normal((B, 2, 40, 2 * D)).astype(ops.tail_dtype(dtype))
        got, kept = fused.quantize_pack(k, v, fmt, tail, 30)
        made_of = fused.quantize_pack(k, v, fmt, None, L)[1]  # in bf16, what falls on either side
        with mx.stream(mx.cpu):
            _, expected = plain.quantize_pack(k, v, fmt, tail, 30)
            want = plain.pack_rotated(made_of, fmt)
            # Two launches' y may differ in the last bit, which bf16 makes a 256th of a channel.
            in_bf16 = kept.dtype == mx.bfloat16
            feedback.assert_alike(got, want, k, fmt, differ=0.06 if in_bf16 else 0.02)
            apart = mx.abs(kept.astype(mx.float32) - expected.astype(mx.float32)).max()
            largest = mx.abs(expected.astype(mx.float32)).max()
            assert (apart <= 1e-2 * largest).item(), f"a tail of {kept.dtype}"


def check_handed() -> None:
    """MLX runs the code that it is handed, with shapes and strides: here code that gives another
    number than the text of the kernel."""
    right = nvrtc.compiled, cubins.keep
    nvrtc.compiled = lambda source, *more: right[0](source.replace("1000", "2000"), *more)
    cubins.keep = lambda *_: None
    text = f"// {time.time_ns()}\no[0] = 1000 + 10 * x_shape[1] + x_strides[0];"  # a new kernel

    def make(name: str):
        return mx.fast.cuda_kernel(
            name=name, input_names=["x"], output_names=["o"], source=text,
            ensure_row_contiguous=False,
        )  # fmt: skip

    try:
        kernel = handover.Kernel(make, "kvq_check")
        sizes = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1), "output_shapes": [(1,)]}
        x = mx.zeros((4, 7))[:, :3]
        (o,) = kernel(inputs=[x], output_dtypes=[mx.int32], **sizes)
        assert o.item() == 2037, f"gave {o.item()} instead of 2037; {cubins.record}"
    finally:
        nvrtc.compiled, cubins.keep = right


# ---- launches for compute-sanitizer -----------------------------------------------------------
def launch_all(spec: str, D: int, calibrate: bool) -> None:
    """Every kernel of one format: few and many tokens and splits, masks, sinks, starts, window."""
    rng = np.random.default_rng(0)

    def array(*shape, dtype=np.float16):
        return mx.array(rng.standard_normal(shape).astype(dtype))

    def calibration():
        mu, sigma, lam = (rng.standard_normal((2, D)).astype(np.float32) for _ in range(3))
        metric = mx.array(np.stack([x.T @ x for x in rng.standard_normal((2, D, D))]) / D)
        return Calibration(
            mx.array(mu), mx.array(np.exp(sigma / 2)), mx.array(np.exp(lam / 4)), metric
        )

    both = {"keys": calibration(), "values": calibration()} if calibrate else {}
    fmt = make_format(Spec.parse(spec), D, **both)
    k, v = (array(2, 77, 2, D).swapaxes(1, 2) for _ in "kv")  # as models hand them over
    rows = calls.quantize_pack(fused, k, v, fmt)
    T = 300  # that are attended over, by up to 5 queries
    _, tail = fused.quantize_pack(k, v, fmt, None, fmt.recent_at(T) + 4)
    one = k[:, :, :1], v[:, :, :1], fmt
    mx.eval(calls.quantize_pack(fused, *one), fused.quantize_pack(*one, tail, 16))
    kept = fused.keep_exact(*one, tail[:, :, 1:], 16)
    mx.eval(fused.pack_rotated(kept, fmt), fused.keep_exact(k, v, fmt, tail, 90))
    mx.eval(fused.quantize_pack(k, v, fmt, tail, 30), fused.quantize_pack(k, v, fmt, tail, 16, 256))
    rows = mx.array(np.concatenate([np.array(rows)] * 4, axis=2))
    old = tail.astype(mx.float16)  # as in files of version 0.1.0
    mx.eval(fused.quantize_pack(*one, old, 16))
    for dtype, end in itertools.product((mx.float16, mx.bfloat16, mx.float32), (None, tail, old)):
        mx.eval(calls.dequantize(fused, rows, 75, fmt, dtype, end))
        for chunk in (None, (k, v)):
            mx.eval(calls.restore(fused, rows, 75, fmt, dtype, end, chunk))
    q = array(2, 5, 12, D).swapaxes(1, 2)
    starts, sinks = mx.array([3, 40], mx.int32), array(12, dtype=np.float32)
    for L, parts, arrivals in itertools.product((1, 5), (1, 3), (attention.ARRIVALS, 0)):
        attention.ARRIVALS = arrivals  # 0: the second launch that Metal takes
        x = q[:, :, :L]
        for options in (
            {"mask": "causal", "starts": starts, "window": 90},
            {"mask": mx.array(rng.random((L, T)) < 0.7)},
            {"mask": array(12, 1, T), "sinks": sinks},
            {"mask": "causal", "tail": tail, "ring": (3, T if L > 1 else 7)},
            {"mask": "causal", "tail": old},
        ):
            mx.eval(calls.attend(fused, x, rows, T, fmt, 0.1, parts=parts, **options))
        for heads, end in itertools.product((2, 4, 6, 8) if L == 1 else (), (None, tail)):
            mask = mx.array(rng.random((heads, 1, T)) < 0.7)
            given = {"mask": mask, "tail": end, "parts": parts}
            mx.eval(calls.attend(fused, x[:, :heads], rows, T, fmt, 0.1, **given))
    print(f"launched every kernel of {spec}, D = {D}")


# ---- launch sizes -----------------------------------------------------------------------------
def tune(spec: str, D: int, Hq: int, Hkv: int, B: int, T: int, machine: str) -> None:
    """Times of attention under many launch sizes, side by side, best first."""
    fmt = make_format(Spec.parse(spec), D)
    # As a cache lays them out: room to a multiple of 256, and the exact tail.
    k = mx.random.normal((B, Hkv, -(-T // 256) * 256, D)).astype(mx.float16)
    first = calls.quantize_pack(fused, k, k, fmt)
    tail = None
    if fmt.recent:
        tail = mx.random.normal((B, Hkv, fmt.recent_at(T), 2 * D)).astype(mx.float16)
        mx.eval(tail)
    buffers = [first + mx.array(0, mx.uint32) for _ in range(max(2, (256 << 20) // first.nbytes))]
    q = mx.random.normal((B, Hq, 1, D)).astype(mx.float16)
    mx.eval(buffers, q)
    normal, chains = tuning.TUNING[machine], {}

    def chain(sizes: tuning.Tuning):
        def run(steps: int) -> None:
            tuning.TUNING[machine] = sizes
            ops.forget()
            x = q
            for i in range(steps):
                x = calls.attend(fused, x, buffers[i % len(buffers)], T, fmt, 0.1, tail=tail)
            mx.eval(x)

        return run

    totals = (132, 264, 396, 528, 1056)
    for keys, groups, total in itertools.product((16, 32, 64), (2, 4, 8), totals):
        sizes = replace(
            normal, keys=keys, short_keys=keys, simd_groups=groups, threadgroups=total, alone=0,
            busy=1 << 30,
        )  # fmt: skip
        if tuning.attend_shape(fmt.layout, sizes)[:2] == (groups, keys):
            chains[f"keys={keys} simd_groups={groups} threadgroups={total}"] = chain(sizes)
    times = {name: statistics.median(t) for name, t in interleave(chains).items()}
    tuning.TUNING[machine] = normal
    ops.forget()
    print(f"{spec}, {Hq} q / {Hkv} kv, D = {D}, batch {B}, {T} tokens: microseconds")
    for name, t in sorted(times.items(), key=lambda item: item[1])[:12]:
        print(f"{1e6 * t:8.1f}  {name}")


if __name__ == "__main__":
    main()
