"""Publish an adapter, or a merged model, to the Hugging Face Hub: complete, in one commit, with what was measured."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import HFValidationError

from ..evals.results import Results, file_name
from ..evals.table import tasks_in
from ..model.record import read_description
from .card import is_own, write_card

logger = logging.getLogger(__name__)

PUBLISHED = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "base_config/config.json",
    "cream.json",
    "README.md",
    "tokenizer*",  # tokenizer.model, where there is one, included
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.jinja",
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "results/*.json",
    "results/*.png",
)
"""What goes to the Hub's root. An allow-list: training_args.bin holds the token, logs hold host names."""

NEVER_PUBLISHED = ("training_args.bin", "README.md")
"""Left out of a whole checkpoint; README.md speaks of the root."""

RETRY_AFTER = (2, 8)
"""Seconds before each further try of what the Hub's client does not try again itself."""
PASSING = (408, 409, 412, 429, 500, 502, 503, 504)

T = TypeVar("T")


class PushError(ValueError):
    """What could not be published, why, and what to do."""


class _Busy(Exception):
    """Another operation on the repository is in progress."""


def _will_pass(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING
    # By name: some versions of the Hub's client use httpx, some httpx2.
    # An error page in place of JSON comes from something between us and the Hub.
    is_lost = any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
    return is_lost or isinstance(error, _Busy | json.JSONDecodeError)


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
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 409 if isinstance(error, _Busy) else 0
    permanent = {
        400: f"the Hub refuses {repo} (400): {getattr(error, 'server_message', None) or error}",
        401: f"the Hub does not accept the token for {repo} (401): set HF_TOKEN, or log in, with one that may write",
        403: f"the token may not write to {repo} (403): use one with write access, or another --repo",
        404: f"{repo} is not on the Hub as far as the token sees (404): check the spelling and --revision",
    }
    if status in permanent:
        return permanent[status]
    passing = {
        0: f"the connection to the Hub broke while publishing {repo} ({type(error).__name__}): check the network",
        409: f"{repo} is being changed by another operation (409): try again in a minute",
        412: f"{repo} is being changed by another operation (412): try again in a minute",
        429: f"the Hub refuses more requests for now ({repo}, 429): wait some minutes",
    }
    said = passing.get(status, f"the Hub answers {status} for {repo}: try again later")
    return f"{said}. Nothing half-finished is visible there, and what has arrived is not sent again"


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


def _read_results(files: Iterable[str | Path], folder: Path, description: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Label -> results; at least one of them must have been measured on this adapter as it is now."""
    results: dict[str, dict[str, Any]] = {}
    for file in files:
        if not Path(file).is_file():
            raise PushError(f"no such results file: {file}; `cream-peft evaluate` writes them")
        result = Results.read(file).asdict()
        label = str(result["settings"].get("label") or Path(file).stem)
        if label in results:
            raise PushError(f"two results have the label {label!r}: measure one of them again as --compare LABEL=MODEL")
        results[label] = result
    if results and not any(result["cells"] and is_own(result, folder, description) for result in results.values()):
        raise PushError(
            f"none of the results was measured on the adapter in {folder} as it is now: run `cream-peft evaluate "
            f"--compare {folder}` again"
        )
    return results


def _stage_results(results: dict[str, dict[str, Any]], folder: Path) -> None:
    """Write results and a picture a task to <folder>/results."""
    from ..evals.plots import plot_results

    (folder / "results").mkdir()
    for label, result in results.items():
        (folder / "results" / file_name(label)).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for task in tasks_in(results):
        plot_results(results, folder / "results" / f"{task}.png", task=task)


def _name_base(folder: Path, description: dict[str, Any], base_model_id: str | None, api: HfApi) -> dict[str, Any]:
    """The description with the base's Hub id in it; for an adapter of a local folder it must be given."""
    if not description.get("base_is_local"):
        if base_model_id and base_model_id != description["base_model"]:
            raise PushError(f"{folder} was trained on {description['base_model']}: leave out --base_model_id")
        return description
    if not base_model_id:
        raise PushError(
            f"{folder} was trained on a local base, the folder {description['base_model']!r}, which nobody else has: "
            "say its Hub id with base_model_id (--base_model_id)"
        )
    _hub_call(lambda: api.model_info(base_model_id), base_model_id)
    return description | {"base_model": base_model_id, "base_is_local": False}


def _put(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _published_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if any(fnmatch(path.relative_to(folder).as_posix(), p) for p in PUBLISHED)]


def _additions(folder: Path, files: list[Path], below: str, secrets: list[str]) -> list[CommitOperationAdd]:
    """The files as a commit takes them, small ones searched for what must not become public."""
    additions = []
    for path in files:
        content: bytes | str = str(path)
        if path.suffix not in (".safetensors", ".pt", ".bin"):
            content = path.read_bytes()
            if path.name == "trainer_state.json":
                content = _without_paths(content)
            # A vocabulary may well hold "/root/".
            private = secrets[:1] if path.name.startswith(("tokenizer", "vocab", "merges")) else secrets
            if any(secret and secret.encode() in content for secret in private):
                raise PushError(f"{path.name} holds your token or a path of this machine: remove it, then push again")
        additions.append(CommitOperationAdd(below + path.relative_to(folder).as_posix(), content))
    return additions


def _without_paths(trainer_state: bytes) -> bytes:
    state = json.loads(trainer_state)
    if state.get("best_model_checkpoint"):
        state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
    return json.dumps(state, indent=2).encode()


def _licence_of(base: str, api: HfApi) -> str | None:
    """The base's licence as its own card says, None where that cannot be read."""
    try:
        data = api.model_info(base).card_data
    except Exception as error:
        logger.debug("the licence of %s is not known: %s", base, error)
        return None
    return data.license if data and isinstance(data.license, str) else None


def push_folder(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    base_model_id: str | None = None,
    license: str | None = None,
    results: Iterable[str | Path] = (),
    message: str | None = None,
    checkpoint_in_repo: str | None = None,
) -> str:
    """Publish a trained adapter or a merged model in one commit, with a card made anew; returns the commit's URL.

    Args:
        folder: what `cream-peft train` or `cream-peft merge` left.
        repo: Hub id, user/name; created if it does not exist.
        revision: branch to publish to; created if it does not exist.
        base_model_id: the base's Hub id, for an adapter that was trained on a local folder.
        results: files that `cream-peft evaluate` wrote, for the card.
        checkpoint_in_repo: also publish everything that training goes on from, in this folder of the repository.

    Raises:
        AdapterError: if the folder is not complete.
        PushError: if the Hub refuses; nothing is published then.
    """
    folder, api = Path(folder), HfApi(token=token)
    if "/" not in repo:
        raise PushError(f"repo {repo!r} is not a Hub id: write user/name")
    description = _name_base(folder, read_description(folder, str(folder)), base_model_id, api)
    read = _read_results(results, folder, description)
    description["license"] = license or description.get("license") or _licence_of(description["base_model"], api)
    if not description["license"]:
        logger.warning("the licence of the base is not known: say it with license (--license llama2, apache-2.0, ...)")
    # In a copy: what is published is made here, and what was trained stays as it is.
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch)
        for path in _published_files(folder):
            target = staged / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            if path.suffix == ".safetensors":
                target.symlink_to(path.resolve())
            else:
                shutil.copy(path, target)
        _put(staged / "cream.json", **description)
        if (staged / "adapter_config.json").exists():
            _put(staged / "adapter_config.json", base_model_name_or_path=description["base_model"])
        if read:
            _stage_results(read, staged)
        write_card(staged, description, repo, read)
        secrets = [token or get_token() or "", str(folder.resolve()), str(Path.home()) + "/"]
        additions = _additions(staged, _published_files(staged), "", secrets)
        if checkpoint_in_repo:
            files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in NEVER_PUBLISHED]
            additions += _additions(folder, files, f"{checkpoint_in_repo}/", secrets)
        repo = create_repository(repo, private=private, token=token)
        return _commit(api, repo, additions, message or _message(description), revision)


def _message(description: dict[str, Any]) -> str:
    return f"{description['base_model']} to {description['target_length']} tokens with cream-peft"


def _commit(api: HfApi, repo: str, additions: list[CommitOperationAdd], message: str, revision: str | None) -> str:
    if revision:
        _hub_call(lambda: api.create_branch(repo, branch=revision, exist_ok=True), repo)
    before = _hub_call(lambda: api.model_info(repo, revision=revision), repo)
    there = {sibling.rfilename for sibling in before.siblings or []}
    mine = {addition.path_in_repo for addition in additions}
    if ("adapter_config.json" in mine and "config.json" in there) or (
        "config.json" in mine and "adapter_config.json" in there
    ):
        raise PushError(f"{repo} holds the other kind, an adapter or a merged model: give each a repository of its own")

    def commit() -> str:
        # Made anew for each try: the client refuses operations that it has sent before.
        fresh = [CommitOperationAdd(addition.path_in_repo, addition.path_or_fileobj) for addition in additions]
        done = api.create_commit(repo, fresh, commit_message=message, revision=revision)
        if done.oid == before.sha:
            logger.info("%s holds all of this already: nothing was changed", repo)
        return done.commit_url

    return _hub_call(commit, repo)
