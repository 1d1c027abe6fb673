"""The rooms of the package: imports run downward only. docs/architecture.md draws them. Tests and
scripts do not import each other, and documents name files that exist."""

import ast
import re
import sys
from pathlib import Path

import pytest

import mlx_kvq

PACKAGE = Path(mlx_kvq.__file__).resolve().parent

# Room or module of the top level -> what it may import.
GROUND = {"arguments", "files", "host", "stock", "stock_names"}
BELOW: dict[str, set[str]] = {name: set() for name in [*GROUND, "format"]}
BELOW["files"] = {"arguments"}
BELOW["stock"] = {"host"}
BELOW["format"] = {"arguments", "files"}
BELOW["ops"] = {"format", "files", "arguments"}
BELOW["caches"] = {"ops", "calibration", "format", *GROUND}
BELOW["calibration"] = {"format", "host", "stock", "files", "arguments"}
BELOW["model"] = {"caches", "ops", "calibration", "format", *GROUND}
BELOW["measure"] = {"model", *BELOW["model"]}
BELOW["repositories"] = {"measure", *BELOW["measure"]}
BELOW["commands"] = {"repositories", *BELOW["repositories"]}
BELOW["cli"] = {"commands", "format", *GROUND}
BELOW["plugin"] = {"commands", *BELOW["commands"]}
BELOW["_startup"] = {"plugin"}
BELOW["__main__"] = {"cli"}
BELOW["__init__"] = {
    "_startup",
    *BELOW["commands"],
}  # for type checkers; names are loaded on first use
# Run while mlx_lm is half imported, or at every start of the interpreter: they import late.
LATE = {
    "_startup", "plugin", "plugin.loading", "plugin.option", "plugin.programs", "plugin.vlm"
}  # fmt: skip
OPTIONAL = {"huggingface_hub", "matplotlib", "mlx_lm", "transformers"}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def complaints(files: dict[str, str]) -> list[str]:
    """What is wrong with a package given as module name (``ops.check``) -> source."""
    packages = {name.removesuffix(".__init__") for name in files if name.endswith(".__init__")}
    modules = {name.removesuffix(".__init__") for name in files}
    found = []
    for name, source in files.items():
        tree = ast.parse(source)
        here = name.removesuffix(".__init__")
        if here.rpartition(".")[2] in sys.stdlib_module_names - {"__main__"}:
            found.append(f"{here} is named like a module of the standard library")
        if room_of(here) not in BELOW:
            found.append(f"{here} is in no room")
            continue
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        inside = {n for f in functions for n in ast.walk(f)}
        for node in ast.walk(tree):
            for target, what in imported(node, here, here in packages, modules):
                if target is None:  # not of this package
                    optional = what.partition(".")[0] in OPTIONAL
                    if node in inside and not optional and here not in LATE | {"__init__"}:
                        found.append(f"{here} imports {what} inside a function")
                    continue
                if room_of(target) == room_of(here):
                    continue
                if room_of(target) not in BELOW[room_of(here)]:
                    found.append(f"{here} imports {target}")
                if target.startswith(("ops.gpu", "ops.plain")):
                    found.append(f"{here} imports {target}")
                if what.startswith("_"):
                    found.append(f"{here} takes {target}.{what}")
            if node in inside and here not in LATE | {"__init__"}:
                for target, _ in imported(node, here, here in packages, modules):
                    if target is not None:
                        found.append(f"{here} imports {target} inside a function")
    return found


def imported(node: ast.AST, here: str, is_package: bool, modules: set[str]):
    """(module of the package, name) of an import; (None, module) of one from elsewhere."""
    if isinstance(node, ast.Import):
        for a in node.names:
            inner = a.name.startswith("mlx_kvq.")
            yield (a.name.removeprefix("mlx_kvq."), "") if inner else (None, a.name)
    if not isinstance(node, ast.ImportFrom):
        return
    base = node.module or ""
    if node.level:
        parts = here.split(".") if here != "__init__" else []
        up = len(parts) - node.level + (is_package and here != "__init__")
        base = ".".join([*parts[:up], *filter(None, [node.module])])
    elif base == "mlx_kvq" or base.startswith("mlx_kvq."):
        base = base.removeprefix("mlx_kvq").removeprefix(".")
    else:
        yield None, base
        return
    for a in node.names:
        module = f"{base}.{a.name}".removeprefix(".")
        if module in modules:
            yield module, ""
        elif base:
            yield base, a.name
        # else a name of the package itself, which imports nothing: __version__


