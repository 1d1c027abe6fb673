"""A process of mlx_lm.server, and requests to it."""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from mlx_lm.utils import load_tokenizer

from tests.support.float32 import TEXT

REQUESTS = 32
WORDS = [1, 2, 60, 5, 420, 3, 500, 8, 1, 2, 40, 4, 90, 3, 20, 7]  # of the prompts, in turn
TOKENS = [16, 6, 24, 11]  # asked for, in turn
BIN = Path(sys.executable).parent


class Server:
    """A server process on a free port of this machine, until the end of a ``with`` block."""

    def __init__(self, folder: Path, *options: str):
        self.folder, self.options = folder, options

    def __enter__(self) -> "Server":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = self.folder.parent / f"server-{self.port}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [BIN / "mlx_lm.server", "--model", self.folder, "--port", str(self.port),
                 *self.options],
                env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
                stdout=log,
                stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + 120
        while "Starting httpd" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait(60)

    def complete(self, request: tuple[str, int]) -> dict:
        """The text of a request, and when its pieces came."""
        body = {
            "prompt": request[0],
            "max_tokens": request[1],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
            try:
                connection.request(
                    "POST",
                    "/v1/completions",
                    json.dumps(body),
                    {"Content-Type": "application/json"},
                )
                response = connection.getresponse()
                break
            except ConnectionResetError:  # more callers at once than its socket lets wait
                assert self.process.poll() is None, self.log.read_text()
        found: dict = {"text": "", "times": [], "status": response.status}
        for line in response:
            if line.startswith(b"data: {"):
                piece = json.loads(line[6:])
                found["times"].append(time.monotonic())
                found["text"] += "".join(c["text"] for c in piece["choices"])
                found["usage"] = piece.get("usage") or found.get("usage")
        connection.close()
        assert found["status"] == 200, found
        return found


def most_at_once(answers) -> int:
    """How many streams were under way at the same time."""
    events = [(a["times"][0], 1) for a in answers] + [(a["times"][-1], -1) for a in answers]
    open_now = most = 0
    for _, change in sorted(events):
        open_now += change
        most = max(most, open_now)
    return most


def requests(folder: Path) -> list[tuple[str, int]]:
    """(prompt, tokens) of 32 requests that begin with different tokens, and of as many that share
    the first half of one of these, or all of it."""
    tokenizer = load_tokenizer(folder)
    words = TEXT.split()
    found: dict[int, tuple[str, int]] = {}
    for i in range(len(words)):
        n = len(found)
        prompt = " ".join(((words[i:] + words) * 6)[: WORDS[n % len(WORDS)]])
        found.setdefault(tokenizer.encode(prompt)[0], (prompt, TOKENS[n % len(TOKENS)]))
    assert len(found) >= REQUESTS
    first = list(found.values())[:REQUESTS]
    halves = []
    for i, (prompt, tokens) in enumerate(first):
        half = prompt.split()
        half = half[: len(half) // 2] if i % 3 else half
        halves.append((" ".join([*half, *words[i : i + 4]]), tokens))
    return first + halves
