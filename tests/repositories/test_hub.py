"""Upload and download through huggingface_hub, to and from a hub on loopback; then generate.

Each command is a process of its own with a cache folder of its own, as a stranger would have it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_kvq.repositories.repository import FILE
from tests.support.converted import MODELS, write
from tests.support.hub_server import Hub
from tests.support.server import BIN, Server

QWEN = MODELS / "tiny-qwen2-8bit"
LINE = (
    "[mlx_kvq] int4-srft: packed 4 of 4 layers, 4.25 bits per value, 3.76x smaller than fp16, "
    "the newest 64 to 256 and the first 4 tokens exact, calibrated (made up); "
    "as the model's repository says"
)
MEMORY = (
    "[mlx_kvq] 10 tokens, most of them kept exactly: 0.06 MB, fp16 0.02 MB; less than fp16 from "
    "about 190 tokens on"
)


@pytest.fixture(scope="module")
def hub():
    with Hub() as server:
        yield server


def shell(command, *arguments, home, hub=None, **env):
    """Run a command with an empty environment of Hugging Face's but for ``home`` and ``hub``."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHON"))}
    kept |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"} | (hub.environment if hub else {})
    return subprocess.run(
        [str(a) for a in (BIN / command, *arguments)],
        env=kept | env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def generate(model, *options, **where):
    asked = ("--model", model, "--prompt", "It was", "-m", 8)
    process = shell("mlx_lm.generate", *asked, *options, **where)
    assert process.returncode == 0, process.stderr
    lines = [line for line in process.stderr.splitlines() if line.startswith("[mlx_kvq]")]
    return process.stdout.split("==========")[1], lines


@pytest.fixture(scope="module")
def repo(hub, tmp_path_factory):
    """A repository on the hub, converted and uploaded from a shell; and the local one."""
    folder = tmp_path_factory.mktemp("upload") / "model"
    shutil.copytree(QWEN, folder)
    process = shell(
        "mlx_kvq", "convert", "--mlx-path", folder, "--kv-cache", "int4-srft:calibrate=off",
        "--upload-repo", "someone/tiny-kvq", home=folder.parent / "home", hub=hub,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert f"[mlx_kvq] uploaded to {hub.url}/someone/tiny-kvq" in process.stderr
    return "someone/tiny-kvq", folder


@pytest.fixture(scope="module")
def calibrated(hub, tmp_path_factory):
    """A calibrated one, uploaded by the function."""
    folder = tmp_path_factory.mktemp("upload") / "model"
    shutil.copytree(write(folder.parent / "links"), folder)  # files, no links
    code = (
        "import sys; from pathlib import Path; import mlx_kvq.repositories.convert as convert\n"
        "convert.upload(Path(sys.argv[1]), 'someone/calibrated')"
    )
    process = shell(
        Path(sys.executable).name, "-c", code, folder, home=folder.parent / "home", hub=hub
    )
    assert process.returncode == 0, process.stderr
    return "someone/calibrated", folder


def test_an_upload_is_one_commit_of_everything(repo, calibrated, hub):
    for name, folder in (repo, calibrated):
        commits = hub.repositories[name]
        assert len(commits) == 2  # that of .gitattributes is the hub's
        files = {n: data for n, data in hub.files(name).items() if n != ".gitattributes"}
        assert files == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert FILE in hub.files(calibrated[0])
    assert b"mlx_lm.generate --model someone/tiny-kvq --prompt" in hub.files(repo[0])["README.md"]
    asked = {(method, path.split("/")[-1]) for method, path in hub.requests}
    used = [("POST", "create"), ("POST", "validate-yaml"), ("POST", "batch"), ("POST", "verify")]
    assert asked >= {*used, ("POST", "main")}


def convert(folder, *options, home, hub):
    return shell(
        "mlx_kvq", "convert", "--mlx-path", folder, "--kv-cache", "int4-srft:calibrate=off",
        *options, home=home, hub=hub,
    )  # fmt: skip


def test_only_the_repository_is_uploaded(hub, tmp_path):
    """Not a .env, not what was left over, and what goes is listed first, with sizes."""
    folder = tmp_path / "model"
    shutil.copytree(QWEN, folder)
    own = {p.name for p in folder.iterdir()}
    for name in (".env", ".netrc", "secrets.json", "notes.txt", "train.py", "old.safetensors"):
        (folder / name).write_text("a secret")
    (folder / "logs").mkdir()
    (folder / "logs" / "config.json").write_text("{}")
    process = convert(folder, "--upload-repo", "someone/clean", home=tmp_path / "home", hub=hub)
    assert process.returncode == 0, process.stderr
    assert set(hub.files("someone/clean")) == own | {".gitattributes"}
    said = process.stderr.splitlines()
    (weights,) = [line for line in said if line.endswith(" MB  model.safetensors")]
    (left,) = [line for line in said if "left out" in line]
    assert left.endswith(": .env, .netrc, logs, notes.txt, old.safetensors, secrets.json, train.py")
    (done,) = [line for line in said if "uploaded to" in line]
    assert said.index(weights) < said.index(left) < said.index(done)
    assert "someone/clean" not in hub.private


def test_a_private_repository(hub, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(QWEN, folder)
    where = {"home": tmp_path / "home", "hub": hub}
    process = convert(folder, "--private", "--upload-repo", "someone/hidden", **where)
    assert process.returncode == 0, process.stderr
    assert "someone/hidden" in hub.private
    process = convert(folder, "--upload-repo", "someone/seen", **where)
    before = len(hub.repositories["someone/seen"])
    process = convert(folder, "--private", "--upload-repo", "someone/seen", **where)
    assert process.returncode == 1
    assert "the repository exists already and is public" in process.stderr
    assert len(hub.repositories["someone/seen"]) == before


def test_generate_from_the_hub_and_then_offline(calibrated, hub, tmp_path):
    name, folder = calibrated
    text, lines = generate(name, home=tmp_path, hub=hub)
    assert lines == [LINE, MEMORY]
    (snapshot,) = (tmp_path / "hub" / "models--someone--calibrated" / "snapshots").iterdir()
    assert (snapshot / FILE).read_bytes() == (folder / FILE).read_bytes()
    asked = len(hub.requests)
    assert generate(name, home=tmp_path) == (text, lines)
    assert generate(name, "--kv-cache", "fp16", home=tmp_path)[1] == [
        "[mlx_kvq] --kv-cache fp16 in place of the repository's int4-srft"
    ]
    assert len(hub.requests) == asked

    inspected = shell("mlx_kvq", "inspect", name, home=tmp_path)
    assert "int4-srft, seed 0, format 1" in inspected.stdout, inspected.stderr


def test_a_snapshot_without_the_file_is_told(calibrated, hub, tmp_path):
    """Fetched by an mlx-lm that did not know of it, and then there is no net."""
    name, _ = calibrated
    generate(name, home=tmp_path, hub=hub, MLX_KVQ_DISABLE="1")
    (snapshot,) = (tmp_path / "hub" / "models--someone--calibrated" / "snapshots").iterdir()
    assert not (snapshot / FILE).exists()
    command = ("mlx_lm.generate", "--model", name, "--prompt", "It", "-m", 2)
    process = shell(*command, home=tmp_path)
    assert process.returncode == 1
    (line,) = [line for line in process.stderr.splitlines() if "[mlx_kvq]" in line]
    assert line.startswith(
        f"[mlx_kvq] error: The KV cache of '{name}' cannot be used: {FILE} cannot be fetched: "
    )
    assert "Traceback" not in process.stderr
    assert generate(name, home=tmp_path, hub=hub)[1] == [LINE, MEMORY]  # with the net it is fetched


def test_inspect_fetches_the_small_files_only(calibrated, hub, tmp_path):
    asked = len(hub.requests)
    process = shell("mlx_kvq", "inspect", calibrated[0], home=tmp_path, hub=hub)
    assert process.returncode == 0, process.stderr
    assert "544 bytes in all layers" in process.stdout
    fetched = {path.split("/")[-1] for _, path in hub.requests[asked:]}
    assert {"config.json", FILE} <= fetched
    assert "model.safetensors" not in fetched


def test_convert_from_the_hub(repo, hub, tmp_path):
    """What is there on the hub is replaced; the card says what it was made from."""
    folder = tmp_path / "model"
    process = shell(
        "mlx_kvq", "convert", "--hf-path", repo[0], "--mlx-path", folder, "--kv-cache",
        "int8-srft:calibrate=off", home=tmp_path, hub=hub,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    text = (folder / "README.md").read_text()
    assert f"base_model: {repo[0]}\n" in text
    assert "int8-srft:calibrate=off`: packed 4 of 4 layers" in text


@pytest.mark.parametrize(
    "env, message",
    [
        ({"HF_TOKEN": "hf_wrong"}, "401"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "refused"),
    ],
)
def test_a_failed_upload_says_what_is_left_to_do(env, message, hub, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(QWEN, folder)
    process = shell(
        "mlx_kvq", "convert", "--mlx-path", folder, "--kv-cache", "int4-srft:calibrate=off",
        "--upload-repo", "someone/new", home=tmp_path, hub=hub, **env,
    )  # fmt: skip
    assert process.returncode == 1
    line = process.stderr.splitlines()[-1]
    assert line.startswith(f"mlx_kvq convert: error: '{folder}' is complete but could not be")
    assert message in line
    again = f"upload('{folder}', 'someone/new')"
    found, _, command = line.partition('Try again with: python -c "')[2].partition("; ")
    assert command == f'{again}"'
    exec(found, {})  # such a function is there
    assert "Traceback" not in process.stderr
    assert "someone/new" not in hub.repositories


def test_the_server_picks_it_up(tmp_path):
    folder = write(tmp_path / "model")
    text, _ = generate(folder, home=tmp_path)
    with Server(folder) as server:
        answer = server.complete(("It was", 8))
        log = server.log.read_text()
    assert log.count("[mlx_kvq]") == log.count(LINE) == 1
    assert answer["text"].strip() == text.strip() != ""


def test_a_bad_repository_ends_a_command_in_one_line(tmp_path):
    folder = write(tmp_path / "model")
    (folder / FILE).write_bytes(b"")
    for command in (
        ("mlx_lm.generate", "--prompt", "It"),
        ("mlx_lm.server", "--port", "0"),
    ):
        process = shell(command[0], "--model", folder, *command[1:], home=tmp_path)
        assert process.returncode == 1
        (line,) = [line for line in process.stderr.splitlines() if "[mlx_kvq]" in line]
        assert line.startswith(f"[mlx_kvq] error: The KV cache of '{folder}' cannot be used: ")
        assert "Traceback" not in process.stderr
