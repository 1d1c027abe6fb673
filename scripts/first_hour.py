"""README.md followed on a machine with nothing installed, and every message of the first hour.

    python scripts/first_hour.py [--write docs/first-hour.md]

Clones the last commit into an empty folder, with an empty HOME, runs README.md's main command as it
is printed there, then what people type next, rightly and wrongly. Prints each command, what it
answered and how long it took. Needs a package index; the commands themselves run offline.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = "examples/models/tiny-qwen2-8bit"
GENERATE = f".venv/bin/mlx_lm.generate --model {MODEL} --prompt Hello --max-tokens 1"
STEPS = {
    "The same with fp16": [
        f".venv/bin/mlx_lm.generate --model {MODEL} --kv-cache fp16 \\\n"
        '  --prompt "The night was dark" --max-tokens 60'
    ],
    "Names of caches": [
        f"{GENERATE} --kv-cache {name}"
        for name in ("int4", "INT4-SRFT", "q4_0", "4", "kv4", "turboquant", "int3", "8bit", "int4:")
    ],
    "Options of caches": [
        f"{GENERATE} --kv-cache int4:grp=32",
        f"{GENERATE} --kv-cache int4:recent=many",
        f"{GENERATE} --kv-cache int4:group_size=48",
        f"{GENERATE} --kv-cache int4 --kv-bits 4",
    ],
    "Lengths": [
        f"{GENERATE} --kv-cache int4 --max-kv-size 1K",
        f"{GENERATE} --kv-cache int4 --max-kv-size 32k",
        f"{GENERATE} --kv-cache int4 --max-kv-size 32Q",
    ],
    "Help, a draft model, and silence": [
        ".venv/bin/mlx_lm.generate --help | grep -A 40 -e '--kv-cache SPEC  '",
        f"{GENERATE} --kv-cache int4 --draft-model {MODEL}",
        f"MLX_KVQ_QUIET=1 {GENERATE} --kv-cache int4",
    ],
    "Other commands": [
        f".venv/bin/mlx_kvq fit {MODEL} --memory 16GB",
        ".venv/bin/mlx_kvq cache",
        f".venv/bin/mlx_kvq evaluate --model {MODEL} --text README.md --plot quality.png",
        ".venv/bin/mlx_kvq cache --clear",
    ],
    "Without it": [
        ".venv/bin/python -m pip uninstall -q -y mlx-kvq",
        GENERATE,
        f"{GENERATE} --kv-cache int4",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="Markdown; default: stdout.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = Machine(Path(folder)).transcript()
    if args.write:
        args.write.write_text(text)
    else:
        sys.stdout.write(text)


class Machine:
    """An empty folder with a clone, and a home of its own.

    Args:
        folder (Path): An empty one.
    """

    def __init__(self, folder: Path):
        self.home, self.clone = folder / "home", folder / "mlx_kvq"
        self.home.mkdir()
        clone = ["git", "clone", "-q", "--depth", "1", ROOT.as_uri(), str(self.clone)]
        subprocess.run(clone, check=True)
        own = {"HOME": str(self.home), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
        keep = ("PATH", "LANG", "PIP_CERT", "SSL_CERT_FILE")
        # Errors only: pip's warnings name the package index of the machine.
        self.environment = {k: os.environ[k] for k in keep if k in os.environ} | own
        self.environment |= {"PIP_QUIET": "2", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def transcript(self) -> str:
        readme = (self.clone / "README.md").read_text()
        found = re.search(r"<!-- ci:main -->\n```sh\n(.*?)```", readme, re.DOTALL)
        if found is None:
            raise ValueError("README.md has no code block after <!-- ci:main -->")
        commands = re.findall(r"(?:.*\\\n)*.*\n", found[1])
        began = time.monotonic()
        parts = [self.shown(command.rstrip("\n")) for command in commands if command.strip()]
        whole = time.monotonic() - began  # the last command ends with the text
        parts = [self.heading(), "## The main command\n", *parts]
        parts.append(f"From nothing to the end of the text: {whole:.0f} s.\n")
        for title, steps in STEPS.items():
            parts += [f"## {title}\n", *map(self.shown, steps)]
        return "\n".join(parts)

    def heading(self) -> str:
        python = self.clone / ".venv" / "bin" / "python"
        code = "from importlib.metadata import version as v; print(v('mlx'), v('mlx-lm'))"
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
        mlx, mlx_lm = done.stdout.split()
        log = ["git", "-C", str(self.clone), "log", "-1", "--format=%h"]
        commit = subprocess.run(log, capture_output=True, text=True, check=True).stdout.strip()
        machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
        return (
            "# The first hour\n\n"
            "README.md followed in a fresh clone with an empty home folder, then what people type\n"
            "next. Made by `python scripts/first_hour.py --write docs/first-hour.md`; of mlx-lm's\n"
            "usage only the line of the error is shown. "
            f"{machine}, Python {platform.python_version()},\n"
            f"mlx {mlx}, mlx-lm {mlx_lm}, commit {commit}. Seconds are wall time.\n"
        )

    def shown(self, command: str) -> str:
        """A command, what it answered, and the time it took."""
        began = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command}"],
            cwd=self.clone,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        took = time.monotonic() - began
        said = done.stdout.decode(errors="replace")
        said = said.replace(str(self.home), "~").replace(str(self.clone), ".")
        # Of a progress bar the last state.
        lines = [line.rstrip().rpartition("\r")[2].rstrip() for line in said.split("\n")]
        while lines and not lines[-1]:
            lines.pop()
        errors = [i for i, line in enumerate(lines) if ": error: " in line]
        if errors and lines[0].startswith("usage:"):
            lines = lines[errors[0] :]
        status = f", exit status {done.returncode}" if done.returncode else ""
        block = "\n".join([f"$ {command}", *lines])
        return f"```\n{block}\n```\n\n{took:.1f} s{status}\n"


if __name__ == "__main__":
    main()
