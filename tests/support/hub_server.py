"""A Hugging Face hub on loopback: the HTTP endpoints that huggingface_hub uses to create a
repository, to upload a folder with LFS and to download a snapshot.

Repositories are lists of commits, path -> bytes; LFS objects lie apart and are reached through a
redirect, as on the hub. ``requests`` keeps (method, path) of everything that was asked.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_loopback"


class Hub(ThreadingHTTPServer):
    """Runs until the end of a ``with`` block; ``url`` is for HF_ENDPOINT."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, list[tuple[str, dict[str, str]]]] = {}
        self.blobs: dict[str, bytes] = {}  # by git's hash of the bytes
        self.objects: dict[str, bytes] = {}  # LFS, by SHA-256
        self.private: set[str] = set()  # names of repositories
        self.requests: list[tuple[str, str]] = []

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """For a process that is to use this hub, as one who may write there."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",  # LFS, the other way to upload
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def files(self, name: str) -> dict[str, bytes]:
        """What the newest commit of a repository holds."""
        return {path: self.read(key) for path, key in self.repositories[name][-1][1].items()}

    def read(self, key: str) -> bytes:
        kind, _, digest = key.partition(":")
        return (self.objects if kind == "lfs" else self.blobs)[digest]

    def commit(self, name: str, changes: dict[str, str | None]) -> str:
        """Path -> ``lfs:<SHA-256>`` or ``git:<hash>``, or None for a file that goes."""
        before = self.repositories[name][-1][1] if self.repositories[name] else {}
        kept = {p: k for p, k in {**before, **changes}.items() if k is not None}
        text = json.dumps([len(self.repositories[name]), kept], sort_keys=True)
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.repositories[name].append((oid, kept))
        return oid


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def reply(self, status: int, body=b"", headers: dict | None = None) -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": len(body)} | (
            headers or {}
        )
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size) if size else b""
        parts = path.strip("/").split("/")
        writes = self.command in ("POST", "PUT") and parts[0] != "objects"
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "Invalid username or password."})
        match self.command, parts:
            case "POST", ["api", "repos", "create"]:
                self.create(json.loads(body))
            case "POST", ["api", "validate-yaml"]:
                self.validate(json.loads(body)["content"])
            case "POST", ["api", "models", *name, "preupload", _] if self.known(name):
                self.preupload("/".join(name), json.loads(body))
            case "POST", [*name, "info", "lfs", "objects", "batch"]:
                self.batch(json.loads(body))
            case "PUT", ["objects", digest]:
                if hashlib.sha256(body).hexdigest() != digest:
                    return self.reply(400, {"error": "not the bytes of this hash"})
                self.server.objects[digest] = body
                self.reply(200)
            case "POST", ["objects", "verify"]:
                said = json.loads(body)
                there = len(self.server.objects.get(said["oid"], b"")) == said["size"]
                self.reply(200 if there else 404, {})
            case "POST", ["api", "models", *name, "commit", _] if self.known(name):
                self.commit("/".join(name), [json.loads(line) for line in body.splitlines()])
            case "GET", ["api", "models", *name, "revision", revision] if self.known(name):
                self.info("/".join(name), revision)
            case "GET", ["api", "models", *name, "tree", revision] if self.known(name):
                self.tree("/".join(name), revision)
            case "GET", ["api", "models", *name] if self.known(name):
                self.info("/".join(name), "main")
            case (("GET" | "HEAD"), [owner, name, "resolve", revision, *file]) if self.known(
                [owner, name]
            ):
                self.resolve(f"{owner}/{name}", revision, "/".join(file))
            case (("GET" | "HEAD"), ["objects", digest]) if digest in self.server.objects:
                self.send(self.server.objects[digest], {"ETag": f'"{digest}"'})
            case _:
                headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "not found"}
                self.reply(404, {"error": f"no {self.command} {path}"}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = route  # noqa: N815

    def known(self, name: list[str]) -> bool:
        return "/".join(name) in self.server.repositories

    def create(self, said: dict) -> None:
        name = f"{said.get('organization') or 'loopback'}/{said['name']}"
        there = name in self.server.repositories
        if not there:
            self.server.repositories[name] = []
            if said.get("visibility") == "private":
                self.server.private.add(name)
            empty = git_hash(b"")
            self.server.blobs[empty] = b""
            self.server.commit(name, {".gitattributes": f"git:{empty}"})
        answer = {"url": f"{self.server.url}/{name}", "name": name, "id": name}
        self.reply(409 if there else 200, answer)

    def validate(self, content: str) -> None:
        """As far as the hub's rules are plain: a mapping, lists of strings, known shapes."""
        errors = []
        try:
            _, block, _ = content.split("---\n", 2)
            data = yaml.safe_load(block)
            assert isinstance(data, dict) and data, "empty metadata"
            tags = data.get("tags", [])
            assert all(isinstance(t, str) and len(t) < 50 for t in tags), "tags are strings"
            for model in data.get("model-index", []):
                assert isinstance(model["name"], str), "model-index.name is a string"
                for result in model["results"]:
                    assert isinstance(result["task"]["type"], str)
                    assert isinstance(result["dataset"]["type"], str)
                    assert isinstance(result["dataset"]["name"], str)
                    assert all("type" in m and "value" in m for m in result["metrics"])
        except Exception as error:
            errors = [{"message": repr(error)}]
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, name: str, said: dict) -> None:
        there = self.server.repositories[name][-1][1]
        files = []
        for file in said["files"]:
            large = file["path"].endswith(".safetensors") or file["size"] > 10 << 20
            oid = there.get(file["path"], "").partition(":")[2] or None
            files.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": oid,
                }
            )
        self.reply(200, {"files": files})

    def batch(self, said: dict) -> None:
        objects = []
        for item in said["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.server.objects:
                answer["actions"] = {
                    "upload": {"href": f"{self.server.url}/objects/{item['oid']}"},
                    "verify": {"href": f"{self.server.url}/objects/verify"},
                }
            objects.append(answer)
        headers = {"Content-Type": "application/vnd.git-lfs+json"}
        self.reply(200, {"transfer": "basic", "objects": objects}, headers)

    def commit(self, name: str, lines: list[dict]) -> None:
        changes: dict[str, str | None] = {}
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    data = base64.b64decode(value["content"])
                    self.server.blobs[git_hash(data)] = data
                    changes[value["path"]] = f"git:{git_hash(data)}"
                case "lfsFile":
                    if value["oid"] not in self.server.objects:
                        return self.reply(400, {"error": f"{value['path']} was not uploaded"})
                    changes[value["path"]] = f"lfs:{value['oid']}"
                case "deletedFile":
                    changes[value["path"]] = None
        oid = self.server.commit(name, changes)
        url = f"{self.server.url}/{name}/commit/{oid}"
        self.reply(200, {"success": True, "commitOid": oid, "commitUrl": url})

    def at(self, name: str, revision: str) -> tuple[str, dict[str, str]] | None:
        commits = self.server.repositories[name]
        if revision == "main":
            return commits[-1]
        return next((c for c in commits if c[0] == revision), None)

    def info(self, name: str, revision: str) -> None:
        if (found := self.at(name, revision)) is None:
            headers = {"X-Error-Code": "RevisionNotFound"}
            return self.reply(404, {"error": "no such revision"}, headers)
        siblings = [{"rfilename": path} for path in found[1]]
        said = {"id": name, "modelId": name, "sha": found[0], "siblings": siblings}
        self.reply(200, said | {"private": name in self.server.private})

    def tree(self, name: str, revision: str) -> None:
        if (found := self.at(name, revision)) is None:
            headers = {"X-Error-Code": "RevisionNotFound"}
            return self.reply(404, {"error": "no such revision"}, headers)
        entries = []
        for path, key in found[1].items():
            data = self.server.read(key)
            entry = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
            if key.startswith("lfs:"):
                entry["lfs"] = {"oid": key[4:], "size": len(data), "pointerSize": 134}
            entries.append(entry)
        self.reply(200, entries)

    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self.at(name, revision)
        if found is None or path not in found[1]:
            code = "RevisionNotFound" if found is None else "EntryNotFound"
            return self.reply(404, {"error": code}, {"X-Error-Code": code})
        key = found[1][path]
        data = self.server.read(key)
        headers = {"X-Repo-Commit": found[0]}
        if key.startswith("lfs:"):
            headers["X-Linked-Etag"] = f'"{key[4:]}"'
            headers["X-Linked-Size"] = str(len(data))
            # Another host, as on the hub: the client does not follow such a HEAD.
            storage = f"http://localhost:{self.server.server_port}"
            headers["Location"] = f"{storage}/objects/{key[4:]}"
            return self.reply(302, b"", headers)
        self.send(data, headers | {"ETag": f'"{git_hash(data)}"'})

    def send(self, data: bytes, headers: dict) -> None:
        first = self.headers.get("Range", "").removeprefix("bytes=").partition("-")[0]
        if first:
            last = f"bytes {first}-{len(data) - 1}/{len(data)}"
            return self.reply(206, data[int(first) :], headers | {"Content-Range": last})
        self.reply(200, data, headers)
