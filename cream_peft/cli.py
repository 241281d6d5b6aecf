"""cream-peft: train, evaluate, plan and plot from the command line."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

logger = logging.getLogger("cream_peft")

USAGE = """usage: cream-peft COMMAND [OPTIONS]

commands:
  train     train an adapter from a recipe: cream-peft train --config recipe.yaml [--any_field value]
  evaluate  measure models by length and depth: cream-peft evaluate --compare MODEL [MODEL ...]
  plan      peak memory of a recipe and the cards that it fits: cream-peft plan --config recipe.yaml
  plot      draw results: cream-peft plot RESULTS.json [...] --output picture.png

Every command takes --help, and --debug for the whole traceback of an error. Without --config, train and plan take the
recipe of the embedded tiny model.
"""
GO_ON = {
    "train": ": --resume_from_checkpoint true goes on from the newest checkpoint",
    "evaluate": ": the same command goes on where it stopped",
}
NOISE = {
    # A faster kernel that is looked for on the Hub; what is installed does.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # That the pad token is the end token, which is meant.
    "transformers.trainer_utils": "The tokenizer has new PAD/BOS/EOS tokens",
    # The error that follows says it.
    "datasets.packaged_modules.json.json": "Failed to load JSON",
    "huggingface_hub.repocard": "Repo card metadata block was not found",
    "huggingface_hub.utils._http": "HTTP Error|'.*' thrown while|Retrying in ",
}
"""Logger -> pattern of the lines that say nothing to a user."""

PLOTTED = ("length", "depth", "value", "samples")


class UserError(ValueError):
    """Something the user can mend; its message is the one line that is printed."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")


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


def _write_json(path: str | None, content: Any) -> None:
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"The same as JSON: {path}")


def train(arguments: list[str]) -> None:
    """Train an adapter from a recipe and leave it complete in output_dir."""
    parser = _Parser(prog="cream-peft train", add_help=False, allow_abbrev=False)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--help", "-h", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    if options.help:
        from .recipe import DATACLASSES, TrlParser

        TrlParser(DATACLASSES, prog="cream-peft train").print_help()
        return
    from .recipe import parse_recipe
    from .train import run_recipe

    summary = run_recipe(parse_recipe(rest))
    print(f"\n{'loss':<16}{summary['loss']:.3f} (mean over the run, {summary['steps']} steps in all)")
    print(f"{'time':<16}{summary['seconds']:.0f} s")
    print(f"{'redrawn':<16}{summary['redrawn']} draws held no label, {summary['unlabelled']} examples none at all")
    if summary["peak_gib"] is not None:
        print(f"{'peak memory':<16}{summary['peak_gib']:.2f} GiB")
    _write_json(options.json, summary)
    print(f"The adapter is in {summary['output_dir']}")


def evaluate(arguments: list[str]) -> None:
    """Measure one model or several, print one table, keep one JSON file each."""
    parser = _Parser(prog="cream-peft evaluate", description=evaluate.__doc__, allow_abbrev=False)
    parser.add_argument(
        "--compare",
        nargs="+",
        default=["cream-peft-tiny"],
        metavar="MODEL",
        help="adapter folder or Hub id, or a base model; BASE+ntk (linear, yarn) scales its RoPE to --target_length; "
        "LABEL=MODEL names it in the table",
    )
    parser.add_argument("--tasks", nargs="+", default=["recall"], help="tasks to run (default: recall)")
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens; default: doubling from window to target")
    parser.add_argument("--target_length", type=int, help="tokens; default: the adapter's, or 8 windows")
    parser.add_argument("--samples", type=int, default=32, help="documents a length (default: 32)")
    parser.add_argument("--seed", type=int, default=1000, help="seed of the documents (default: 1000)")
    parser.add_argument("--base_model", help="folder or Hub id to take adapters' bases from, instead of the one named")
    parser.add_argument("--no_4bit", action="store_true", help="load bases unquantized")
    parser.add_argument("--output_dir", default="runs/evaluate", help="folder of the results (default: runs/evaluate)")
    parser.add_argument("--json", metavar="FILE", help="write the table's content as JSON")
    options = parser.parse_args(arguments)
    from .measure import evaluate_models, table_of

    results = evaluate_models(options)
    print()
    for line in table_of(results):
        print(line)
    _write_json(options.json, results)
    print(f"The results are in {options.output_dir}")


def plan(arguments: list[str]) -> None:
    """Print the peak memory of a recipe, term by term, and the cards that it fits."""
    parser = _Parser(prog="cream-peft plan", description=plan.__doc__, allow_abbrev=False)
    parser.add_argument("--gpu", help="a card's name or its memory, such as 'RTX 4090' or 8GB")
    parser.add_argument("--json", metavar="FILE")
    options, rest = parser.parse_known_args(arguments)
    from . import memory
    from .recipe import parse_recipe
    from .train import base_config, plan_of

    gib = memory.parse_gpu(options.gpu) if options.gpu else None
    recipe = parse_recipe(rest)
    planned = plan_of(recipe, base_config(recipe))
    for term, size in planned["terms"].items():
        print(f"{term:<28}{size:8.2f} GiB")
    print()
    cards = planned["cards"]
    if gib is not None:
        cards = [{"card": options.gpu, "gib": gib, "fits": planned["terms"]["total"] <= gib}]
    for card in cards:
        print(f"{card['card']:<28}{card['gib']:8.1f} GiB  {'fits' if card['fits'] else 'does not fit'}")
    for line in planned["advice"]:
        print(line)
    print("Planned from the architecture; not measured on these cards.")
    _write_json(options.json, {**planned, "cards": cards})


def plot(arguments: list[str]) -> None:
    """Draw results files over one another: accuracy by length, and by depth at the longest length."""
    parser = _Parser(prog="cream-peft plot", description=plot.__doc__, allow_abbrev=False)
    parser.add_argument("results", nargs="+", metavar="RESULTS.json")
    parser.add_argument("--output", default="runs/accuracy.png", help="picture, .png or .svg")
    parser.add_argument("--title", default="")
    options = parser.parse_args(arguments)
    from .evals import read_results
    from .plots import plot_accuracy

    for name in options.results:
        if not Path(name).is_file():
            raise UserError(f"no such results file: {name}; `cream-peft evaluate` writes them")
    if Path(options.output).suffix not in (".png", ".svg"):
        raise UserError(f"--output {options.output}: the ending must be .png or .svg")
    labelled = {}
    for name in options.results:
        result = read_results(name)
        label = result["settings"].get("label") or Path(name).stem
        lacking = {key for cell in result["cells"] for key in PLOTTED if key not in cell}
        if lacking or not result["cells"]:
            reason = f"cells without {', '.join(sorted(lacking))}" if lacking else "nothing was measured in it yet"
            raise UserError(f"{name} cannot be drawn: {reason}; `cream-peft evaluate` fills it")
        labelled[f"{label} ({name})" if label in labelled else label] = result
    window = next(iter(labelled.values()))["settings"].get("pretrained_window")
    print(f"The picture is {plot_accuracy(labelled, options.output, window, options.title)}")


COMMANDS = {"train": train, "evaluate": evaluate, "plan": plan, "plot": plot}


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
        print(f"interrupted, what was saved stays{GO_ON.get(arguments[0], '')}", file=sys.stderr)
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
