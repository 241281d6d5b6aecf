"""Publish an adapter, or a merged model, to the Hugging Face Hub: complete, in one commit, with what was measured."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import HFValidationError, build_hf_headers, get_session, hf_raise_for_status

from ..errors import explain, is_out_of_reach, is_transport_error
from ..evals.results import Results, file_name, tasks_in
from ..model.check import check_adapter, check_without_base
from ..model.record import FILE, Record
from .card import is_own, metadata, write_card
from .files import CARD, PUBLISHED, RESUMED_FROM, TAKEN, PushError, contents, files_in, stale
from .licenses import refuse_license

logger = logging.getLogger(__name__)

RETRY_AFTER = (2, 8)
"""Seconds before each further try of what the Hub's client does not try again itself."""
OUR_KEYS = {"license": "license", "base_model": "base_model_id", "datasets": "dataset_name"}
"""Field of a card's metadata -> what it is set with."""
PASSING = (408, 409, 412, 429, 500, 502, 503, 504)

T = TypeVar("T")


class _Busy(Exception):
    """Another operation on the repository is in progress (409)."""


def _will_pass(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING
    # An error page in place of JSON comes from something between us and the Hub.
    return is_transport_error(error) or isinstance(error, _Busy | json.JSONDecodeError)


def _explain(error: Exception, repo: str) -> str:
    """One line: what the Hub said, and the remedy."""
    if isinstance(error, HFValidationError):
        return f"repo {repo!r} is not a Hub id: write user/name"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo} cannot be published while HF_HUB_OFFLINE is set: unset it"
    if isinstance(error, ConnectionError):
        # From hf_xet, which has tried several times by itself.
        said = re.sub(r"(https?://[^/ ]+)\S*", r"\1", str(error))
        return f"the large files of {repo} do not get through to Xet storage ({said}): set HF_HUB_DISABLE_XET=1"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 409 * isinstance(error, _Busy)
    busy = f"{repo} is being changed by another operation ({status}): try again in a minute"
    said = {
        0: f"the connection to the Hub broke while publishing {repo} ({type(error).__name__}): check the network",
        400: f"the Hub refuses {repo} (400): {getattr(error, 'server_message', None) or error}",
        401: f"the Hub does not accept the token for {repo} (401): set HF_TOKEN, or log in, with one that may write",
        403: f"the token may not write to {repo} (403): use one with write access, or another --repo",
        404: f"{repo} is not on the Hub as far as the token sees (404): check the spelling and --revision",
        409: busy,
        412: busy,
        429: f"the Hub refuses more requests for now ({repo}, 429): wait some minutes",
    }.get(status, f"the Hub answers {status} for {repo}: try again later")
    if status in (400, 401, 403, 404):
        return said
    return f"{said}. Nothing half-finished is visible there, and what has arrived is not sent again"


def _explain_card(answer: str, repo: str) -> str:
    """One line for a card that the Hub's validation refuses: its words, and our key for what it names."""
    try:
        content = json.loads(answer)
        answer = " ".join(error["message"] for error in content.get("errors", ())) or content["error"]
    except (ValueError, TypeError, KeyError, AttributeError):
        answer = answer.removeprefix("Invalid metadata in README.md.")
    said = re.sub(r"\[.{200,}\]", "[...]", " ".join(answer.split()).strip("- "))
    key = next((key for field, key in OUR_KEYS.items() if f'"{field}"' in said), None)
    return f"the Hub refuses the card of {repo}: {said}: mend {key or 'the metadata at the head of its README.md'}"


def check_card(record: Record, repo: str) -> None:
    """Ask the Hub whether it takes a card with the metadata of `record`.

    Raises:
        PushError: with the Hub's words, and the key to change.
    """
    card = ModelCard(f"---\n{metadata(record).to_yaml()}\n---\n")
    _hub_call(card.validate, repo)


def _hub_call(call: Callable[[], T], repo: str) -> T:
    """`call`, tried again after refusals that pass; it must be safe to repeat."""
    for seconds in (*RETRY_AFTER, None):
        try:
            return call()
        except Exception as raised:
            # The client wraps what goes wrong with one file.
            wrapped = isinstance(raised, RuntimeError) and isinstance(raised.__cause__, Exception)
            error = raised.__cause__ if wrapped else raised
            if _will_pass(error) and seconds is not None:
                logger.info("the Hub did not take %s: trying again in %d s", repo, seconds)
                time.sleep(seconds)
            elif _will_pass(error) or isinstance(error, HfHubHTTPError | HFValidationError | ConnectionError):
                raise PushError(_explain(error, repo)) from raised
            elif type(error) is ValueError:
                raise PushError(_explain_card(str(error), repo)) from raised
            else:
                raise
    raise AssertionError("not reached")


