"""The start-up line and its import hook, each in an interpreter of its own."""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import mlx_kvq
from mlx_kvq import _startup

PACKAGE = Path(mlx_kvq.__file__).resolve().parent
LINE = PACKAGE.parent / "mlx_kvq.pth"  # beside the package in a checkout and in site-packages


def start(python, code, *options, **env):
    """Run ``code``; returns the finished process. Only ``env`` speaks to Python or to us."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MLX_KVQ"))}
    return subprocess.run(
        [python, *options, "-c", code], env=kept | env, capture_output=True, text=True
    )


def modules(python, **env):
    process = start(python, "import sys; print(*sys.modules)", **env)
    assert process.returncode == 0
    assert process.stderr == ""
    return set(process.stdout.split())


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Makes bare environments: no packages but those in the .pth files it is given."""

    def make(**pth_files):
        folder = tmp_path_factory.mktemp("bare")
        venv.create(folder, with_pip=False, symlinks=os.name != "nt")
        python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site_packages = Path(start(python, code).stdout.strip())
        for name, text in pth_files.items():
            (site_packages / f"{name}.pth").write_text(text)
        return python, site_packages

    return make


@pytest.fixture(scope="module")
def hooked(bare):
    """An environment with the start-up line and the package."""
    return bare(a_path=str(PACKAGE.parent), mlx_kvq=LINE.read_text())[0]


@pytest.fixture
def fake(tmp_path):
    """A stand-in for mlx-lm; as there, a function hides the module ``generate``."""
    package = tmp_path / "fake" / "mlx_lm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from .generate import generate, main\n")
    main = "def main():\n    print('stock')\n"
    script = main + "if __name__ == '__main__':\n    main()\n"
    (package / "generate.py").write_text(script + "def generate():\n    pass\n")
    (package / "server.py").write_text(script)
    (package / "evaluate.py").write_text(main)  # no script: python -m does nothing
    (package / "utils.py").write_text("")
    return str(package.parent)


def plugin(body):
    """Code that puts a stand-in for mlx_kvq.plugin in place."""
    return (
        "import sys, types\n"
        "plugin = types.ModuleType('mlx_kvq.plugin')\n"
        "sys.modules['mlx_kvq.plugin'] = plugin\n"
        f"def patch(module):\n    {body}\n"
        "plugin.patch = patch\n"
    )


PATCHED = plugin("module.main = lambda: print('patched', module.__name__)")


def test_the_interpreter_of_this_run_has_the_line():
    names = modules(sys.executable)
    assert "mlx_kvq._startup" in names, "install the project first: pip install -e '.[cpu,dev]'"
    assert not names & {"mlx", "mlx_lm", "numpy", "mlx_kvq.plugin", "mlx_kvq.ops"}


def test_a_start_imports_two_modules(bare, hooked):
    without, _ = bare(a_path=str(PACKAGE.parent))
    assert modules(hooked) - modules(without) == {"mlx_kvq", "mlx_kvq._startup"}


@pytest.mark.parametrize("value, hook", [("1", False), ("yes", False), ("0", True), ("", True)])
def test_disable(hooked, value, hook):
    code = "import sys; print('Finder' in [getattr(f, '__name__', '') for f in sys.meta_path])"
    assert start(hooked, code, MLX_KVQ_DISABLE=value).stdout.strip() == str(hook)


def test_disabled_leaves_the_modules_alone(hooked, fake):
    code = PATCHED + "import mlx_lm.server; mlx_lm.server.main()"
    assert start(hooked, code, PYTHONPATH=fake, MLX_KVQ_DISABLE="1").stdout == "stock\n"


def test_start_is_silent_without_the_package(bare):
    python, _ = bare(mlx_kvq=LINE.read_text())
    assert "mlx_kvq" not in modules(python)


@pytest.mark.parametrize("broken", ["raise RuntimeError", "def :", "import gone"])
def test_start_is_silent_with_a_broken_package(bare, broken):
    python, site_packages = bare(mlx_kvq=LINE.read_text())
    (site_packages / "mlx_kvq").mkdir()
    (site_packages / "mlx_kvq" / "__init__.py").write_text("")
    (site_packages / "mlx_kvq" / "_startup.py").write_text(broken)
    assert "mlx_kvq._startup" not in modules(python)


def test_the_plugin_is_imported_with_the_first_command(hooked, fake, tmp_path):
    (tmp_path / "shim" / "mlx_kvq").mkdir(parents=True)
    shim = tmp_path / "shim" / "mlx_kvq" / "plugin.py"
    shim.write_text("def patch(module):\n    print(module.__name__, hasattr(module, 'main'))\n")
    code = (
        f"import sys, mlx_kvq; mlx_kvq.__path__.insert(0, {str(shim.parent)!r})\n"
        "import json; print('mlx_kvq.plugin' in sys.modules)\n"
        "import mlx_lm, mlx_lm.utils, mlx_lm.server\n"
    )
    process = start(hooked, code, PYTHONPATH=fake)
    modules = ["mlx_lm.generate True", "mlx_lm.utils False", "mlx_lm.server True"]
    assert process.stdout.splitlines() == ["False", *modules]
    assert process.stderr == ""


def test_a_reload_is_patched_again(hooked, fake):
    code = PATCHED + (
        "import importlib, mlx_lm.server\nimportlib.reload(mlx_lm.server); mlx_lm.server.main()\n"
    )
    assert start(hooked, code, PYTHONPATH=fake).stdout == "patched mlx_lm.server\n"


