"""LLVM IR of a kernel, before any optimisation, with a check before every memory access.

At this point each load and store in the IR is one that the source asks for, with its address
space and its line, so nothing is checked twice, left out, or counted after the optimiser
merged it. Thread-private memory (address space 0) is left alone: clang's own bounds checks
for arrays cover it.
"""

import re

from .errors import KernelError

_DEBUG = re.compile(r", !dbg !(\d+)")
_LOAD = re.compile(
    r"^  %\S+ = load (?:volatile )?(?P<type>.+?), ptr addrspace\((?P<space>\d)\) "
    r"(?P<pointer>.+?), align (?P<align>\d+)"
)
_STORE = re.compile(
    r"^  store (?:volatile )?(?P<type><\d+ x \w+>|ptr(?: addrspace\(\d\))?|\w+) .+, "
    r"ptr addrspace\((?P<space>\d)\) (?P<pointer>getelementptr .+|[^ ,]+), align (?P<align>\d+)"
)
# A promise that an address is inside its object, which the checks are there to find out.
_INBOUNDS = re.compile(r"\bgetelementptr (?:inbounds |nuw |nusw )+")
_GLOBAL = re.compile(
    r"^(?P<name>@\S+) = (?P<linkage>.*?)addrspace\((?P<space>[23])\) (?:global|constant) "
    r"(?P<rest>.*)$"
)
_BFLOAT = re.compile(r"= (?:\w+ )*?(fadd|fsub|fmul|fdiv|frem|fneg|fcmp)\b.*\bbfloat\b")
_BFLOAT_CALL = re.compile(r"@llvm\.(?!is\.fpclass)\w+(?:\.\w+)*\.(?:v\d+)?bf16\b")
_FUNCTION = re.compile(r"^define .*?@(\"[^\"]+\"|[\w.$]+)\(")
_CALL = re.compile(r"\bcall .*?@(\"[^\"]+\"|[\w.$]+)\(")
# Not loads, stores and returns: some vectors travel through functions as a double.
_DOUBLE = re.compile(r"= (?:f|[su]itofp)(?:\w| \w+)* .*\bdouble\b")
_SIZES = {"half": 2, "bfloat": 2, "float": 4, "double": 8, "i1": 1}


def _size(type_: str) -> int:
    """Bytes of a first-class IR type."""
    vector = re.match(r"<(\d+) x (\w+)>", type_)
    if vector:
        return int(vector.group(1)) * _size(vector.group(2))
    if type_.startswith("ptr"):
        return 8
    return _SIZES.get(type_) or (int(type_[1:]) + 7) // 8


class _Lines:
    """Line and column of each debug location, in the kernel's own text."""

    def __init__(self, ir: str):
        self.nodes = dict(re.findall(r"^!(\d+) = (?:distinct )?(!?\w+\(.*\))$", ir, re.M))

    def _file(self, node: str) -> str:
        text = self.nodes.get(node, "")
        file = re.search(r"\bfile: !(\d+)", text)
        if file:
            name = re.search(r'filename: "([^"]*)"', self.nodes.get(file.group(1), ""))
            return name.group(1) if name else ""
        scope = re.search(r"\bscope: !(\d+)", text)
        return self._file(scope.group(1)) if scope else ""

    def at(self, instruction: str) -> tuple[int, int]:
        """(line, column), or (0, 0) for an instruction that is not the kernel's."""
        debug = _DEBUG.search(instruction)
        node = self.nodes.get(debug.group(1), "") if debug else ""
        place = re.search(r"line: (\d+)(?:, column: (\d+))?, scope: !(\d+)", node)
        if not place or not self._file(place.group(3)).endswith("kernel.metal"):
            return 0, 0
        return int(place.group(1)), int(place.group(2) or 0)


def _type_of(rest: str) -> str:
    """The IR type that ``rest`` starts with."""
    depth = 0
    for i, c in enumerate(rest):
        depth += (c in "[<{(") - (c in "]>})")
        if depth == 0 and c in " ,":
            return rest[:i]
    return rest


def _refuse(line: str, where: tuple[int, int], text: str) -> None:
    """Errors for what clang takes and Metal does not."""
    number = where[0]
    if not number:
        return
    if _BFLOAT.search(line) or _BFLOAT_CALL.search(line):
        detail = "bfloat is for storage only: convert to float, compute, convert back"
        raise KernelError("bfloat arithmetic", detail, number, text)
    if _DOUBLE.search(line):
        raise KernelError("double", "Metal has no double: write 0.5f, not 0.5", number, text)
    if "addrspacecast" in line:
        detail = "a pointer is cast from one address space to another"
        raise KernelError("address space", detail, number, text)
    if re.search(r"@llvm\.mem(?:cpy|move|set)\.\S*p[123]", line):
        detail = "a whole struct or array is copied: copy its members"
        raise KernelError("not supported", detail, number, text)
    if re.search(r"= bitcast <.*> .* to <", line):
        detail = "a cast reinterprets a vector: use float4(...) to convert, as_type for bits"
        raise KernelError("vector cast", detail, number, text)


