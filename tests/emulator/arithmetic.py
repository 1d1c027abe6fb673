"""Counts a kernel's arithmetic: one counter per basic block of its optimised IR.

Optimised (without vectorising), because what the source spells and a compiler folds away,
index arithmetic above all, costs a GPU nothing either. Counts are per thread: an operation
that all 32 lanes of a SIMD group do counts 32 times. Address computations of loads and stores
(getelementptr) are left out, phis, branches and register moves too.
"""

import re

CLASSES = (
    *(f"{op}_{t}" for t in ("f32", "f16") for op in ("fma", "add", "mul", "div", "compare")),
    "sign",  # abs and negation: free modifiers on most GPUs
    "round",  # floor, ceil, rint, round, trunc
    "exp",
    "log",
    "sqrt",
    "transcendental",  # sin, cos, tanh, pow
    "add_int",
    "mul_int",
    "div_int",
    "compare_int",
    "shift",
    "bitwise",
    "int64",  # any of the six above on 64 bits
    "extend",  # between integer widths
    "convert",  # between float types, and between floats and integers
    "select",
)
_INDEX = {name: i for i, name in enumerate(CLASSES)}
_OPERATION = re.compile(r"^  (?:%\S+ = )?(?:tail |notail |musttail )?(\w+) (.*)$")
_INTRINSIC = re.compile(r"@llvm\.(\w+)(?:\.\w+)*\.(?:v\d+)?(f16|f32|i\d+)\b")
_FLAGS = re.compile(
    r"^(?:(?:nsw|nuw|exact|disjoint|nneg|samesign|fast|nnan|ninf|nsz|arcp|contract|afn|reassoc) )*"
)
_FLOAT = {"fadd": "add", "fsub": "add", "fmul": "mul", "fdiv": "div", "frem": "div"}
_INTEGER = {
    "add": "add_int",
    "sub": "add_int",
    "mul": "mul_int",
    "udiv": "div_int",
    "sdiv": "div_int",
    "urem": "div_int",
    "srem": "div_int",
    "icmp": "compare_int",
    "shl": "shift",
    "lshr": "shift",
    "ashr": "shift",
    "and": "bitwise",
    "or": "bitwise",
    "xor": "bitwise",
}
_CONVERT = ("fpext", "fptrunc", "fptosi", "fptoui", "sitofp", "uitofp")
_CALLS = {
    **dict.fromkeys(("fma", "fmuladd"), "fma"),
    **dict.fromkeys(("minnum", "maxnum", "minimumnum", "maximumnum"), "compare"),
    **dict.fromkeys(("floor", "ceil", "rint", "nearbyint", "round", "roundeven", "trunc"), "round"),
    **dict.fromkeys(("fabs", "copysign"), "sign"),
    **dict.fromkeys(("exp", "exp2", "exp10"), "exp"),
    **dict.fromkeys(("log", "log2", "log10"), "log"),
    **dict.fromkeys(("sin", "cos", "tanh", "pow"), "transcendental"),
    **dict.fromkeys(("smin", "smax", "umin", "umax", "abs"), "compare_int"),
    **dict.fromkeys(("fshl", "fshr"), "shift"),
    "sqrt": "sqrt",
    "bswap": "bitwise",
}


def _width(type_: str) -> tuple[int, str]:
    """(components, scalar type) of what follows an opcode."""
    vector = re.match(r"<(\d+) x (\w+)>", type_)
    return (int(vector.group(1)), vector.group(2)) if vector else (1, type_.split()[0])


def classify(line: str) -> tuple[str, int]:
    """(class, how many) of one instruction; ``("", 0)`` if it is no arithmetic."""
    match = _OPERATION.match(line)
    if match is None:
        return "", 0
    op, rest = match.group(1), _FLAGS.sub("", match.group(2))
    if op == "call":
        intrinsic = _INTRINSIC.search(rest)
        name = _CALLS.get(intrinsic.group(1), "") if intrinsic else ""
        if not name:
            return "", 0
        count, _ = _width(re.sub(r"^(?:\w+(?:\([^)]*\))? )*?(?=<|half|float|i\d+ )", "", rest))
        if name in ("fma", "compare"):
            name += "_" + intrinsic.group(2)
        return name, count
    if op in ("fcmp", "icmp"):
        rest = re.sub(r"^\w+ ", "", rest)
    if op == "select":
        return "select", _width(rest.split(", ", 1)[1])[0]
    if op in _FLOAT or op == "fcmp":
        count, type_ = _width(rest)
        return f"{_FLOAT.get(op, 'compare')}_{'f16' if type_ == 'half' else 'f32'}", count
    if op in _INTEGER:
        count, type_ = _width(rest)
        return ("int64" if type_ == "i64" else _INTEGER[op]), count
    if op in _CONVERT:
        return "convert", _width(rest)[0]
    if op in ("zext", "sext", "trunc"):
        return "extend", _width(rest)[0]
    return ("sign", _width(rest)[0]) if op == "fneg" else ("", 0)


def count_blocks(ir: str) -> str:
    """Optimised IR with a counter in every block, and the table of what each block does."""
    out: list[str] = []
    table: list[list[int]] = []
    inside = pending = False
    for line in ir.split("\n"):
        if line.startswith("define "):
            inside = pending = True
        elif line == "}":
            inside = False
        elif inside and re.match(r"^[\w.$-]+:", line):
            pending = True
        elif inside and line.startswith("  ") and line.strip():
            if pending and " = phi " not in line:
                pending = False
                n = len(table)
                place = f"getelementptr (i64, ptr @emu_block_counts, i64 {n})"
                out.append(f"  %emu.block.{n} = load i64, ptr {place}")
                out.append(f"  %emu.count.{n} = add i64 %emu.block.{n}, 1")
                out.append(f"  store i64 %emu.count.{n}, ptr {place}")
                table.append([0] * len(CLASSES))
            name, count = classify(line)
            if name in _INDEX:
                table[-1][_INDEX[name]] += count
        out.append(line)
    n, k = len(table), len(CLASSES)
    rows = ", ".join(f"[{k} x i32] [{', '.join(f'i32 {count}' for count in row)}]" for row in table)
    out.append(f"@emu_block_counts = global [{n} x i64] zeroinitializer")
    out.append(f"@emu_block_table = constant [{n} x [{k} x i32]] [{rows}]")
    out.append(f"@emu_block_number = constant i32 {n}")
    return "\n".join(out) + "\n"
