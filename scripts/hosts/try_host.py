"""Tries a program that runs models through mlx-lm or mlx-vlm, with packed caches.

    python scripts/hosts/try_host.py HOST [--wheel FILE] [--environment FOLDER] [--spec int4]

Makes a virtual environment (or takes the one given), installs the wheel and the host into it,
starts the host's server on a free port, runs ``client.py`` against it, and says for each check
``pass`` or what is missing, how many layers were packed, how often they were attended to and how
long the longest was. Not part of CI: a host brings up to some GB of packages along.

``--options`` gives the host more words, ``--bounded N`` asks it for caches of at most N tokens and
checks that they are: ``try_host.py "vllm-mlx, batching" --bounded 32``.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "models" / "tiny-qwen2-8bit"
# Counts attention over packed rows in the host's process, and the rows that decoding reads: a line
# of success proves nothing.
PROBE = """\
import os, sys, threading, time
def _count():
    calls = longest = 0
    while "mlx_kvq.caches.attention" not in sys.modules:
        time.sleep(0.05)
    time.sleep(0.2)
    from mlx_kvq.caches import attention
    ops = attention.ops
    for name in ("attend", "restore"):
        def counted(*args, _f=getattr(ops, name), **kwargs):
            nonlocal calls, longest
            calls += 1
            if hasattr(args[0], "shape") and args[0].shape[2] == 1:
                longest = max(longest, args[1].length)
            return _f(*args, **kwargs)
        setattr(ops, name, counted)
    while True:
        time.sleep(0.2)
        if calls:
            path = os.environ["KVQ_PROBE"] + f".{os.getpid()}"
            with open(path.replace("attended", "part"), "w") as file:
                file.write(f'{calls} {longest}')
            os.replace(path.replace("attended", "part"), path)  # it may be ended at any time
if "KVQ_PROBE" in os.environ:
    threading.Thread(target=_count, daemon=True).start()
