"""What a Hub keeps and what it refuses: repositories, commits, file ids, and the requests that clients make."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha1, sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from cream_peft.publish.licenses import LICENSES

NAME = r"(?P<name>(?:[^/]+/)?[^/]+?)"
REVISION = r"(?P<revision>[^/]+)"
API = rf"/api/(?P<kind>models|datasets)/{NAME}"
LFS = rf"/(?:(?P<kind>datasets)/)?{NAME}\.git/info/lfs/objects"
CALLS = {
    "whoami": "GET /api/whoami-v2",
    "create": "POST /api/repos/create",
    "validate-yaml": "POST /api/validate-yaml",
    "preupload": rf"POST {API}/preupload/{REVISION}",
    "lfs-batch": rf"POST {LFS}/batch",
    "put": r"PUT /storage/(?P<permit>[0-9a-f]+)",
    "verify": rf"POST {LFS}/verify",
    "commit": rf"POST {API}/commit/{REVISION}",
    "branch": rf"POST {API}/branch/(?P<branch>[^/]+)",
    "revision": rf"GET {API}(?:/revision/{REVISION})?",
    "tree": rf"GET {API}/tree/{REVISION}(?:/(?P<folder>.+))?",
    "paths-info": rf"POST {API}/paths-info/{REVISION}",
    "xet-token": rf"GET {API}/xet-(?:read|write)-token/{REVISION}",
    "resolve": rf"(?:GET|HEAD) /(?:(?P<kind>datasets)/)?{NAME}/resolve/{REVISION}/(?P<file>.+)",
}
"""Each call's name -> the requests that make it."""

LARGE = ["arrow", "bin", "ckpt", "gz", "h5", "model", "npy", "npz", "onnx", "parquet", "pickle", "pkl", "pt", "pth"]
LARGE += ["safetensors", "tar", "tgz", "zip"]
GITATTRIBUTES = "".join(f"*.{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LARGE).encode()
"""What a new repository holds."""
REGULAR_BYTES = 10 * 2**20
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Refusal(Exception):
    """The Hub's no; `more` goes into the JSON that comes with it."""

    def __init__(
        self, status: int, code: str | None, message: str, headers: Mapping[str, str] | None = None, **more: object
    ) -> None:
        super().__init__(message)
        self.status, self.answer = status, {"error": message, **more}
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | dict(headers or {})


def is_large(path: str, size: int) -> bool:
    """Whether the Hub wants a file of `size` bytes through LFS; an empty one never is."""
    return size > 0 and (path.rsplit(".")[-1] in LARGE or "tfevents" in path or size > REGULAR_BYTES)


def blob_id(content: bytes) -> str:
    """Git's name for a file."""
    return sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def entry_of(path: str, content: bytes) -> dict[str, Any]:
    """A file as the Hub's tree lists it; Git itself holds only a pointer to a large one."""
    entry = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
    if is_large(path, len(content)):
        digest = sha256(content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n".encode()
        entry["oid"] = blob_id(pointer)
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": len(pointer)}
    return entry


def content_id(entry: dict[str, Any]) -> str:
    """What the client compares its own file with: the SHA-256 of a large file, else Git's name."""
    return entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]


def card_data(readme: str) -> dict[str, Any]:
    """The metadata at the head of a card, {} where there is none; Refusal for some of what the Hub objects to."""
    found = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", readme, re.DOTALL)
    problem = None
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        data, problem = {}, f"not valid YAML: {error}"
    if not isinstance(data, dict):
        data, problem = {}, "the metadata must be a mapping"
    for field in ("base_model", "datasets"):
        values = data.get(field, [])
        for value in values if isinstance(values, list) else [values]:
            if not REPO_ID.fullmatch(str(value)):
                problem = f'"{field}" with value "{value}" is not valid. Use an id from https://hf.co.'
    if "license" in data and data["license"] not in LICENSES:
        problem = f'"license" must be one of [{", ".join(LICENSES)}, array]'
    if problem:
        raise Refusal(400, None, " ".join(problem.split()), errors=[{"message": problem}])
    return data


@dataclass(frozen=True)
class Commit:
    """What a repository held at one time: contents by path. `oid` is 40 hex digits; the first has no parent."""

    oid: str
    parent: str | None
    message: str
    files: Mapping[str, bytes]

    @cached_property
    def entries(self) -> list[dict[str, Any]]:
        """The files as the Hub's tree lists them."""
        return [entry_of(path, content) for path, content in sorted(self.files.items())]

    @property
    def card(self) -> dict[str, Any]:
        """The metadata of README.md."""
        return card_data(self.files.get("README.md", b"").decode())


class Repository:
    """Branches of commits, or the refusal that every request for it gets: (status, X-Error-Code, message)."""

    def __init__(
        self,
        files: Mapping[str, bytes] | None = None,
        refusal: tuple[int, str | None, str] | None = None,
        private: bool = False,
    ) -> None:
        self.refusal, self.private = refusal, private
        self.commits: dict[str, Commit] = {}
        """All of them, by id, in the order they came."""
        self.branches: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        """The large files that arrived, committed or not, by SHA-256."""
        self._add("main", files or {}, "initial commit")

    @classmethod
    def of_folder(cls, folder: Path) -> Repository:
        """The files of a local folder."""
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return cls({path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})

    @property
    def files(self) -> Mapping[str, bytes]:
        """What `main` holds."""
        return self.at("main").files

    def at(self, revision: str) -> Commit:
        """The commit of a branch or an id."""
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]

    def branch(self, name: str, start: str) -> None:
        """A new branch from a branch or commit id."""
        if name in self.branches:
            raise Refusal(409, None, f"Reference already exists: {name}")
        self.branches[name] = self.at(start).oid

    def commit(self, branch: str, header: dict[str, Any], changes: list[dict[str, Any]]) -> Commit:
        """All of the changes, each {"key", "value"}, as one commit on a branch, or Refusal and none of them."""
        head = self.at(branch)
        if branch not in self.branches:
            raise Refusal(400, None, f"{branch} is no branch")
        if header.get("parentCommit") not in (None, head.oid):
            raise Refusal(412, None, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for change in changes:
            self._change(files, change["key"], change["value"])
        card_data(files.get("README.md", b"").decode())
        return self._add(branch, files, header["summary"])

    def _change(self, files: dict[str, bytes], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = base64.b64decode(value["content"], validate=True)
            if is_large(path, len(files[path])):
                raise Refusal(400, None, f"{path} must go through LFS")
        elif key == "lfsFile":
            content = self.objects.get(value["oid"])
            if content is None or len(content) != value["size"]:
                raise Refusal(400, None, f"{path} points to {value['oid']}, which did not arrive")
            files[path] = content
        elif key == "deletedFile" and path in files:
            del files[path]
        else:
            raise Refusal(404, "EntryNotFound", f"{key} {path}: A file with this name doesn't exist")

    def _add(self, branch: str, files: Mapping[str, bytes], message: str) -> Commit:
        parent = self.branches.get(branch)
        held = {path: blob_id(content) for path, content in sorted(files.items())}
        oid = sha1(repr((parent, message, held)).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, message, MappingProxyType(dict(files)))
        self.branches[branch] = oid
        return self.commits[oid]
