"""One line for every error a user can meet: what it is about, and what to do."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

ABOUT = "This is about "
NO_ACCESS = (
    "{thing} is gated and your account or token may not read it: accept its terms at {page}, give a fine-grained token "
    "access to gated repositories, and try again"
)
NOT_LOGGED_IN = "{thing} is gated and you are not logged in: accept its terms at {page}, then run `hf auth login`"
NOT_FOUND = (
    "{thing} is neither on this disk nor on the Hub, as far as you may read it: check the spelling, or run `hf auth "
    "login` if it is private"
)
NO_CONFIG = "{thing} holds no config.json that says model_type: give a Hub id or a folder of a whole model"
OUT_OF_MEMORY = "out of memory"
"""How a message or a note of ours begins that says more; `explain` prints it."""
WHAT_TAKES_LESS = (
    f"{OUT_OF_MEMORY}: in training set memory=low, or lower context_length or per_device_train_batch_size; in "
    "evaluation lower --lengths; `cream-peft plan` shows what takes how much"
)
REWORDED = (
    (r"Dataset .* is a gated dataset.*authenticated.*", NOT_LOGGED_IN),
    (r"Dataset .* is a gated dataset.*", NO_ACCESS),
    (r"Dataset .* doesn't exist on the Hub.*", NOT_FOUND),
    (r"Couldn't find any data file.*", NOT_FOUND),
    (r".*doesn't contain any data files.*", "{thing} holds no data files: .jsonl, .json, .parquet or .txt"),
    (
        r".*Config name is missing.*available configs: (?P<configs>\[.*?\]).*",
        "{thing} has several configurations: set dataset_config to one of {configs}",
    ),
    (
        r"BuilderConfig '?(?P<config>.*?)'? not found\. Available: (?P<configs>\[.*\]).*",
        "{thing} has no configuration {config!r}: set dataset_config to one of {configs}",
    ),
    (r".*Repo id must .*", "there is no folder {thing}, and a Hub id looks like owner/name"),
    (r"Unrecognized model in .*model_type.*", NO_CONFIG),
    (
        r".*(does not appear to have|no) (a )?files? named .*(model\.safetensors|pytorch_model).*",
        "{thing} holds no weights (model.safetensors): give a Hub id or a folder of a whole model",
    ),
    (
        r"Target modules \{?(?P<modules>.*?)\}? not found in the base model.*",
        "lora_target_modules: the model has no {modules}; use all-linear, or names of its linear layers such as q_proj",
    ),
    (
        r".*(index out of range in self|device-side assert).*",
        "an index lies outside its table, most likely a token id outside the vocabulary: make input_ids with the "
        "model's own tokenizer",
    ),
    (
        r".*has model type `(?P<kind>.*?)` but Transformers does not recognize.*",
        "{thing} has model_type {kind}, which this transformers does not know: use another base, or upgrade it",
    ),
    (r".*FlashAttention.*", "{text} Leave attn_implementation out to use what this machine has"),
)
"""What the libraries say, and what we say where theirs names no thing or no remedy."""


@contextmanager
def about(thing: str) -> Generator[None]:
    """Note on any error inside which model or data set was being opened; the libraries often do not say."""
    try:
        yield
    except Exception as error:
        if not any(note.startswith(ABOUT) for note in getattr(error, "__notes__", ())):
            error.add_note(ABOUT + thing)
        raise


def missing_folder(name: str) -> str | None:
    """Why `name`, as a user types it, can only be a folder that is not there; None if it is there, or a Hub id."""
    if Path(name).exists():
        return None
    if name.startswith("~"):
        return "no such folder; ~ is not read here, write the whole path"
    is_path = Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1
    first = name.split("/")[0]
    if is_path or ("/" in name and Path(first).is_dir()):
        return "no such folder" if is_path else f"no such folder (there is a folder {first} here, so this is no Hub id)"
    return None


def _chain(error: BaseException) -> list[BaseException]:
    """The error, what it was raised from, what that was raised from, ..."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        # Even after `from None`: datasets hides the Hub's answer that way.
        following = following.__cause__ or following.__context__
    return chain


