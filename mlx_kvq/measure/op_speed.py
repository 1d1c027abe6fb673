"""Operation by operation: attention of one token, storing tokens, taking them out again."""

import itertools
import sys
import time
from collections.abc import Callable, Iterator

import mlx.core as mx

from .contenders import (
    EVEN,
    Contender,
    Heads,
    contender,
    fill,
    leaves,
    make_cache,
    nbytes,
    random,
    token_bytes,
)
from .timing import interleave, memory_limit, speedup, spread

HEADS = ["12,2,128", "4,1,256"]
OPS = ("attend", "quantize", "dequantize")
BASES = ("fp16", EVEN, "bf16", "kv4")  # what others are compared with
MOST_BUFFERS = 4096
Chain = Callable[[int], None]


def measure(args, copy: float) -> Iterator[list[dict]]:
    """The rows of one operation at one shape, after the other.

    Args:
        args: Of ``mlx_kvq benchmark``.
        copy (float): Bytes per second that a copy reads and writes.
    """
    dtype = getattr(mx, args.dtype)
    for text in args.heads:
        heads = Heads.parse(text)
        ways = {}
        for name in args.kv_cache:
            try:
                ways[name] = contender(name, heads, dtype)
            except ValueError as error:
                print(f"{name}, {heads}: left out: {error}", file=sys.stderr)
        if "attend" in args.ops:
            for B, T in itertools.product(args.batch_size, args.contexts):
                yield _compare("attend", heads, B, T, ways, _attend, args, copy)
        if "quantize" in args.ops:
            for B, L in [
                *((B, 1) for B in args.batch_size),
                (1, max(1, args.vectors // 2 // heads.kv)),
            ]:
                yield _compare("quantize", heads, B, L, ways, _quantize, args, copy)
        if "dequantize" in args.ops:
            for B, T in itertools.product(args.batch_size, args.contexts):
                yield _compare("dequantize", heads, B, T, ways, _dequantize, args, copy)


def _compare(op, heads, B: int, T: int, ways: dict[str, Contender], make, args, copy) -> list[dict]:
    """Rows of all contenders; one that fails gets a row that says why."""
    chains: dict[str, Chain] = {}
    sizes, notes = {}, {}
    held = 0
    for name, c in ways.items():
        if op != "attend" and c.dequantize is None:
            continue  # plain arrays: nothing to compute
        try:
            size = B * T * token_bytes(c, heads)
            copies = max(1, min(MOST_BUFFERS, -(-(args.beyond << 20) // size)))
            held += size * copies
            if held > memory_limit():
                notes[name] = f"left out: the buffers would take {held / 1e9:.1f} GB"
                continue
            chain, sizes[name] = make(c, heads, B, T, copies)
            chain(1)
        except Exception as error:  # this contender has no such operation here
            notes[name] = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            continue
        chains[name] = chain
    clock = time.process_time if args.cpu_time else time.perf_counter
    times = interleave(chains, steps=args.tokens, rounds=args.rounds, clock=clock)
    del chains
    mx.clear_cache()
    rows = []
    for name in ways:
        row = {"op": op, "heads": str(heads), "cache": name, "batch": B, "tokens": T}
        row["class"] = type(make_cache(ways[name], B)).__name__
        if name in notes:
            rows.append({**row, "note": notes[name]})
        if name not in times:
            continue
        t = spread(times[name])
        row |= {
            "us": 1e6 * t.median, "us_low": 1e6 * t.low, "us_high": 1e6 * t.high,
            "bytes": sizes[name], "of_copy": sizes[name] / t.median / copy,
        }  # fmt: skip
        if op != "attend":
            row["ns_per_vector"] = 1e9 * t.median / (2 * B * heads.kv * T)
        for base in BASES:
            if base in times:
                x = speedup(times[base], times[name])
                row[f"x_{base}"] = [x.median, x.low, x.high]
        rows.append(row)
    return rows


def _attend(c: Contender, heads: Heads, B: int, T: int, copies: int) -> tuple[Chain, int]:
    """The output of a call is the query of the next; a call never finds its tokens in a cache
    of the processor, as little as between the layers of a model."""
    turn = itertools.cycle([fill(c, heads, B, T) for _ in range(copies)])
    q = random(heads.queries, B, 1, heads.dim, c.dtype)
    mx.eval(q)

    def chain(steps: int) -> None:
        x = q.reshape(q.shape)  # another array object: mlx-lm's quantized attention scales its own
        for _ in range(steps):
            x = c.attend(x, next(turn))
        mx.eval(x)

    return chain, B * T * token_bytes(c, heads) + 2 * q.nbytes


def _quantize(c: Contender, heads: Heads, B: int, L: int, copies: int) -> tuple[Chain, int]:
    """One token's keys and values were just computed, a prompt's come from memory."""
    few = 1 if L == 1 else copies
    new = [[random(heads.kv, B, L, heads.dim, c.dtype) for _ in "kv"] for _ in range(few)]
    mx.eval(new)
    turn = itertools.cycle(new)
    size = nbytes(new[0]) + B * L * token_bytes(c, heads)

    def chain(steps: int) -> None:
        after: list = []
        for _ in range(steps):
            k, v = next(turn)
            after = leaves(c.store(mx.depends(k, after) if after else k, v))
        mx.eval(after)

    return chain, size


def _dequantize(c: Contender, heads: Heads, B: int, T: int, copies: int) -> tuple[Chain, int]:
    assert c.dequantize is not None
    dequantize = c.dequantize
    turn = itertools.cycle([fill(c, heads, B, T) for _ in range(copies)])
    size = B * T * (token_bytes(c, heads) + 2 * heads.kv * heads.dim * c.dtype.size)

    def chain(steps: int) -> None:
        after: list = []
        for _ in range(steps):
            after = dequantize(next(turn), after)
        mx.eval(after)

    return chain, size
