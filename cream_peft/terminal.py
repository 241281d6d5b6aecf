"""What a person reads: one style of table, libraries that keep quiet, progress bars that end before an error."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterable, Sequence

NOISE = {
    # A faster kernel that is looked for on the Hub; what is installed does.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # We say it ourselves.
    "huggingface_hub.hf_api": "No files have been modified|Removing .* file",
    # That the pad token is the end token, which is meant.
    "transformers.trainer_utils": "The tokenizer has new PAD/BOS/EOS tokens",
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


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], indent: int = 0) -> str:
    """Lines of one table: a line of headings, a rule, a line a row. Columns of numbers are set to the right; the last
    column of text wraps at the width of the terminal, and never where the output goes to a file."""
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
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 1000
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
    # Bars of what is done within two seconds only flicker. tqdm reads this when it is imported.
    os.environ.setdefault("TQDM_DELAY", "2")


def close_progress_bars() -> None:
    """End the line of a bar that an error left open, so that the error has a line of its own."""
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()
