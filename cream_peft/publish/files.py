"""Which files of a folder are published, and which of those on the Hub are ours to delete there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from ..evals.results import Results, tasks_in
from ..model.record import MERGED_FILES, REQUIRED_FILES, TOKENIZER_FILES
from ..model.secrets import find_secret, without_secrets
from .card import CARD

MODEL_FILES = ["generation_config.json", "model.safetensors", "model.safetensors.index.json"]
STATE_FILES = ["optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "trainer_state.json", "latest"]
FOLDERS = ("base_config", "additional_chat_templates")

_NAMES = "|".join(map(re.escape, {*REQUIRED_FILES, *MERGED_FILES, *TOKENIZER_FILES, *MODEL_FILES}))
_MODEL = rf"{_NAMES}|model-\d{{5}}-of-\d{{5}}\.safetensors|additional_chat_templates/[\w.-]+\.jinja"
_STATE = "|".join(map(re.escape, STATE_FILES))
TAKEN = re.compile(rf"{_MODEL}|{re.escape(CARD)}")
"""What is taken of the folder, by its place in it. training_args.bin would hold the token, logs host names, and what
lies in results/ may be anything."""
PUBLISHED = re.compile(rf"{TAKEN.pattern}|results/[\w.-]+\.(json|png)")
"""What goes to the Hub's root: that, and the results that were named."""
RESUMED_FROM = re.compile(
    rf"{_MODEL}|{_STATE}|rng_state(_\d+)?\.pth|zero_to_fp32\.py|global_step\d+/[\w.-]+\.pt|"
    r"pytorch_model_fsdp\.bin|(optimizer|pytorch_model_fsdp)_\d+/[\w.-]+"
)
"""What of a checkpoint goes to the Hub; the last ones are DeepSpeed's and FSDP's."""
UNREAD = (".safetensors", ".pt", ".pth", ".bin", ".distcp", ".png")
"""Not text: large, or a picture."""


class PushError(ValueError):
    """What could not be published, why, and what to do."""


def _refuse_link(path: Path, folder: Path) -> None:
    """Refuse a link out of the folder. Those of the Hub's cache are its layout; weights may lie on another disk, they
    are known to be weights by now."""
    home, target = folder.resolve(), path.resolve()
    homes = (home, home.parent.parent / "blobs") if home.parent.name == "snapshots" else (home,)
    is_weights = path.suffix == ".safetensors"
    if (path.is_dir() and path.is_symlink()) or not (is_weights or any(map(target.is_relative_to, homes))):
        name = path.relative_to(folder)
        raise PushError(f"{name} of {folder} is a link to {target}: put the file or folder itself in its place")


def files_in(folder: Path, kinds: re.Pattern[str]) -> list[str]:
    """The regular files of some kinds, by their place in the folder.

    Raises:
        PushError: for one of them, or a folder of them, that is a link to somewhere else.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if kinds.fullmatch(name) or name in FOLDERS:
            _refuse_link(path, folder)
        if kinds.fullmatch(name) and path.is_file():
            found.append(name)
    return found


def contents(folder: Path, names: Iterable[str], token: str | None, origin: Path) -> dict[str, bytes | str]:
    """Name -> content, or the path of a file that is not text. Text, and the head of weights, is searched for tokens
    and for paths of this machine; `origin` is the folder that the user named.

    Raises:
        PushError: naming the file that holds one.
    """
    found: dict[str, bytes | str] = {}
    for name in names:
        path = folder / name
        content = path.read_bytes() if path.suffix not in UNREAD else b""
        if path.name == "trainer_state.json":
            content = json.dumps(without_secrets(json.loads(content)), indent=2).encode()
        found[name] = content if path.suffix not in UNREAD else str(path)
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                content = file.read(int.from_bytes(file.read(8), "little"))
        secret = find_secret(path.name, content, token, origin)
        if secret:
            raise PushError(f"{name} of {origin} holds {secret}: remove it, then push again")
    return found


def stale(there: set[str], sent: set[str], below: str | None, read: Callable[[str], bytes]) -> list[str]:
    """The files on the Hub that an earlier push sent and that this one has not; `read` gets one of them from there."""
    old = {name for name in there - sent if PUBLISHED.fullmatch(name) or (below and name.startswith(f"{below}/"))}
    drawn = {name for name in old if name.startswith("results/")}
    # Somebody else's files may lie in results/, too.
    own = {name: result for name in drawn if name.endswith(".json") and (result := _as_results(read(name)))}
    pictures = {f"results/{task}.png" for task in tasks_in(own)}
    return sorted(old - drawn | own.keys() | drawn & pictures)


def _as_results(content: bytes) -> Results | None:
    try:
        return Results.parse(json.loads(content))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