def _spelled(name: str) -> str:
    """The source's name of a global: mangled names end in its length and the name itself."""
    name = re.sub(r"_\d+$", "", name.strip('@"'))
    for place in re.finditer(r"\d+(?=[A-Za-z_])", name):
        if int(place.group()) == len(name) - place.end():
            return name[place.end() :]
    return name


def _variable(match: re.Match) -> tuple[str, str]:
    """The global inside red zones, and its row in the table of variables."""
    name, space, rest = match["name"], match["space"], match["rest"]
    type_ = _type_of(rest)
    spelled = _spelled(name)
    bytes_ = f"ptrtoint (ptr getelementptr ({type_}, ptr null, i32 1) to i64)"
    row = (
        f"{{ ptr, i64, i64, ptr }} {{ ptr addrspacecast (ptr addrspace({space}) {name} to ptr), "
        f"i64 {bytes_}, i64 {space}, ptr @emu.name.{spelled} }}"
    )
    return spelled, row


def _convergent(ir: str) -> set[str]:
    """The functions that reach a SIMD-group function or a barrier."""
    callers: dict[str, set[str]] = {}
    current = ""
    for line in ir.split("\n"):
        function = _FUNCTION.match(line)
        if function:
            current = function.group(1)
        call = _CALL.search(line)
        if call:
            callers.setdefault(call.group(1), set()).add(current)
    found: set[str] = set()
    left = ["emu_simd", "emu_barrier"]
    while left:
        new = callers.get(left.pop(), set()) - found
        found |= new
        left += new
    return found


def instrument(ir: str, text: str) -> str:
    """Adds the checks.

    Args:
        ir (str): What clang emits for the kernel with its passes disabled.
        text (str): The generated source, for messages.

    Raises:
        KernelError: For bfloat arithmetic, double, and casts Metal does not have.
    """
    lines = _Lines(ir)
    convergent = _convergent(ir)
    out = []
    rows = []
    names = set()
    inside = False
    serial = 0
    for line in ir.split("\n"):
        if line.startswith("define "):
            inside = True
        elif line == "}":
            inside = False
        variable = None if inside else _GLOBAL.match(line)
        if variable:
            spelled, row = _variable(variable)
            names.add(spelled)
            rows.append(row)
            if variable["space"] == "3":
                type_ = _type_of(variable["rest"])
                zones = f"{{ {type_}, [256 x i8] }} zeroinitializer"
                comdat = ", comdat" if ", comdat" in line else ""
                line = (
                    f"{variable['name']} = {variable['linkage']}addrspace(3) global {zones}"
                    f"{comdat}, align 256"
                )
        elif inside and line.startswith("  "):
            line = _INBOUNDS.sub("getelementptr ", line)
            where = lines.at(line)
            _refuse(line, where, text)
            access = _LOAD.match(line) or _STORE.match(line)
            if access:
                serial += 1
                write = line.startswith("  store")
                size, align, space = _size(access["type"]), access["align"], access["space"]
                what = size | int(align) << 8 | write << 16 | int(space) << 20
                site = where[0] << 10 | min(where[1], 1023)
                debug = _DEBUG.search(line)
                suffix = debug.group() if debug else ""
                pointer = f"ptr addrspace({space}) {access['pointer']}"
                out.append(f"  %emu.{serial} = ptrtoint {pointer} to i64{suffix}")
                out.append(
                    f"  call void @emu_access(i64 %emu.{serial}, i32 {what}, i32 {site}){suffix}"
                )
            call = _CALL.search(line)
            if call and call.group(1) in convergent:
                # The way here, so that two calls of one helper are two places.
                serial += 1
                step = (where[0] << 10 | min(where[1], 1023)) + 1
                out.append(f"  %emu.{serial} = load i64, ptr @emu_path")
                out.append(f"  %emu.{serial}.by = mul i64 %emu.{serial}, 1000003")
                out.append(f"  %emu.{serial}.to = add i64 %emu.{serial}.by, {step}")
                out.append(f"  store i64 %emu.{serial}.to, ptr @emu_path")
                out.append(line)
                line = f"  store i64 %emu.{serial}, ptr @emu_path"
        out.append(line)
    for name in sorted(names):
        chars = f'c"{name}\\00"'
        out.append(f"@emu.name.{name} = private constant [{len(name) + 1} x i8] {chars}")
    row_type = "{ ptr, i64, i64, ptr }"
    table = f"[{', '.join(rows)}]" if rows else "zeroinitializer"
    out.append(f"@emu_variables = constant [{len(rows)} x {row_type}] {table}")
    out.append(f"@emu_variable_count = constant i32 {len(rows)}")
    out.append("@emu_path = external global i64")
    out.append("declare void @emu_access(i64, i32, i32) nounwind")
    return "\n".join(out) + "\n"


def name_traps(ir: str) -> str:
    """Optimised IR whose traps, from clang's ``local-bounds``, report their line instead."""
    lines = _Lines(ir)
    out = []
    trap = re.compile(r"call void @llvm\.ubsantrap\(i8 \w+\)")
    for line in ir.split("\n"):
        if trap.search(line):
            number, column = lines.at(line)
            line = trap.sub(f"call void @emu_private(i32 {number << 10 | column})", line)
        out.append(line)
    return "\n".join(out) + "\ndeclare void @emu_private(i32) nounwind noreturn\n"
