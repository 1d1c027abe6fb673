"""What the start-up line of mlx_kvq.pth costs every start of the interpreter.

    python scripts/time_startup.py

Bare virtual environments of the running Python, which differ in that line only, start in turn,
so that a drifting clock or cache hits all alike. The control is a second environment without
the line: its distance from the first is the resolution of the measurement.
"""

import argparse
import os
import platform
import random
import re
import statistics
import subprocess
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ("__init__.py", "_startup.py")  # all that a start reads


def make_environment(folder: Path, with_line: bool) -> Path:
    """A virtual environment with the two modules a start reads; returns its interpreter."""
    venv.create(folder, symlinks=os.name != "nt", with_pip=False)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site_packages = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    (site_packages / "mlx_kvq").mkdir()
    for name in PACKAGE:
        (site_packages / "mlx_kvq" / name).write_bytes((ROOT / "mlx_kvq" / name).read_bytes())
    if with_line:
        (site_packages / "mlx_kvq.pth").write_bytes((ROOT / "mlx_kvq.pth").read_bytes())
    return python


def start_ms(python: Path, env: dict[str, str]) -> float:
    start = time.perf_counter()
    subprocess.run([python, "-c", "pass"], check=True, env=env)
    return 1e3 * (time.perf_counter() - start)


def import_us(python: Path, env: dict[str, str]) -> dict[str, int]:
    """Own time of each of our modules in one start, from -X importtime."""
    stderr = subprocess.run(
        [python, "-X", "importtime", "-c", "pass"],
        check=True,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    ).stderr
    rows = re.findall(r"import time:\s*(\d+) \|\s*\d+ \|\s*(mlx_kvq\S*)", stderr)
    return {name: int(own) for own, name in rows}


def interval(differences: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    draw = random.Random(0).choices
    medians = sorted(statistics.median(draw(differences, k=len(differences))) for _ in range(2000))
    return medians[50], medians[1949]


def processor() -> str:
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = re.findall(r"model name\s*: (.*)", cpuinfo)
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=500, help="starts per environment")
    args = parser.parse_args()

    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env.pop("MLX_KVQ_DISABLE", None)
    off = {**env, "MLX_KVQ_DISABLE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        without = make_environment(Path(folder, "without"), with_line=False)
        control = make_environment(Path(folder, "control"), with_line=False)
        line = make_environment(Path(folder, "with"), with_line=True)
        arms = {
            "without the line": (without, env),
            "without, control": (control, env),
            "with the line": (line, env),
            "with, disabled": (line, off),
        }
        for _ in range(10):  # writes the bytecode files, warms the disk cache
            for arm in arms.values():
                start_ms(*arm)
        times: dict[str, list[float]] = {name: [] for name in arms}
        order, shuffle = list(arms), random.Random(0).shuffle
        for _ in range(args.repetitions):
            shuffle(order)
            for name in order:
                times[name].append(start_ms(*arms[name]))
        imports = [import_us(line, env) for _ in range(50)]

    print(f"{processor()}, {os.cpu_count()} cores, {platform.platform(aliased=True)}")
    print(f"Python {platform.python_version()}, {args.repetitions} starts each, medians\n")
    base = times["without the line"]
    for name, values in times.items():
        text = f"{name:18} {statistics.median(values):8.3f} ms"
        if values is not base:
            differences = [a - b for a, b in zip(values, base, strict=True)]
            low, high = interval(differences)
            text += (
                f"   {statistics.median(differences):+.3f} ms  (95 %: {low:+.3f} to {high:+.3f})"
            )
        print(text)
    print("\n-X importtime, own time")
    for name in sorted(imports[0]):
        print(f"{name:18} {statistics.median(i[name] for i in imports) / 1e3:8.3f} ms")


if __name__ == "__main__":
    main()