def _thing(chain: list[BaseException]) -> str | None:
    notes = [note for link in chain for note in getattr(link, "__notes__", ()) if note.startswith(ABOUT)]
    names = [str(name) for link in chain if (name := getattr(link, "repo_id", None))]
    return notes[0].removeprefix(ABOUT) if notes else names[0] if names else None


def _page(thing: str) -> str:
    kind = "datasets/" if thing.startswith("data set ") else ""
    return f"{constants.ENDPOINT}/{kind}{thing.split()[-1]}"


def _explain_answer(error: HfHubHTTPError, thing: str) -> str:
    """The line for an answer of the Hub that is not the file asked for."""
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return (NOT_LOGGED_IN if status == 401 else NO_ACCESS).format(thing=thing, page=_page(thing))
    if isinstance(error, RepositoryNotFoundError):
        return NOT_FOUND.format(thing=thing)
    if isinstance(error, RevisionNotFoundError):
        key = "dataset_revision" if thing.startswith("data set ") else "the revision"
        return f"{thing} has no such revision: {key} must be a branch, tag or commit listed at {_page(thing)}"
    if status in (401, 403):
        remedy = "set HF_TOKEN, or run `hf auth login`, with a token that may read it"
        return f"the Hub refuses access to {thing} ({status}): {remedy}"
    if status == 429:
        return f"the Hub refuses more requests for now ({thing}, 429): wait some minutes, or run `hf auth login`"
    return f"the Hub answers {status} for {thing}: try again later, or give a local folder"


def _explain_hub(chain: list[BaseException], thing: str) -> str | None:
    # The answer says more than the "not in the cache" that is raised from it, so it is looked for first.
    for link in chain:
        if isinstance(link, HfHubHTTPError) and not isinstance(link, EntryNotFoundError):
            return _explain_answer(link, thing)
    lost = (LocalEntryNotFoundError, OfflineModeIsEnabled)
    # Of datasets, and of requests. A broken pipe, which is one too, has nothing to do with the Hub.
    lost_by_name = [link for link in chain if type(link).__name__ == "ConnectionError"]
    if lost_by_name or any(isinstance(link, lost) or is_transport_error(link) for link in chain):
        if constants.HF_HUB_OFFLINE:
            return f"{thing} is not in the cache and HF_HUB_OFFLINE is set: unset it, or give a local folder"
        return (
            f"{thing} is not in the cache and the Hub at {constants.ENDPOINT} cannot be reached: check the network, or "
            "give a local folder"
        )
    return None


def is_transport_error(error: BaseException) -> bool:
    """Whether a request of the Hub's client did not get through. By name: some versions use httpx, some httpx2."""
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def is_out_of_reach(error: BaseException) -> bool:
    """Whether `error` comes of something on the Hub that this user or machine cannot read."""
    return _explain_hub(_chain(error), "it") is not None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` comes of too little memory; not every library has an exception for that."""
    return any(
        isinstance(link, torch.OutOfMemoryError | MemoryError)
        or re.search("can't allocate memory|out of memory", str(link))
        for link in _chain(error)
    )


def explain(error: BaseException) -> str:
    """One line for `error`: the thing it is about and the remedy."""
    if isinstance(error, ValueError) and type(error).__module__.startswith("cream_peft."):
        # Ours; what it was raised from says less.
        return " ".join(str(error).split())
    chain = _chain(error)
    thing = _thing(chain)
    line = _explain_hub(chain, thing or "the repository")
    if line:
        return line
    if is_out_of_memory(error):
        said = [text for link in chain for text in (str(link), *getattr(link, "__notes__", ()))]
        return next((text for text in said if text.startswith(OUT_OF_MEMORY)), WHAT_TAKES_LESS)
    text = " ".join(str(error).split())
    for pattern, line in REWORDED:
        found = re.fullmatch(pattern, text)
        if found:
            thing = thing or "the model or data set"
            return line.format(thing=thing, page=_page(thing), text=text, **found.groupdict())
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if text and (isinstance(error, ValueError | OSError | ImportError) or "pip install" in text):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"
