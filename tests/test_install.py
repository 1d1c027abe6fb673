"""What is packed, and that a wheel and an editable install work away from the checkout.

Builds need the network once, for the build backend.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import mlx_kvq
from mlx_kvq.ops.gpu import sources

ROOT = Path(__file__).resolve().parent.parent
STRAYS = (
    ".env",
    ".venv/lib/module.py",
    "notes.txt",
    "examples/.DS_Store",
    "kernels/.DS_Store",
    "mlx_kvq/__pycache__/spec.cpython-311.pyc",
    "tests/.pytest_cache/README.md",
)


def run(*command, **kwargs):
    """Run a command; returns its output, or fails with all of it."""
    env = {
        k: v
        for k, v in os.environ.items()
        if k == "MLX_KVQ_CACHE" or not k.startswith(("PYTHON", "MLX_KVQ"))
    }
    process = subprocess.run(
        [str(part) for part in command],
        env=env | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project with files around that nobody should get."""
    folder = tmp_path_factory.mktemp("checkout") / "mlx_kvq"
    ignore = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "dist", "build")
    shutil.copytree(ROOT, folder, ignore=ignore)
    for name in STRAYS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("stray")
    return folder


@pytest.fixture(scope="module")
def archives(checkout, tmp_path_factory):
    """The sdist, and the wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, checkout)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


class Environment:
    """A fresh virtual environment, where mlx-lm and the rest come from the running one."""

    def __init__(self, folder, *target):
        venv.create(folder, with_pip=False, symlinks=os.name != "nt")
        scripts = folder / ("Scripts" if os.name == "nt" else "bin")
        self.folder, self.python, self.script = folder, scripts / "python", scripts / "mlx_kvq"
        self.pip("install", "--no-deps", *target)
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.site_packages = Path(run(self.python, "-c", code).strip())
        # Only now, or pip would find the running environment's mlx_kvq and leave it at that.
        # The name makes it the last .pth file, so that what was installed here comes first.
        borrowed = [path for path in sys.path if Path(path).name.endswith("-packages")]
        (self.site_packages / "zz_borrowed.pth").write_text("\n".join(borrowed))

    def pip(self, command, *args):
        return run(sys.executable, "-m", "pip", "--python", self.python, command, *args)

    def call(self, *args):
        return run(self.python, *args, cwd=self.folder)


@pytest.fixture(scope="module")
def wheel_environment(archives, tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("wheel"), archives[1])


@pytest.fixture(scope="module")
def editable_environment(checkout, tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("editable"), "-e", checkout)


@pytest.fixture(params=["wheel", "editable"])
def environment(request):
    return request.getfixturevalue(f"{request.param}_environment")


def files(*folders):
    """The project's files in some folders, as paths in the project."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    found = {path.relative_to(ROOT).as_posix() for path in paths if path.is_file()}
    return {name for name in found if "/." not in name and "__pycache__" not in name}