"""


@dataclass(frozen=True)
class Host:
    """How to install and start a host.

    Args:
        packages (tuple): For pip.
        command (str): Of its environment's ``bin``, with {model} and {port}.
        option (bool): Whether it takes ``--kv-cache``; else ``MLX_KVQ_SPEC`` is set.
        bound (str): Its option for the most tokens of a cache, if it has one.
        asks (str): Model that requests name. Default: the first one that the server lists.
        versions (tuple): Packages whose versions are worth noting.
    """

    packages: tuple[str, ...]
    command: str
    option: bool = False
    bound: str = ""
    asks: str = ""
    versions: tuple[str, ...] = ("mlx", "mlx-lm", "mlx-vlm")
    environment: dict[str, str] = field(default_factory=dict)


HOSTS = {
    "mlx_lm.server": Host(
        (),
        "mlx_lm.server --model {model} --port {port}",
        option=True,
        asks="default_model",
        versions=("mlx", "mlx-lm"),
    ),
    "mlx_vlm.server": Host(
        ("mlx-vlm",),
        "mlx_vlm.server --model {model} --host 127.0.0.1 --port {port}",
        option=True,
    ),
    "mlx-openai-server": Host(
        ("mlx-openai-server",),
        "mlx-openai-server launch --model-path {model} --model-type lm --host 127.0.0.1 "
        "--port {port}",
        bound="--context-length",
    ),
    "vllm-mlx": Host(
        ("vllm-mlx",),
        "vllm-mlx serve {model} --host 127.0.0.1 --port {port}",
        bound="--max-kv-size",
    ),
    "vllm-mlx, batching": Host(
        ("vllm-mlx",),
        "vllm-mlx serve {model} --host 127.0.0.1 --port {port} --continuous-batching",
        bound="--max-kv-size",
    ),
    "rapid-mlx": Host(("rapid-mlx",), "rapid-mlx serve {model} --host 127.0.0.1 --port {port}"),
    "mlx-omni-server": Host(
        ("mlx-omni-server",), "mlx-omni-server --host 127.0.0.1 --port {port}", asks="{model}"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("host", choices=HOSTS)
    parser.add_argument("--wheel", type=Path, help="Default: built from this checkout.")
    parser.add_argument("--environment", type=Path, help="Default: a new one, deleted afterwards.")
    parser.add_argument(
        "--as-it-is", action="store_true", help="Install nothing into the environment."
    )
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--spec", default="int4")
    parser.add_argument("--options", default="", metavar="WORDS", help="More for the host.")
    parser.add_argument("--bounded", type=int, metavar="N", help="Tokens of a cache at most.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write what was found there.")
    parser.add_argument("--log", type=Path, metavar="FILE", help="Keep what the host printed.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        home = args.environment or work / "environment"
        host = HOSTS[args.host]
        if args.bounded and not host.bound:
            parser.error(f"{args.host} has no option for --bounded")
        more = [*args.options.split(), *([host.bound, str(args.bounded)] if args.bounded else [])]
        trial = Trial(host, home, args.model.resolve(), args.spec, work, more, args.bounded)
        found = trial.run(args.wheel, args.as_it_is)
        if args.log:
            args.log.write_bytes((work / "host.log").read_bytes())
    for name, text in found.items():
        print(f"{name:16} {text}")
    if args.json:
        args.json.write_text(json.dumps({args.host: found}, indent=1) + "\n")
    sys.exit(any(str(text).startswith("missing") for text in found.values()))


class Trial:
    """One host in one environment."""

    def __init__(
        self,
        host: Host,
        home: Path,
        model: Path,
        spec: str,
        work: Path,
        more: list[str],
        bounded: int | None,
    ):
        self.host, self.home, self.model, self.spec, self.work = host, home, model, spec, work
        self.bin, self.more, self.bounded = home / "bin", more, bounded

    def run(self, wheel: Path | None, as_it_is: bool) -> dict[str, str]:
        try:
            if not as_it_is:
                self.install(wheel)
        except subprocess.CalledProcessError as error:
            said = [line for line in error.stderr.splitlines() if "WARNING" not in line]
            return {"install": "missing: " + " ".join(said)[-400:]}
        found = {"versions": self.versions()}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = self.work / "host.log"
        with open(log, "wb") as file:
            process = subprocess.Popen(
                self.command(port), env=self.environment(), stdout=file, stderr=file, cwd=self.work
            )
        try:
            if not self.is_up(process, port):
                return found | {"start": "missing: " + log.read_text(errors="replace")[-600:]}
            client = [self.bin / "python", Path(__file__).with_name("client.py")]
            address = f"http://127.0.0.1:{port}/v1"
            asks = self.host.asks.format(model=self.model)
            command = [str(c) for c in (*client, address, *([asks] if asks else []))]
            answer = subprocess.run(command, capture_output=True, text=True)
            if answer.returncode:
                return found | {"client": "missing: " + answer.stderr[-600:]}
            found |= json.loads(answer.stdout.splitlines()[-1])
            time.sleep(0.5)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
        return found | self.packed(log.read_text(errors="replace"))

    def install(self, wheel: Path | None) -> None:
        if not self.bin.exists():
            venv.create(self.home, with_pip=True)
        if wheel is None:
            self.call(sys.executable, "-m", "build", "--wheel", "--outdir", self.work, ROOT)
            wheel = next(self.work.glob("*.whl"))
        ours = f"{wheel}[cpu]" if sys.platform == "linux" else str(wheel)
        pip = self.bin / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"
        self.call(*pip, ours, *self.host.packages, "openai")
        # An environment may hold another build of the same version.
        self.call(*pip, "--force-reinstall", "--no-deps", wheel)
        folder = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = Path(self.call(self.bin / "python", "-c", folder).strip())
        (site / "kvq_probe.py").write_text(PROBE)
        (site / "kvq_probe.pth").write_text("import kvq_probe\n")

    def call(self, *command: str | Path) -> str:
        done = subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True)
        return done.stdout

    def versions(self) -> str:
        names = dict.fromkeys([*self.host.packages, *self.host.versions])
        code = f"from importlib.metadata import version; print(*map(version, {list(names)}))"
        try:
            found = self.call(self.bin / "python", "-c", code).split()
        except subprocess.CalledProcessError as error:
            return "missing: " + error.stderr.splitlines()[-1]
        return ", ".join(f"{n} {v}" for n, v in zip(names, found, strict=True))

    def command(self, port: int) -> list[str]:
        words = self.host.command.format(model=self.model, port=port).split()
        option = ["--kv-cache", self.spec] if self.host.option else []
        return [str(self.bin / words[0]), *words[1:], *option, *self.more]

    def environment(self) -> dict[str, str]:
        own = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | self.host.environment
        own["PATH"] = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        own["HOME"] = str(self.work)  # some keep prompts on disk, of another cache perhaps
        own["HF_HOME"] = str(self.work / "hub")
        (self.work / "hub" / "hub").mkdir(parents=True, exist_ok=True)
        own["KVQ_PROBE"] = str(self.work / "attended")
        if not self.host.option:
            own["MLX_KVQ_SPEC"] = self.spec
        return os.environ | own

    def is_up(self, process: subprocess.Popen, port: int) -> bool:
        """Wait until the port is open and answers, or the process has ended."""
        for _ in range(600):
            if process.poll() is not None:
                return False
            try:
                with socket.create_connection(("127.0.0.1", port), 1):
                    return True
            except OSError:
                time.sleep(0.5)
        return False

    def packed(self, log: str) -> dict[str, str]:
        lines = [line for line in log.splitlines() if "[mlx_kvq]" in line and " packed " in line]
        seen = [[int(n) for n in p.read_text().split()] for p in self.work.glob("attended.*")]
        calls, longest = sum(n for n, _ in seen), max((n for _, n in seen), default=0)
        said = lines[-1].split("[mlx_kvq] ")[-1] if lines else "missing: no line of [mlx_kvq]"
        attended = f"pass: {calls} calls" if calls else "missing: packed rows were never read"
        found = {"packed": said, "attended": attended}
        if self.bounded:
            fits = "pass" if 0 < longest <= self.bounded else "missing"
            found["bounded"] = f"{fits}: at most {longest} tokens, asked for {self.bounded}"
        return found


if __name__ == "__main__":
    main()
