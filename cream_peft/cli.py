"""cream-peft: the command line. The commands themselves are in commands.py."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings

from .commands import COMMANDS, UserError

logger = logging.getLogger("cream_peft")

USAGE = """usage: cream-peft COMMAND [OPTIONS]

commands:
  train     train an adapter from a recipe: cream-peft train --config recipe.yaml [--any_field value]
  evaluate  measure models by length and depth: cream-peft evaluate --compare MODEL [MODEL ...]
  lm-eval   the field's own benchmarks: cream-peft lm-eval --adapter ID_OR_DIR --tasks longbench,ruler,hellaswag
  plan      peak memory of a recipe and the cards that it fits: cream-peft plan --config recipe.yaml
  plot      draw results: cream-peft plot RESULTS.json [...] --output picture.png
  bench     train a recipe on random weights: peak memory and speed here: cream-peft bench --config recipe.yaml
  push      publish an adapter on the Hub: cream-peft push --adapter DIR --repo user/name
  check     what an adapter is, and what a plain load makes of it: cream-peft check --adapter ID_OR_DIR
  merge     put an adapter into its 16-bit base: cream-peft merge --adapter ID_OR_DIR --output DIR
  chat      talk to an adapter, over a long document: cream-peft chat --adapter ID_OR_DIR --document FILE

Every command takes --help, and --debug for the whole traceback of an error. Without --config, train, plan and bench
take the recipe of the embedded tiny model.
"""
GO_ON = {
    "train": ", what was saved stays: --resume_from_checkpoint true goes on from the newest checkpoint",
    "evaluate": ", what was measured stays: the same command goes on where it stopped",
    "push": ": the same command goes on, and does not send again what has arrived",
}
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


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a library's log line is for the user. Of eleven lines of the Hub client's retries one is left."""
    message = record.getMessage()
    if message.startswith("Retrying in ") and "[Retry 1/" in message:
        record.msg, record.args = "the Hub does not deliver: trying again, for about half a minute", ()
        return True
    return not re.match(NOISE.get(record.name, "$"), message)


def _quiet() -> None:
    """Keep what the libraries say about themselves off the terminal; what concerns the user is logged by us."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    for name in NOISE:
        logging.getLogger(name).addFilter(_is_news)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    # Bars of what is done within two seconds only flicker. tqdm reads this when it is imported.
    os.environ.setdefault("TQDM_DELAY", "2")


def _close_progress_bars() -> None:
    """End the line of a bar that an error left open, so that the error has a line of its own."""
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 after an error of one line, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    _quiet()
    # On our own logger: with a handler on the root one, the libraries would say everything twice.
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        if arguments[0] not in COMMANDS:
            raise UserError(f"unknown command {arguments[0]!r}: use one of {', '.join(COMMANDS)}")
        COMMANDS[arguments[0]](arguments[1:])
    except KeyboardInterrupt:
        _close_progress_bars()
        print(f"interrupted{GO_ON.get(arguments[0], '')}", file=sys.stderr)
        return 130
    except Exception as error:
        _close_progress_bars()
        if debug:
            raise
        from .errors import explain

        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    finally:
        logger.removeHandler(handler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