def _create(api: HfApi, repo: str, private: bool | None) -> str:
    try:
        return api.create_repo(repo, private=private, exist_ok=True).repo_id
    except KeyError as error:
        # The client takes every 409 for "it exists", and misses that one's address.
        raise _Busy from error


def create_repository(repo: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Make sure that the repository exists and may be written to; returns its whole id, user/name."""
    if not (token or get_token()):
        raise PushError(f"you are not logged in, and {repo} is to be published: run `hf auth login`")
    api = HfApi(token=token)
    repo = _hub_call(lambda: _create(api, repo, private), repo)
    if private and not _hub_call(lambda: api.model_info(repo).private, repo):
        raise PushError(f"{repo} exists and is public: make it private on its page first, or choose another name")
    return repo


def _read_results(files: Iterable[str | Path], folder: Path, record: Record) -> dict[str, Results]:
    """Label -> results; at least one of them must have been measured on this adapter as it is now."""
    results: dict[str, Results] = {}
    for file in files:
        result = Results.read(file)
        label = result.settings.label or Path(file).stem
        if file_name(label) in map(file_name, results):
            raise PushError(f"two results have the label {label!r}, or one file for it: name one anew as LABEL=MODEL")
        results[label] = result
    if results and not any(result.cells and is_own(result, folder, record) for result in results.values()):
        raise PushError(
            f"none of the results was measured on the adapter in {folder} as it is now: run `cream-peft evaluate "
            f"--compare {folder}` again"
        )
    return results


def _with_base(folder: Path, record: Record, base_model_id: str | None, api: HfApi | None) -> Record:
    """The record with the base's Hub id, which must be given for a local folder's and is looked up with `api`."""
    if not record.base_is_local:
        if base_model_id and base_model_id != record.base_model:
            raise PushError(f"{folder} was trained on {record.base_model}: leave out --base_model_id")
        return record
    if not base_model_id:
        raise PushError(
            f"{folder} was trained on a local base, the folder {record.base_model!r}, which nobody else has: "
            "say its Hub id with base_model_id (--base_model_id)"
        )
    if api:
        _hub_call(lambda: api.model_info(base_model_id), base_model_id)
    return replace(record, base_model=base_model_id, base_is_local=False)


def _with_licence(record: Record, license: str | None, api: HfApi | None) -> Record:
    """The record with a licence: the one given, the recorded one, or with `api` that of the base's own card."""
    found = license or record.license
    refuse_license(found)
    if not found and api:
        try:
            data = api.model_info(record.base_model).card_data
            found = data.license if data and isinstance(data.license, str) else None
        except Exception as error:
            logger.debug("the licence of %s is not known: %s", record.base_model, error)
    if not found and api:
        logger.warning("the licence of the base is not known: say it with license (--license llama2, apache-2.0, ...)")
    return replace(record, license=found)


def _refuse_wrong(folder: Path, base_model: str | None, token: str | None) -> None:
    """Refuse what `cream-peft check` calls wrong, but for files that are not published anyway. A base that cannot be
    read, such as a gated one, is not compared, and that is said."""
    try:
        found = check_adapter(folder, base_model=base_model, token=token)
    except (ValueError, OSError) as error:
        if not is_out_of_reach(error):
            raise
        logger.warning("%s is not held against its base: %s", folder, explain(error))
        found = check_without_base(folder)
    wrong = [f"{one.item}: {one.found}" for one in found if one.verdict == "wrong" and one.item != "other files"]
    if wrong:
        raise PushError(f"{folder} is not published, it is not right: {'; '.join(wrong)}")


def _stage(folder: Path, staged: Path, record: Record, results: Mapping[str, Results]) -> None:
    """Make in `staged` what is published of `folder` but for the card, with a picture of each task."""
    for name in files_in(folder, TAKEN):
        target = staged / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".safetensors":
            target.symlink_to((folder / name).resolve())
        else:
            shutil.copyfile(folder / name, target)
    record.write(staged)
    record.name_base_in(staged)
    if results:
        from ..evals.plots import plot_results

        (staged / "results").mkdir(exist_ok=True)
        for label, result in results.items():
            result.write(staged / "results" / file_name(label))
        for task in tasks_in(results):
            plot_results(results, staged / "results" / f"{task}.png", task=task)


def push_folder(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    base_model: str | None = None,
    base_model_id: str | None = None,
    license: str | None = None,
    results: Iterable[str | Path] = (),
    message: str | None = None,
    checkpoint_in_repo: str | None = None,
    dry_run: str | Path | None = None,
) -> str:
    """Publish a trained adapter or a merged model in one commit, with a card made anew; returns the commit's URL.

    The commit also deletes what an earlier push sent and the folder no longer has; other files there stay.

    Args:
        folder: what `cream-peft train` or `cream-peft merge` left.
        repo: Hub id, user/name; created if it does not exist.
        revision: branch to publish to; created if it does not exist.
        base_model: folder or Hub id of the base to hold the adapter against, instead of the one that it names.
        base_model_id: the base's Hub id, for an adapter that was trained on a local folder.
        results: files that `cream-peft evaluate` wrote, for the card.
        checkpoint_in_repo: also publish everything that training resumes from, in this folder of the repository.
        dry_run: send nothing and return this new folder, with what would be published, weights as links. An account is
            not needed; a licence that is not recorded is not looked up.

    Raises:
        AdapterError: if the folder is not complete, or the base is not the one trained on.
        PushError: if the Hub refuses, or `cream-peft check` calls something wrong, or for a link out of the folder, or
            a file with a token or a path of this machine in it; nothing is published then.
    """
    folder, api, token = Path(folder), HfApi(token=token), token or get_token()
    hub = None if dry_run else api
    if "/" not in repo:
        raise PushError(f"repo {repo!r} is not a Hub id: write user/name")
    found = Record.read(folder, str(folder))
    if dry_run and Path(dry_run).exists():
        raise PushError(f"--dry_run {dry_run} exists: name a new folder")
    record = _with_base(folder, found, base_model_id, hub)
    _refuse_wrong(folder, base_model or (base_model_id if hub and found.base_is_local else None), token)
    read = _read_results(results, folder, record)
    record = _with_licence(record, license, hub)
    # In a copy: what is published is made here, and what was trained stays as it is.
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch) / "staged"
        _stage(folder, staged, record, read)

        def with_text_of(card: str) -> bytes:
            # Not searched again: what is new in it is public already.
            write_card(staged, record, repo, read, card, revision)
            return (staged / CARD).read_bytes()

        with_text_of("")
        files = contents(staged, files_in(staged, PUBLISHED), token, folder)
        if dry_run:
            return str(shutil.copytree(staged, dry_run, symlinks=True))
        if checkpoint_in_repo:
            whole = contents(folder, files_in(folder, RESUMED_FROM), token, folder)
            files |= {f"{checkpoint_in_repo}/{name}": content for name, content in whole.items()}
        repo = create_repository(repo, private=private, token=token)
        if revision:
            _hub_call(lambda: api.create_branch(repo, branch=revision, exist_ok=True), repo)
        message = message or f"{record.base_model}, {record.target_length} tokens, with cream-peft"
        return _hub_call(lambda: _commit(api, repo, files, with_text_of, checkpoint_in_repo, message, revision), repo)