def test_the_house():
    files = {
        ".".join(p.relative_to(PACKAGE).with_suffix("").parts): p.read_text(encoding="utf-8")
        for p in PACKAGE.rglob("*.py")
    }
    assert len(files) > 50
    assert complaints(files) == []


ROOT = Path(__file__).resolve().parent.parent
DOCUMENTED = ("docs", "kernels", "scripts", "tests", "mlx_kvq")
LINKED = re.compile(r"\]\((?!https?:|mailto:)([^)#]*)#?([^)]*)\)")
QUOTED = re.compile(rf"`((?:{'|'.join(DOCUMENTED)}|examples)/[a-z0-9_./]*[a-z0-9_/])`")


def outsiders(folder: str, forbidden: set[str]) -> list[str]:
    """Imports of ``forbidden`` modules by the files of a folder of the checkout."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            first = {name.partition(".")[0] for name in names}
            found += [f"{path.relative_to(ROOT)} imports {name}" for name in first & forbidden]
    return found


def test_tests_and_scripts_leave_each_other_alone():
    """What both need is in the package, or a program of the tests (python -m tests.support.…)."""
    scripts = {path.stem for path in (ROOT / "scripts").rglob("*.py")}
    assert len(scripts) > 10
    assert outsiders("tests", {"scripts", *scripts}) == []
    assert outsiders("scripts", {"tests"}) == []
    assert outsiders("mlx_kvq", {"tests", "scripts", *scripts}) == []
    assert outsiders("tests", {"tests"})  # it sees imports


def test_documents_name_what_is_there():
    """Relative links with their headings, and `folder/file` in code quotes, of every page."""
    pages = [*ROOT.glob("*.md"), *(p for d in DOCUMENTED for p in (ROOT / d).rglob("*.md"))]
    gone = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        named = [(ROOT / path, "") for path in QUOTED.findall(text)]
        named += [(page.parent / p if p else page, place) for p, place in LINKED.findall(text)]
        for path, place in named:
            if not path.exists() or (place and place not in places(path)):
                gone.append(f"{page.relative_to(ROOT)}: {path} {place}".rstrip())
    assert len(pages) > 10 and gone == []


def places(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_there_is_no_circle():
    graph: dict[str, set[str]] = {}
    paths = {
        ".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): p
        for p in PACKAGE.rglob("*.py")
    }
    for here, path in paths.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        typing = {
            n
            for i in ast.walk(tree)
            if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.unparse(i.test)
            for n in ast.walk(i)
        }
        graph[here] = {
            target
            for node in ast.walk(tree)
            if node not in typing
            for target, _ in imported(node, here, path.name == "__init__.py", set(paths))
            if target in paths and target != here
        }
    while leaves := [m for m, targets in graph.items() if not targets & graph.keys()]:
        for m in leaves:
            del graph[m]
    assert not graph


@pytest.mark.parametrize(
    "name, source",
    [
        ("ops.x", "from ..caches import single"),
        ("ops.x", "def f():\n    from ..caches.single import PackedKVCache"),
        ("caches.x", "from .. import model"),
        ("caches.x", "from mlx_kvq.model.plan import make_plan"),
        ("caches.x", "import mlx_kvq.model.plan"),
        ("caches.x", "from ..ops.gpu import attention"),
        ("caches.x", "from ..ops import plain"),
        ("caches.x", "from ..stock import _one"),
        ("caches.x", "def f():\n    from ..format.spec import Spec"),
        ("caches.x", "def f():\n    import numpy"),
        ("caches.inspect", ""),
        ("attic.x", ""),
    ],
)
def test_each_rule_is_kept(name, source):
    house = {
        "caches.single": "",
        "ops.__init__": "from . import plain",
        "ops.plain": "from ..format.spec import Spec",
        "ops.gpu.__init__": "",
        "ops.gpu.attention": "from ... import __version__",
        "model.__init__": "",
        "model.plan": "from ..caches import single",
        "format.spec": "def f():\n    from matplotlib import figure",
        "stock": "",
    }
    assert complaints(house) == []
    assert complaints({**house, name: source})
