"""One line for every error a user can meet: what it is about, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

NETWORK_ERRORS = ("ConnectError", "ConnectionError", "ConnectTimeout", "ReadTimeout", "RemoteProtocolError", "ReadError")
REPOSITORY = re.compile(r"/(?:api/)?(?:(models|datasets)/)?([\w.-]+/[\w.-]+?)(?:/(?:resolve|tree|revision|raw)/|\?|$)")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _repository(error: BaseException) -> str:
    url = str(getattr(getattr(error, "response", None), "url", ""))
    found = REPOSITORY.search(url.removeprefix(constants.ENDPOINT))
    return found.group(2) if found else "the repository"


def _explain_hub(error: BaseException) -> str | None:
    """The line for an error of the Hub client, or None if it is none of its errors."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    repo = _repository(error)
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{repo}"
        if status == 401:
            return f"{repo} is gated and you are not logged in: accept its licence at {page}, then run `hf auth login`"
        return f"{repo} is gated and your account has no access yet: accept its licence at {page} and try again"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{repo} does not exist on the Hub, or is private and your token does not open it: check the spelling, "
            "or run `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no such revision: check model_revision or dataset_revision"
    if isinstance(error, HfHubHTTPError) and status in (401, 403):
        return f"the Hub refused access to {repo} ({status}): run `hf auth login` with a token that may read it"
    if isinstance(error, HfHubHTTPError) and status is not None:
        return f"the Hub answered {status} for {repo}: try again in a minute"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set and the files are not in the cache: unset it, or give a local folder instead"
    if type(error).__name__ in NETWORK_ERRORS or isinstance(error, LocalEntryNotFoundError):
        return (
            f"the Hub at {constants.ENDPOINT} cannot be reached and the files are not in the cache: check the network, "
            "or give a local folder instead"
        )
    return None


def explain(error: BaseException) -> str:
    """One line for `error`: the thing it is about and the remedy."""
    for link in _chain(error):
        line = _explain_hub(link)
        if line:
            return line
        if isinstance(link, torch.OutOfMemoryError):
            return (
                "the GPU ran out of memory: lower context_length or per_device_train_batch_size, or set "
                "gradient_checkpointing=true; `cream-peft plan` shows what takes how much"
            )
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"