def _commit(
    api: HfApi,
    repo: str,
    files: dict[str, bytes | str],
    with_text_of: Callable[[str], bytes],
    below: str | None,
    message: str,
    revision: str | None,
) -> str:
    """Make one commit on top of what the repository holds now: add `files` by name, the card with the text that a
    person wrote on the one there, and delete what is stale in the root and in the folder `below`. Its URL."""
    before = api.model_info(repo, revision=revision)
    there = {sibling.rfilename for sibling in before.siblings or []}
    if {"config.json", "adapter_config.json"} <= there | files.keys():
        raise PushError(f"{repo} holds the other kind, an adapter or a merged model: give each a repository of its own")

    def read(name: str) -> bytes:
        url = f"{api.endpoint}/{repo}/resolve/{before.sha}/{quote(name)}"
        response = get_session().get(url, headers=build_hf_headers(token=api.token))
        hf_raise_for_status(response)
        return response.content

    if CARD in there:
        files = files | {CARD: with_text_of(read(CARD).decode(errors="replace"))}
    old = stale(there, set(files), below, read)
    if old and FILE not in there:
        raise PushError(f"{repo} holds {old[0]}, which cream-peft did not publish: choose another, or delete it there")
    changes = [*(CommitOperationAdd(*file) for file in files.items()), *map(CommitOperationDelete, old)]
    done = api.create_commit(repo, changes, commit_message=message, revision=revision, parent_commit=before.sha)
    if old:
        logger.info("deleted on the Hub, left of an earlier push: %s", ", ".join(old))
    if done.oid == before.sha:
        logger.info("%s holds all of this already: nothing was changed", repo)
    return done.commit_url
