"""Operation by operation: attention of one token, storing tokens, taking them out again."""

import itertools
import sys
import time
from collections.abc import Callable, Iterator

import mlx.core as mx

from ..files import failure
from . import contenders
from .contenders import EVEN, Heads, LayerContender
from .timing import interleave, memory_limit, speedups, spread

HEADS = ["12,2,128", "4,1,256"]
BASES = ("fp16", EVEN, "bf16", "kv4")  # the others are compared with these
MOST_BUFFERS = 4096
Chain = Callable[[int], None]


def measure(args, copy: float) -> Iterator[list[dict]]:
    """The rows of one operation at one shape, after the other; ``args`` of ``mlx_kvq benchmark``,
    ``copy`` in bytes per second that a copy reads and writes."""
    for text in args.heads:
        heads = Heads.parse(text)
        compared = {}
        for name in args.kv_cache:
            try:
                compared[name] = contenders.contender(name, heads, getattr(mx, args.dtype))
            except ValueError as error:
                print(f"{name}, {heads}: left out: {error}", file=sys.stderr)
        sizes = list(itertools.product(args.batch_size, args.contexts))
        prompt = (1, max(1, args.vectors // 2 // heads.kv))
        stored = [*((B, 1) for B in args.batch_size), prompt]
        for op in OPS:
            for B, T in stored if op == "quantize" else sizes:
                if op in args.ops:
                    yield _compare(op, heads, B, T, compared, args, copy)


def _compare(op, heads, B: int, T: int, compared, args, copy: float) -> list[dict]:
    """Rows of all contenders; one that fails gets a row that says why."""
    if op != "attend":  # nothing to compute for plain arrays
        compared = {name: c for name, c in compared.items() if c.dequantize is not None}
    chains, sizes, notes = _chains(OPS[op], heads, B, T, compared, args.beyond << 20)
    clock = time.process_time if args.cpu_time else time.perf_counter
    times = interleave(chains, steps=args.tokens, rounds=args.rounds, clock=clock)
    del chains
    mx.clear_cache()
    rows = []
    for name, c in compared.items():
        row = {"op": op, "heads": str(heads), "cache": name, "batch": B, "tokens": T}
        row["class"] = type(c.batch(B)[0]).__name__
        if name in notes:
            rows.append({**row, "note": notes[name]})
            continue
        t = spread(times[name])
        row |= {
            "us": 1e6 * t.median, "us_low": 1e6 * t.low, "us_high": 1e6 * t.high,
            "bytes": sizes[name], "of_copy": sizes[name] / t.median / copy,
        }  # fmt: skip
        if op != "attend":
            row["ns_per_vector"] = 1e9 * t.median / (2 * B * heads.kv * T)
        rows.append(row | speedups("x", times, name, BASES))
    return rows


def _chains(make, heads: Heads, B: int, T: int, compared: dict[str, LayerContender], beyond: int):
    """By contender: the chain to time and the bytes of a call, or why there is none."""
    chains: dict[str, Chain] = {}
    sizes, notes = {}, {}
    total = 0
    for name, c in compared.items():
        try:
            size = B * T * contenders.token_bytes(c, heads)
            copies = max(1, min(MOST_BUFFERS, -(-beyond // size)))
            total += size * copies
            if total > memory_limit():
                notes[name] = f"left out: the buffers would take {total / 1e9:.1f} GB"
                continue
            chain, sizes[name] = make(c, heads, B, T, copies)
            chain(1)
            chains[name] = chain
        except Exception as error:  # this contender has no such operation here
            notes[name] = failure(error, 120)
    return chains, sizes, notes


def _attend(c: LayerContender, heads: Heads, B: int, T: int, copies: int) -> tuple[Chain, int]:
    """The output of a call is the query of the next. A call never finds its tokens in a cache of
    the processor, as between the layers of a model."""
    turn = itertools.cycle([contenders.fill(c, heads, B, T) for _ in range(copies)])
    q = contenders.random(heads.queries, B, 1, heads.dim, c.dtype)
    mx.eval(q)

    def chain(steps: int) -> None:
        x = q.reshape(q.shape)  # another array object: mlx-lm's quantized attention scales its own
        for _ in range(steps):
            x = c.attend(x, next(turn))
        mx.eval(x)

    return chain, B * T * contenders.token_bytes(c, heads) + 2 * q.nbytes


def _quantize(c: LayerContender, heads: Heads, B: int, L: int, copies: int) -> tuple[Chain, int]:
    """One token's keys and values were just computed, a prompt's come from memory."""
    few = 1 if L == 1 else copies
    new = [contenders.random_pair(heads, B, L, c.dtype) for _ in range(few)]
    mx.eval(new)
    turn = itertools.cycle(new)

    def store(after: list) -> list:
        k, v = next(turn)
        return contenders.leaves(c.store(mx.depends(k, after) if after else k, v))

    return _dependent(store), contenders.nbytes(new[0]) + B * L * contenders.token_bytes(c, heads)


def _dequantize(c: LayerContender, heads: Heads, B: int, T: int, copies: int) -> tuple[Chain, int]:
    assert c.dequantize is not None
    dequantize = c.dequantize
    turn = itertools.cycle([contenders.fill(c, heads, B, T) for _ in range(copies)])
    size = B * T * (contenders.token_bytes(c, heads) + 2 * heads.kv * heads.dim * c.dtype.size)
    return _dependent(lambda after: dequantize(next(turn), after)), size


def _dependent(call: Callable[[list], list]) -> Chain:
    """A chain of calls that each wait for the arrays of the one before."""

    def chain(steps: int) -> None:
        after: list = []
        for _ in range(steps):
            after = call(after)
        mx.eval(after)

    return chain


OPS = {"attend": _attend, "quantize": _quantize, "dequantize": _dequantize}
