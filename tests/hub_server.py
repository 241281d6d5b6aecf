"""A Hub small enough for a test: downloads of models and data sets, and every way the real one says no.

It speaks the part of the protocol that huggingface_hub 2.4 uses to pull: HEAD and GET resolve, GET of a repository's
revision and tree, POST paths-info. Point the real client at it with HF_ENDPOINT, or `constants.ENDPOINT`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
API = re.compile(r"/api/(models|datasets)/(.+?)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?$")
RESOLVE = re.compile(r"/(?:(datasets)/)?(.+?)/resolve/([^/]+)/(.+)$")


@dataclass
class Repository:
    """Files by their path, or the refusal that every request for it gets: (status, X-Error-Code, message)."""

    files: dict[str, bytes] = field(default_factory=dict)
    refusal: tuple[int, str | None, str] | None = None

    @classmethod
    def of_folder(cls, folder: Path) -> Repository:
        """The files of a local folder."""
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return cls({path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})


class Hub:
    """`with Hub() as hub:` serves `hub.repositories`, by "models/owner/name" or "datasets/owner/name"."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        """What was asked, in order: "HEAD /owner/name/resolve/main/config.json"."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """From here on nobody listens; GET /stop does the same."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer_request()

    do_GET = do_POST = do_HEAD

    def _answer_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path)
        if path == "/stop":
            self._send(200, {})
            threading.Thread(target=self.hub.stop).start()
        elif found := RESOLVE.match(path):
            kind, name, revision, file = found.groups()
            repository = self._open(kind or "models", name, revision)
            if repository is not None:
                self._send_file(repository, file)
        elif found := API.match(path):
            kind, name, what, revision, below = found.groups()
            repository = self._open(kind, name, revision or "main")
            if repository is not None:
                self._send_description(repository, kind, name, what, below or "", body)
        else:
            self._send(404, {"error": f"no such page: {path}"})

    def _open(self, kind: str, name: str, revision: str) -> Repository | None:
        """The repository asked for, or None after a refusal was sent."""
        repository = self.hub.repositories.get(f"{kind}/{name}")
        if repository is None:
            # The Hub answers 401 to those without a token: it does not tell a missing repository from a private one.
            status = 404 if self.headers.get("Authorization") else 401
            self._refuse(status, "RepoNotFound", "Repository not found")
        elif repository.refusal is not None:
            self._refuse(*repository.refusal)
        elif revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repository
        return None

    def _send_file(self, repository: Repository, file: str) -> None:
        content = repository.files.get(file)
        if content is None:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        self._send(200, content, {"ETag": f'"{_blob_id(content)}"', "X-Repo-Commit": COMMIT})

    def _send_description(
        self, repository: Repository, kind: str, name: str, what: str | None, below: str, body: bytes
    ) -> None:
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}
            for path, content in sorted(repository.files.items())
        ]
        if what == "tree":
            self._send(200, [entry for entry in entries if entry["path"].startswith(f"{below}/" if below else "")])
        elif what == "paths-info":
            wanted = json.loads(body)["paths"]
            self._send(200, [entry for entry in entries if entry["path"] in wanted])
        else:
            files = [{"rfilename": entry["path"]} for entry in entries]
            self._send(200, {"id": name, "sha": COMMIT, "private": False, "siblings": files, "tags": []})

    def _refuse(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, {"error": message}, headers)

    def _send(self, status: int, content: bytes | list | dict, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
