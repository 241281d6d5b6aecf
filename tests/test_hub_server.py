"""The Hub of the tests is as strict as the real one: every test here talks to it with huggingface_hub itself."""

from __future__ import annotations

import hashlib
import random
import socket
import time

import pytest
from hub_server import Hub, Repository
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info
from huggingface_hub.utils import get_session
from huggingface_hub.utils.sha import git_hash

NAME = "someone/adapter"
WEIGHTS = random.Random(0).randbytes(1_500_000)
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()
CARD = b"---\nbase_model: meta-llama/Llama-2-7b-hf\ntags: [cream]\n---\n\n# An adapter\n"
FILES = {"README.md": CARD, "base_config/config.json": b"{}", "adapter_model.safetensors": WEIGHTS}


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with Hub() as hub:
        yield hub


@pytest.fixture
def waits(monkeypatch):
    """The seconds that the client would have waited, one number for each time."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


@pytest.fixture
def api(hub):
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo(NAME)
    return api


@pytest.fixture
def push(api, tmp_path):
    def push(**changes):
        folder = tmp_path / "adapter"
        for path, content in {**FILES, **changes.pop("files", {})}.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return api.upload_folder(repo_id=NAME, folder_path=folder, **changes)

    return push


def head_of(hub, branch="main"):
    return hub.repositories[f"models/{NAME}"].branches[branch]


def permit_of(hub):
    """The address where the Hub wants the weights."""
    upload = [UploadInfo.from_bytes(WEIGHTS)]
    actions, _, _ = post_lfs_batch_info(upload, hub.token, "model", NAME, endpoint=hub.endpoint)
    return actions[0]["actions"]["upload"]["href"]


def test_what_was_pushed_comes_back_byte_for_byte_and_is_cached(hub, api, push, tmp_path):
    pushed = push(commit_message="One adapter")
    asked = [request.split("?")[0] for request in hub.requests]
    assert [request for request in asked if "/storage/" not in request] == [
        "POST /api/repos/create",
        "POST /api/validate-yaml",
        "POST /api/validate-yaml",
        f"POST /api/models/{NAME}/preupload/main",
        f"POST /{NAME}.git/info/lfs/objects/batch",
        f"POST /{NAME}.git/info/lfs/objects/verify",
        f"POST /api/models/{NAME}/commit/main",
    ]
    there = {"repo_id": NAME, "endpoint": hub.endpoint, "cache_dir": tmp_path / "cache"}
    for revision in ("main", pushed.oid, None):
        before = len(hub.requests)
        folder = snapshot_download(**there, revision=revision)
        assert {path: (tmp_path / folder / path).read_bytes() for path in FILES} == FILES
        downloads = [asked for asked in hub.requests[before:] if asked.startswith("GET") and "/resolve/" in asked]
        assert len(downloads) == (4 if revision == "main" else 0)  # .gitattributes came with the repository
    files = {file.path: file for file in api.list_repo_tree(NAME, recursive=True)}
    assert files["README.md"].blob_id == git_hash(CARD)
    assert (files["adapter_model.safetensors"].lfs.sha256, files["README.md"].lfs) == (DIGEST, None)
    info = api.model_info(NAME)
    assert (info.sha, info.card_data.base_model) == (pushed.oid, "meta-llama/Llama-2-7b-hf")
    commit = hub.repositories[f"models/{NAME}"].at("main")
    assert (commit.message, hub.repositories[f"models/{NAME}"].at(commit.parent).files.keys()) == (
        "One adapter",
        {".gitattributes"},
    )


def test_what_the_hub_has_is_not_sent_again(hub, push):
    first = push()
    assert push().oid == first.oid
    second = push(files={"README.md": CARD + b"More.\n"})
    assert second.oid == head_of(hub) != first.oid
    assert hub.received == {DIGEST: 1}
    assert sum(request.startswith("PUT") for request in hub.requests) == 1
    commits = hub.repositories[f"models/{NAME}"].commits
    assert (commits[first.oid].files["README.md"], commits[second.oid].parent) == (CARD, first.oid)


def test_bytes_that_are_not_those_announced_are_refused(hub, api):
    repository, address = hub.repositories[f"models/{NAME}"], permit_of(hub)
    for wrong in (b"x" + WEIGHTS[1:], WEIGHTS[:-1], b""):
        assert get_session().put(address, content=wrong).status_code == 400
    assert get_session().put(f"{hub.endpoint}/storage/0123", content=WEIGHTS).status_code == 403
    assert (repository.objects, hub.received) == ({}, {})
    pointer = {"path": "adapter_model.safetensors", "algo": "sha256", "oid": DIGEST, "size": len(WEIGHTS)}
    lines = f'{{"key": "header", "value": {{"summary": "s"}}}}\n{{"key": "lfsFile", "value": {pointer}}}'
    commit = {"url": f"{hub.endpoint}/api/models/{NAME}/commit/main", "content": lines.replace("'", '"')}
    commit["headers"] = {"Authorization": f"Bearer {hub.token}"}
    before = head_of(hub)
    assert (get_session().post(**commit).status_code, head_of(hub)) == (400, before)
    assert get_session().put(address, content=WEIGHTS).status_code == 200
    assert (get_session().post(**commit).status_code, hub.received) == (200, {DIGEST: 1})  # control
    assert repository.files["adapter_model.safetensors"] == WEIGHTS


def test_half_an_upload_stores_nothing(hub, api, push, waits):
    repository, before = hub.repositories[f"models/{NAME}"], head_of(hub)
    hub.fail("put", "half", times=None)
    with pytest.raises(RuntimeError, match="Error while uploading"):
        push()
    assert sum(request.startswith("PUT") for request in hub.requests) == 6
    hub.recover()
    header = b'{"key": "header", "value": {"summary": "The line after this one is lost"}}\n'
    for line, part in (
        (f"PUT {permit_of(hub).removeprefix(hub.endpoint)}", WEIGHTS[:1000]),
        (f"POST /api/models/{NAME}/commit/main", header),
    ):
        # What a client that is killed leaves behind.
        with socket.create_connection(("127.0.0.1", int(hub.endpoint.rsplit(":", 1)[1]))) as client:
            head = f"{line} HTTP/1.1\r\nAuthorization: Bearer {hub.token}\r\nContent-Length: {len(WEIGHTS)}\r\n\r\n"
            client.sendall(head.encode() + part)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
    assert (repository.objects, hub.received, head_of(hub)) == ({}, {}, before)


@pytest.mark.parametrize("status", [403, 409, 412, 429, 500, "drop-early", "drop"])
def test_a_commit_that_fails_leaves_the_branch_as_it_was_and_the_next_push_sends_no_weights(hub, api, push, status):
    before = head_of(hub)
    hub.fail("commit", status)
    with pytest.raises(Exception, match=str(status) if isinstance(status, int) else "disconnected|reset|[Bb]roken"):
        push()
    assert head_of(hub) == before
    assert push().oid == head_of(hub) != before
    assert hub.received == {DIGEST: 1}


def test_a_commit_whose_answer_is_lost_has_happened(hub, api, push):
    before = head_of(hub)
    hub.fail("commit", "lost")
    with pytest.raises(Exception, match="disconnected"):
        push()
    assert hub.repositories[f"models/{NAME}"].at(head_of(hub)).parent == before
    assert push().oid == head_of(hub)


def test_a_fault_comes_as_often_as_it_was_asked_for_and_says_when_to_come_back(hub, api, push, waits):
    hub.fail("preupload", 503, times=2)
    hub.fail("preupload", 429, headers={"Retry-After": "20"})
    push()
    assert waits == [1, 2, 21]
    hub.fail("revision", 404, code="RevisionNotFound", times=None)
    for _ in range(3):
        with pytest.raises(RevisionNotFoundError):
            api.model_info(NAME)
    hub.recover()
    assert api.model_info(NAME).sha == head_of(hub)
    with pytest.raises(ValueError, match="'comit' must be one of"):
        hub.fail("comit", 503)


def test_writing_needs_the_token_and_so_does_reading_what_is_private(hub, api):
    hub.repositories["models/someone/open"] = Repository({"README.md": CARD})
    api.create_repo("someone/private", private=True)
    nobody, stranger = (HfApi(endpoint=hub.endpoint, token=token) for token in (False, "hf_other"))
    assert nobody.model_info("someone/open").id == api.model_info("someone/open").id
    assert api.model_info("someone/private").private
    with pytest.raises(RepositoryNotFoundError):
        nobody.model_info("someone/private")
    for other in (nobody, stranger):
        with pytest.raises(HfHubHTTPError, match="401"):
            other.create_repo("someone/new")
        with pytest.raises(HfHubHTTPError, match="401"):
            other.create_branch("someone/open", branch="b")
        with pytest.raises(HfHubHTTPError, match="401"):
            other.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="someone/open")
    assert hub.repositories["models/someone/open"].branches.keys() == {"main"}
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(NAME)
    assert (api.create_repo(NAME, exist_ok=True).repo_id, api.whoami()["name"]) == (NAME, "someone")


def test_a_branch_moves_alone_and_only_from_the_commit_that_was_meant(hub, api, push):
    start = head_of(hub)
    api.create_branch(NAME, branch="v1/rc")
    pushed = push(revision="v1/rc", parent_commit=start)
    assert (head_of(hub, "v1/rc"), head_of(hub)) == (pushed.oid, start)
    with pytest.raises(HfHubHTTPError, match="412"):
        push(revision="v1/rc", parent_commit=start, files={"new": b"x"})
    with pytest.raises(RevisionNotFoundError):
        push(revision="v2")


@pytest.mark.parametrize("data", ["base_model: /data/llama", "tags: [a", "- a"])
def test_a_card_that_the_hub_would_not_take_is_refused(hub, push, data):
    with pytest.raises(ValueError, match=r"Invalid metadata in README.md"):
        push(files={"README.md": f"---\n{data}\n---\n".encode()})
    assert not any("/commit/" in request for request in hub.requests)


def test_what_was_sent_can_be_searched_and_the_token_of_the_request_itself_is_not_found(hub, push):
    push(files={"notes.json": b'{"folder": "/data/run"}', "training_args.bin": b"\0hf_secret\0"})
    assert hub.carrying(hub.token) == []
    assert {request.split("/")[-2] for request in hub.carrying("/data/run")} == {"preupload", "commit"}
    assert [request.split()[0] for request in hub.carrying("hf_secret")] == ["POST", "PUT"]
    assert hub.carrying("An adapter")[0] == "POST /api/validate-yaml"