def test_the_wheel_holds_the_package_the_kernels_and_the_line(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        names = {n for n in wheel.namelist() if ".dist-info/" not in n}
        kernels = files("kernels")
        assert kernels
        assert names == {"mlx_kvq.pth", *files("mlx_kvq"), *(f"mlx_kvq/{n}" for n in kernels)}
        line = wheel.read("mlx_kvq.pth").decode()
    assert line.startswith("import ")
    assert line.count("\n") == 1


def test_the_sdist_holds_the_project(archives):
    with tarfile.open(archives[0]) as sdist:
        members = [member.name for member in sdist.getmembers() if member.isfile()]
    names = {name.partition("/")[2] for name in members}
    top = {
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "LICENSE",
        "pyproject.toml",
        "hatch_build.py",
        ".pre-commit-config.yaml",
    }
    folders = "mlx_kvq", "kernels", "tests", "examples", "scripts", "docs", ".ci", ".github"
    assert names - {"PKG-INFO", ".gitignore"} == top | {"mlx_kvq.pth"} | files(*folders)


def test_the_readme_on_pypi_has_no_relative_link(archives):
    """PyPI shows the description alone: each link of README.md leads to the repository there."""
    with zipfile.ZipFile(archives[1]) as wheel:
        (name,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
        text = wheel.read(name).decode()
    links = re.findall(r"\]\(([^)]*)\)", text)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    own = re.findall(r"(!?)\[[^]]*\]\(((?!https?://|#)[^)]*)\)", readme)
    assert own
    assert all(link.startswith(("https://", "#")) for link in links)
    for image, link in own:
        assert (ROOT / link.partition("#")[0]).exists(), link
        kind = "raw" if image else "blob"
        assert any(found.endswith(f"/mlx-kvq/{kind}/main/{link}") for found in links), link


def test_the_tests_of_the_sdist_are_complete(archives, tmp_path):
    """All are collected there, and those pass that read files beside the package."""
    with tarfile.open(archives[0]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    python = Environment(tmp_path / "venv", "-e", folder).python
    pytest_ = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    found = run(*pytest_, "--collect-only", cwd=folder)
    assert int(re.search(r"(\d+) tests collected", found)[1]) > 3000
    assert str(folder) in run(python, "-c", "import mlx_kvq; print(mlx_kvq.__file__)", cwd=tmp_path)
    own = (
        "tests/test_house.py",
        "tests/test_saved_by_earlier_versions.py",
        "scripts/test_benches.py",
    )
    assert "failed" not in run(*pytest_, *own, cwd=folder)


def test_imported_from_where_it_was_installed(wheel_environment, editable_environment, checkout):
    code = "import mlx_kvq; print(mlx_kvq.__file__)"
    assert wheel_environment.site_packages in Path(wheel_environment.call("-c", code)).parents
    assert checkout in Path(editable_environment.call("-c", code)).parents
    # A copy of the kernels in site-packages would hide later edits in the checkout.
    assert not (editable_environment.site_packages / "mlx_kvq").exists()


def test_version(environment):
    code = "from importlib.metadata import version; print(version('mlx-kvq'))"
    assert environment.call("-c", code).strip() == mlx_kvq.__version__


def test_kernels_are_found(environment):
    code = (
        "from mlx_kvq.ops.gpu.sources import kernels_path, kernel_source\n"
        "names = sorted(p.name for p in kernels_path().iterdir() if p.name[0] != '.')\n"
        "print(*names, all(map(kernel_source, names)))\n"
    )
    names = sorted(Path(name).name for name in files("kernels"))
    assert environment.call("-c", code).split() == [*names, "True"]


def test_mlx_lm_has_the_option(environment):
    """Needs mlx_kvq.plugin."""
    text = environment.call("-m", "mlx_lm", "generate", "--help")
    assert re.search(r"^ +--kv-cache\b", text, re.MULTILINE), text


def test_the_console_script_runs(environment):
    """Needs mlx_kvq.cli."""
    assert "usage: mlx_kvq" in run(environment.script, "--help", cwd=environment.folder)


def test_uninstall_leaves_stock_mlx_lm(archives, tmp_path):
    environment = Environment(tmp_path / "venv", archives[1])
    command = "-m", "mlx_lm", "generate", "--help"
    assert "--kv-cache" in environment.call(*command)
    environment.pip("uninstall", "-y", "mlx-kvq")
    assert not list(environment.site_packages.glob("*mlx_kvq*"))
    text = environment.call(*command)
    assert "--max-kv-size" in text and "--kv-cache" not in text


def test_missing_kernels_are_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "__file__", str(tmp_path / "mlx_kvq" / "sources.py"))
    with pytest.raises(FileNotFoundError, match="incomplete"):
        sources.kernels_path()


def test_an_unknown_kernel_is_a_clear_error():
    name = sorted(path.name for path in sources.kernels_path().iterdir())[0]
    with pytest.raises(FileNotFoundError, match=f"'no.metal'.*{name}"):
        sources.kernel_source("no.metal")
