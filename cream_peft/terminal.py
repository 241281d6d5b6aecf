"""What a person types and reads: options, one style of table, libraries that keep quiet, progress bars that end."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

NOISE = {
    # We say it ourselves.
    "huggingface_hub.hf_api": "No files have been modified|Removing .* file",
    # That the pad token is the end token, which is meant; that a resumed run has other save_steps, which it has.
    "transformers.trainer_utils": "The tokenizer has new PAD/BOS/EOS tokens|Warning: The following arguments do not",
    # Of documents that are cut, and of prompts as long as the model was extended for.
    "transformers.tokenization_utils_base": "Token indices sequence length is longer",
    # Both true of a model that was loaded first, as it must be.
    "lm_eval.models.huggingface": "`pretrained` model kwarg|Passed an already-init",
    "lm_eval.api.task": ".*Custom kwargs can be passed|.*is defined, but",
    # The error that follows says it.
    "datasets.packaged_modules.json.json": "Failed to load JSON",
    "huggingface_hub.repocard": "Repo card metadata block was not found",
    "huggingface_hub.utils._http": "HTTP Error|'.*' thrown while|Retrying in ",
}
"""Logger -> pattern of the lines that say nothing to a user."""
NUMBER = r"[-+~]?[\d,.]+( ?(%|s|GiB|±.*))?|-|"

PATHS = ("DIR", "FILE", "ID_OR_DIR", "MODEL", "PATH", "PATH_OR_ID", "RESULTS.json")
"""Metavars of options that take a path."""


def expanded(text: str) -> str:
    """A path with `~` expanded, at its beginning or after LABEL=; bash leaves it in quotes and in --output=~/x."""
    label, sign, rest = text.rpartition("=")
    return label + sign + os.path.expanduser(rest)


def file_to_write(text: str) -> str:
    """The path of a file that can be written, tried in the first process; nothing is left there."""
    path = Path(expanded(text))
    if is_first_process():
        try:
            _try_to_write(path)
        except OSError as error:
            raise argparse.ArgumentTypeError(
                f"{path} cannot be written ({error.strerror}): give a file in a folder of yours"
            ) from error
    return str(path)


def _try_to_write(path: Path) -> None:
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() or path.is_dir():
            path.open("ab").close()
        # Nor are pipes and devices opened: that may wait for a reader.
        elif not path.exists():
            tempfile.TemporaryFile(dir=path.parent).close()
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


COMMON: dict[str, dict[str, Any]] = {
    "adapter": {"required": True, "metavar": "ID_OR_DIR", "help": "Hub id or folder of the adapter"},
    "base_model": {
        "metavar": "ID_OR_DIR",
        "help": "folder or Hub id to take the base from, instead of the one that the adapter names",
    },
    "config": {"metavar": "FILE", "help": "recipe, such as those under recipes/ (default: the embedded one)"},
    "json": {"metavar": "FILE", "type": file_to_write, "help": "write the same as JSON"},
    "no_4bit": {"action": "store_true", "help": "load the base unquantized"},
    "revision": {"help": "branch, tag or commit of the adapter's repository"},
}
"""Options that several commands have."""


class UserError(ValueError):
    """Something the user can mend; its message is the one line that is printed."""


class CommandParser(argparse.ArgumentParser):
    """The options of a command, a function NAME_command whose docstring is the help, with those of COMMON named."""

    def __init__(self, command: Any, *common: str, **settings: Any) -> None:
        name = command.__name__.removesuffix("_command").replace("_", "-")
        super().__init__(prog=f"cream-peft {name}", description=command.__doc__, allow_abbrev=False, **settings)
        for option in common:
            self.add_argument(f"--{option}", **COMMON[option])

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """Add an argument; one that takes a path expands `~`."""
        if settings.get("metavar") in PATHS:
            settings.setdefault("type", expanded)
        return super().add_argument(*names, **settings)

    def option(self, name: str, help: str, *others: str, **settings: Any) -> None:
        """Add --name, also as --other, its default told in the help."""
        if settings.get("default"):
            shown = settings["default"] if settings.get("nargs") is None else " ".join(settings["default"])
            help = f"{help} (default: {shown})"
        if name.endswith("_dir"):
            settings.setdefault("metavar", "DIR")
        names = dict.fromkeys(f"--{one}" for one in (name, name.replace("-", "_"), *others))
        self.add_argument(*names, help=help, **settings)

    def error(self, message: str):
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The guess that goes into an error about a word that is not known; nothing where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def write_json(path: str | None, content: Any) -> None:
    """Write what --json asks for, in the first process, and say so."""
    if path and is_first_process():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"The same as JSON: {path}")


def is_first_process() -> bool:
    """Whether this is the one process, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], indent: int = 0) -> str:
    """Lines of one table: a line of headings, a rule, a line a row. Columns of numbers are set to the right; the last
    column wraps at the width of the terminal, in a file at 120 characters, there never if the columns are many."""
    # A tenth of a second, which --help need not take.
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table

    cells = [[str(cell) for cell in row] for row in rows]
    drawn = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="")
    for index, name in enumerate(columns):
        numbers = bool(cells) and all(re.fullmatch(NUMBER, row[index]) for row in cells)
        is_last = index == len(columns) - 1
        drawn.add_column(name, justify="right" if numbers else "left", no_wrap=not is_last, overflow="fold")
    for row in cells:
        drawn.add_row(*row)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 120 if len(columns) <= 3 else 1000
    console = Console(width=width, color_system=None, markup=False, highlight=False, emoji=False)
    with console.capture() as captured:
        console.print(Padding(drawn, (0, 0, 0, indent), expand=False))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a library's log line is for the user. Of eleven lines of the Hub client's retries one is left."""
    message = record.getMessage()
    if message.startswith("Retrying in ") and "[Retry 1/" in message:
        record.msg, record.args = "the Hub does not deliver: trying again, for about half a minute", ()
        return True
    return not re.match(NOISE.get(record.name, "$"), message)


def quiet_libraries() -> None:
    """Keep what the libraries say about themselves off the terminal; what concerns the user is logged by us."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    for name in NOISE:
        logging.getLogger(name).addFilter(_is_news)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    # Bars of what is done within two seconds only flicker, and in a file they are one long line. tqdm reads these when
    # it is imported.
    os.environ.setdefault("TQDM_DELAY", "2")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def close_progress_bars() -> None:
    """End the line of a bar that an error left open, so that the error has a line of its own."""
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()


def typed_lines() -> Iterator[str]:
    """What the user types, or what comes through a pipe, until it ends."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            # Meant for the answer that has just ended, perhaps; the document took long to read.
            if not sys.stdin.isatty():
                raise
            print("\n/exit or Ctrl-D leaves")