def test_the_loader_keeps_its_features(hooked, fake):
    code = PATCHED + (
        "import importlib.util, inspect, pkgutil, linecache\n"
        "spec = importlib.util.find_spec('mlx_lm.server')\n"
        "assert 'mlx_lm.server' not in sys.modules\n"
        "loader = spec.loader\n"
        "assert loader.get_code('mlx_lm.server').co_filename == spec.origin\n"
        "assert 'stock' in loader.get_source('mlx_lm.server')\n"
        "assert not loader.is_package('mlx_lm.server')\n"
        "assert loader.path == loader.get_filename('mlx_lm.server') == spec.origin\n"
        "import mlx_lm.server\n"
        "linecache.clearcache()\n"
        "assert 'stock' in inspect.getsource(mlx_lm.server)\n"
        "assert b'stock' in pkgutil.get_data('mlx_lm.server', 'server.py')\n"
        "assert pkgutil.get_loader('mlx_lm.server') if sys.version_info < (3, 12) else True\n"
    )
    process = start(hooked, code, "-W", "ignore", PYTHONPATH=fake)
    assert process.stderr == ""


@pytest.mark.parametrize(
    "command, prints", [("generate", "patched"), ("server", "patched"), ("evaluate", "")]
)
def test_run_as_a_script(hooked, fake, tmp_path, command, prints):
    """``python -m``: runs the patched main where stock mlx-lm would run its own."""
    (tmp_path / "shim.py").write_text(PATCHED)
    code = f"import shim, runpy; runpy.run_module('mlx_lm.{command}', run_name='__main__')"
    process = start(hooked, code, "-W", "ignore", PYTHONPATH=os.pathsep.join([fake, str(tmp_path)]))
    assert process.stdout.split()[:1] == prints.split()
    assert process.stderr == ""


def test_run_under_another_name_gives_the_module(hooked, fake):
    code = PATCHED + (
        "import runpy\n"
        "names = runpy.run_module('mlx_lm.generate', run_name='other')\n"
        "assert names['__name__'] == 'other'\n"
        "names['main']()\n"
    )
    process = start(hooked, code, "-W", "ignore", PYTHONPATH=fake)
    assert (process.stdout, process.stderr) == ("patched mlx_lm.generate\n", "")


def test_other_hooks_may_search_again(hooked, fake):
    """Two hooks that both ask all finders must not send each other round in circles."""
    code = PATCHED + (
        "import importlib.util\n"
        "class Other:\n"
        "    busy = False\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        if cls.busy or not name.startswith('mlx_lm.'):\n"
        "            return None\n"
        "        cls.busy = True\n"
        "        try:\n"
        "            return importlib.util.find_spec(name)\n"
        "        finally:\n"
        "            cls.busy = False\n"
        "sys.meta_path.insert(POSITION, Other)\n"
        "import mlx_lm.server; mlx_lm.server.main()\n"
    )
    for position in "0", "1":
        process = start(hooked, code.replace("POSITION", position), PYTHONPATH=fake)
        assert (process.stdout, process.stderr) == ("patched mlx_lm.server\n", "")


def test_a_missing_command_is_an_import_error(hooked, fake):
    process = start(hooked, "import mlx_lm.chat", PYTHONPATH=fake)
    assert "ModuleNotFoundError: No module named 'mlx_lm.chat'" in process.stderr


def test_a_failing_plugin_warns_once_and_changes_nothing(hooked, fake):
    code = plugin("module.main = None; raise ValueError('no such\\n option')") + (
        "import mlx_lm.server; mlx_lm.main(); mlx_lm.server.main()\n"
    )
    process = start(hooked, code, PYTHONPATH=fake)
    assert process.stdout == "stock\nstock\n"
    (warning,) = process.stderr.splitlines()
    assert warning.startswith("[mlx_kvq] warning: ")
    assert "mlx_lm.generate" in warning
    assert "ValueError: no such option" in warning


@pytest.mark.parametrize("stop", ["SystemExit", "KeyboardInterrupt"])
def test_a_plugin_can_stop_the_program(hooked, fake, stop):
    code = plugin(f"raise {stop}(3)") + (
        f"try:\n    import mlx_lm\nexcept {stop}:\n    print('stopped')\n"
    )
    process = start(hooked, code, PYTHONPATH=fake)
    assert (process.stdout, process.stderr) == ("stopped\n", "")


def test_mlx_lm_works_with_a_failing_plugin():
    code = plugin("raise ValueError") + (
        "import mlx_lm.server\n"
        "print(sys.modules['mlx_lm.generate'].setup_arg_parser().parse_args([]).max_tokens)\n"
    )
    process = start(sys.executable, code)
    assert process.returncode == 0
    assert process.stdout.strip().isdigit()
    assert process.stderr.count("[mlx_kvq]") == 1


def test_commands_are_those_of_mlx_lm_with_a_cache():
    """A new or renamed command of mlx-lm would be left without the option in silence."""
    import mlx_lm

    found = set()
    for path in Path(mlx_lm.__file__).parent.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        uses = r"\b(make_prompt_cache|stream_generate|batch_generate|eval_ppl)\("
        if "def main(" in text and re.search(uses, text):
            found.add(f"mlx_lm.{path.stem}")
    assert found == _startup.COMMANDS


def test_public_names_load_on_first_use():
    code = (
        "import sys, mlx_kvq\n"
        "assert 'mlx' not in sys.modules\n"
        "assert set(mlx_kvq.__all__) <= set(dir(mlx_kvq))\n"
        "for name in mlx_kvq.__all__:\n"
        "    assert getattr(mlx_kvq, name) is getattr(mlx_kvq, name), name\n"
        "assert isinstance(mlx_kvq.ops, type(sys)), mlx_kvq.ops\n"
        "from mlx_kvq import *\n"
        "assert callable(enable) and callable(Spec.parse)\n"
    )
    assert start(sys.executable, code).stderr == ""


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'enabel'"):
        _ = mlx_kvq.enabel
