"""A Hub small enough for a test: pulls and pushes of models and data sets, and every way the real one says no.

Point the real client at it with HF_ENDPOINT, `HfApi(endpoint=...)` or `constants.ENDPOINT`. Like the real Hub it shows
only whole commits, holds every large file against its announced SHA-256, and keeps what arrived when a later step
fails. Unlike it: no pull requests, no .gitignore rules, no Xet (to push, the client then needs HF_HUB_DISABLE_XET=1),
anybody may write to any namespace, and a tree is always listed to the bottom.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from hashlib import sha256
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from hub_protocol import CALLS, GITATTRIBUTES, Refusal, Repository, card_data, content_id, entry_of, is_large

FAULTS = ("drop-early", "half", "drop", "lost")


class Hub:
    """`with Hub() as hub:` serves `hub.repositories`, by "models/owner/name" or "datasets/owner/name"."""

    def __init__(self, token: str = "hf_test_token", user: str = "someone") -> None:
        self.token, self.user = token, user
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        """What was asked, in order: "HEAD /owner/name/resolve/main/config.json"."""
        self.bodies: list[bytes] = []
        """What came with each request, as much of it as arrived."""
        self.received: Counter[str] = Counter()
        """How often a large file arrived whole and right, by SHA-256."""
        self.permits: dict[str, tuple[Repository, str, int]] = {}
        """Where a large file may be put -> the repository, SHA-256 and size in bytes announced for it."""
        self.lock = threading.Lock()
        self._faults: list[list[Any]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (_Handler,), {"hub": self}))
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

    def fail(
        self,
        call: str,
        status: int | str,
        times: int | None = 1,
        code: str | None = None,
        message: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Let the next `times` requests of one of CALLS fail, None for ever; further faults wait in line.

        A number is the refusal's status, with its X-Error-Code, X-Error-Message and further headers. The other FAULTS
        close the connection without an answer: "drop-early" before the body is read, "half" in the middle of it,
        "drop" after it, "lost" when the work is done.
        """
        if call not in CALLS or not (status in FAULTS or isinstance(status, int)):
            raise ValueError(f"{call!r} must be one of {list(CALLS)}, {status!r} a number or one of {FAULTS}")
        fault: str | Refusal = str(status)
        if isinstance(status, int):
            missing = "EntryNotFound" if call == "resolve" else "RepoNotFound"
            messages = {401: "Invalid credentials in Authorization header"}
            message = message or messages.get(status, HTTPStatus(status).phrase)
            fault = Refusal(status, missing if status == 404 and code is None else code, message, headers)
        with self.lock:
            self._faults.append([call, times, fault])

    def recover(self) -> None:
        """No request fails any more."""
        with self.lock:
            self._faults.clear()

    def next_fault(self, call: str) -> str | Refusal | None:
        """What the next request of a call meets instead of an answer."""
        with self.lock:
            for fault in self._faults:
                if fault[0] == call and fault[1] != 0:
                    fault[1] = None if fault[1] is None else fault[1] - 1
                    return fault[2]
        return None

    def carrying(self, text: str) -> list[str]:
        """The requests with a text in their address or body, base64 undone; headers are not looked at."""
        pairs = zip(self.requests, self.bodies, strict=True)
        return [
            request
            for request, body in pairs
            if text in unquote(request) or any(text.encode() in part for part in _texts(body))
        ]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        line = f"{self.command} {urlsplit(self.path).path}"
        if line == "GET /stop":
            self._send(200, {})
            threading.Thread(target=self.hub.stop).start()
            return
        matches = {call: match for call, pattern in CALLS.items() if (match := re.fullmatch(pattern, line))}
        call = next(iter(matches), "")
        fault = self.hub.next_fault(call)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read({"drop-early": 0, "half": length // 2}.get(str(fault), length))
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {self.path}")
            self.hub.bodies.append(body)
        if len(body) < length or fault in ("drop-early", "half", "drop"):
            return  # Half a request is none, and returning closes the connection.
        try:
            if isinstance(fault, Refusal):
                raise fault
            if not call:
                raise Refusal(404, None, f"no such page: {line}")
            parts = {key: unquote(value) for key, value in matches[call].groupdict().items() if value is not None}
            answer, headers = getattr(self, f"_{call.replace('-', '_')}")(body, **parts), None
            if isinstance(answer, tuple):
                answer, headers = answer
        except Refusal as refusal:
            self._send(refusal.status, refusal.answer, refusal.headers)
        else:
            if fault != "lost":
                self._send(200, answer, headers)

    do_GET = do_POST = do_PUT = do_HEAD

    def _send(self, status: int, content: bytes | list | dict, headers: Mapping[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content, default=str).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _url(self, kind: str, name: str) -> str:
        return f"{self.hub.endpoint}/{'' if kind == 'models' else f'{kind}/'}{name}"

    def _signed_in(self, required: bool = False) -> bool:
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {self.hub.token}"):
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        if required and given is None:
            raise Refusal(401, None, "Invalid username or password.")
        return given is not None

    def _repository(self, kind: str, name: str, write: bool = False) -> Repository:
        signed_in = self._signed_in()
        repository = self.hub.repositories.get(f"{kind}/{name}")
        if repository is None or (not signed_in and (write or repository.private)):
            # The Hub answers 401 to those without a token: it does not tell a missing repository from a private one.
            raise Refusal(404 if signed_in else 401, "RepoNotFound", "Repository not found")
        if repository.refusal is not None:
            raise Refusal(*repository.refusal)
        return repository

    # One method a call, named like it: (body, the parts of the address) -> the answer, or the answer and its headers

    def _whoami(self, body: bytes) -> dict:
        self._signed_in(required=True)
        return {"type": "user", "name": self.hub.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def _revision(self, body: bytes, kind: str, name: str, revision: str = "main") -> dict:
        repository = self._repository(kind, name)
        commit = repository.at(revision)
        answer = {"id": name, "sha": commit.oid, "private": repository.private, "cardData": commit.card}
        files = [{"rfilename": path} for path in sorted(commit.files)]
        return answer | {"siblings": files, "tags": commit.card.get("tags", [])}

    def _tree(self, body: bytes, kind: str, name: str, revision: str, folder: str = "") -> list:
        entries = self._repository(kind, name).at(revision).entries
        return [entry for entry in entries if entry["path"].startswith(f"{folder}/" if folder else "")]

    def _paths_info(self, body: bytes, kind: str, name: str, revision: str) -> list:
        wanted = json.loads(body)["paths"]
        return [entry for entry in self._repository(kind, name).at(revision).entries if entry["path"] in wanted]

    def _resolve(self, body: bytes, name: str, revision: str, file: str, kind: str = "models") -> tuple:
        commit = self._repository(kind, name).at(revision)
        if file not in commit.files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        content = commit.files[file]
        entry = entry_of(file, content)
        headers = {"ETag": f'"{content_id(entry)}"', "X-Repo-Commit": commit.oid}
        if "lfs" in entry:
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(content))}
        return content, headers

    def _xet_token(self, body: bytes, kind: str, name: str, revision: str) -> dict:
        raise Refusal(404, None, "This Hub stores nothing in Xet")

    def _create(self, body: bytes) -> dict:
        self._signed_in(required=True)
        asked = json.loads(body)
        name, kind = f"{asked['organization'] or self.hub.user}/{asked['name']}", f"{asked.get('type') or 'model'}s"
        url, private = self._url(kind, name), asked.get("visibility") == "private"
        with self.hub.lock:
            if f"{kind}/{name}" in self.hub.repositories:
                raise Refusal(409, None, f"You already created this {kind[:-1]} repo", url=url)
            self.hub.repositories[f"{kind}/{name}"] = Repository({".gitattributes": GITATTRIBUTES}, private=private)
        return {"url": url, "name": name}

    def _validate_yaml(self, body: bytes) -> dict:
        data = card_data(json.loads(body)["content"])
        return {"errors": [], "warnings": [] if data else [{"message": "empty or missing yaml metadata in repo card"}]}

    def _preupload(self, body: bytes, kind: str, name: str, revision: str) -> dict:
        commit, answers = self._repository(kind, name, write=True).at(revision), []
        present = {entry["path"]: content_id(entry) for entry in commit.entries}
        for asked in json.loads(body)["files"]:
            mode = "lfs" if is_large(asked["path"], asked["size"]) else "regular"
            oid = present.get(asked["path"])
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def _lfs_batch(self, body: bytes, name: str, kind: str = "models") -> dict:
        repository, answers = self._repository(kind, name, write=True), []
        for asked in json.loads(body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in repository.objects:
                # The client sends no token to a storage: the address is the permission.
                permit = secrets.token_hex(8)
                self.hub.permits[permit] = (repository, asked["oid"], asked["size"])
                verify = f"{self._url(kind, name)}.git/info/lfs/objects/verify"
                upload = f"{self.hub.endpoint}/storage/{permit}"
                answer["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            answers.append(answer)
        return {"transfer": "basic", "objects": answers}

    def _put(self, body: bytes, permit: str) -> bytes:
        if permit not in self.hub.permits:
            raise Refusal(403, None, "Access denied")
        repository, oid, size = self.hub.permits[permit]
        if (sha256(body).hexdigest(), len(body)) != (oid, size):
            raise Refusal(400, None, f"these {len(body)} bytes are not the {size} of {oid}")
        with self.hub.lock:
            repository.objects[oid] = body
            self.hub.received[oid] += 1
        return b""

    def _verify(self, body: bytes, name: str, kind: str = "models") -> dict:
        asked, objects = json.loads(body), self._repository(kind, name, write=True).objects
        if len(objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, None, f"{asked['oid']} of {asked['size']} bytes did not arrive")
        return {}

    def _branch(self, body: bytes, kind: str, name: str, branch: str) -> dict:
        with self.hub.lock:
            self._repository(kind, name, write=True).branch(branch, json.loads(body).get("startingPoint", "main"))
        return {}

    def _commit(self, body: bytes, kind: str, name: str, revision: str) -> dict:
        repository = self._repository(kind, name, write=True)
        if "create_pr=" in self.path:
            raise Refusal(400, None, "This Hub opens no pull requests")
        header, *changes = [json.loads(line) for line in body.splitlines()]
        with self.hub.lock:
            commit = repository.commit(revision, header["value"], changes)
        return {"success": True, "commitOid": commit.oid, "commitUrl": f"{self._url(kind, name)}/commit/{commit.oid}"}


def _texts(body: bytes) -> Iterator[bytes]:
    """A body as it came and, where it is JSON, each of its strings, plain and with base64 undone."""
    yield body
    waiting = [json.loads(line) for line in body.splitlines()] if body.startswith(b"{") else []
    while waiting:
        value = waiting.pop()
        if isinstance(value, (dict, list)):
            waiting += [*value, *value.values()] if isinstance(value, dict) else value
        elif isinstance(value, str):
            yield value.encode()
            try:
                yield base64.b64decode(value, validate=True)
            except ValueError:
                continue
