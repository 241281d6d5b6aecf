"""The commands of cream-peft: each reads its options, calls the package and prints what came of it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

MOST_TEXTS = 1000
"""Rows of a data set whose perplexity is measured."""
GPU_HELP = "its name, such as 'RTX 4090', or its memory; 8GB is the 7.6 GiB that an 8 GB card reports, 8GiB is 8 GiB"


class UserError(ValueError):
    """Something the user can mend; its message is the one line that is printed."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")


def _write_json(path: str | None, content: Any) -> None:
    if path and _speaks():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"The same as JSON: {path}")


def _speaks() -> bool:
    """Whether this is the one process, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def train(arguments: list[str]) -> None:
    """Train an adapter from a recipe and leave it complete in output_dir."""
    parser = _Parser(prog="cream-peft train", add_help=False, allow_abbrev=False)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--help", "-h", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    if options.help:
        from .train.recipe import DATACLASSES, TrlParser

        TrlParser(DATACLASSES, prog="cream-peft train").print_help()
        return
    from .train.recipe import parse_recipe
    from .train.run import run_recipe

    summary = run_recipe(parse_recipe(rest))
    if not _speaks():
        return
    print(f"\n{'loss':<16}{summary['loss']:.3f} (mean over the run, {summary['steps']} steps in all)")
    print(f"{'time':<16}{summary['seconds']:.0f} s")
    print(f"{'redrawn':<16}{summary['redrawn']} draws held no label, {summary['unlabelled']} examples none at all")
    if summary["peak_gib"] is not None:
        print(f"{'peak memory':<16}{summary['peak_gib']:.2f} GiB")
    _write_json(options.json, summary)
    print(f"The adapter is in {summary['output_dir']}")


def evaluate_parser() -> argparse.ArgumentParser:
    """The options of `cream-peft evaluate`."""
    from .evals.prompts import STYLES
    from .evals.tasks import TASKS

    parser = _Parser(prog="cream-peft evaluate", description=evaluate.__doc__, allow_abbrev=False)
    parser.add_argument(
        "--compare", nargs="+", default=["cream-peft-tiny"], metavar="MODEL",
        help="adapter folder or Hub id, or a base model; BASE+ntk (linear, yarn) scales its RoPE to --target_length; "
        "LABEL=MODEL names it in the table (default: cream-peft-tiny)",
    )  # fmt: skip
    parser.add_argument("--tasks", nargs="+", default=["kv_retrieval", "needle"], help=f"of {', '.join(TASKS)}")
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens; default: doubling from window to target")
    parser.add_argument("--target_length", type=int, help="tokens; default: the adapter's, or 8 windows")
    parser.add_argument("--samples", type=int, default=32, help="at each length and depth (default: 32)")
    parser.add_argument("--seed", type=int, default=1000, help="seed of the prompts (default: 1000)")
    parser.add_argument("--threshold", type=float, default=0.85, help="accuracy that is enough (default: 0.85)")
    parser.add_argument("--depths", nargs="+", type=float, help="where the answer stands, 0 to 1; default: the task's")
    parser.add_argument("--keys", type=int, help="kv_retrieval: so many keys, as the paper's 75 and 140")
    parser.add_argument("--key_length", type=int, help="kv_retrieval: keys of so many digits instead of UUIDs")
    parser.add_argument("--lines", type=int, help="longchat_lines: so many lines")
    parser.add_argument("--haystack", metavar="PATH", help="needles: text file or folder to hide them in")
    parser.add_argument("--text", metavar="PATH_OR_ID", help="perplexity: text file, folder of such, or a data set")
    parser.add_argument("--text_config", help="configuration of that data set")
    parser.add_argument("--text_split", default="test", help="split of that data set (default: test)")
    parser.add_argument("--stride", type=int, help="perplexity: tokens between windows (default: half the length)")
    parser.add_argument("--max_tokens", type=int, help="perplexity: tokens read of each document; default: all")
    parser.add_argument("--style", choices=STYLES, help="form of the prompt (default: chat where there is a template)")
    parser.add_argument("--chunk_length", type=int, help="tokens read at once (default: 1024)")
    parser.add_argument(
        "--kv_cache", choices=["auto", "default", "quantized"], default="auto",
        help="16-bit (default) or 4-bit; auto: 16-bit where it fits",
    )  # fmt: skip
    parser.add_argument("--dump_prompts", "--dump-prompts", metavar="DIR", help="write the prompts, measure nothing")
    parser.add_argument("--base_model", help="folder or Hub id to take adapters' bases from, instead of the one named")
    parser.add_argument("--no_4bit", action="store_true", help="load bases unquantized")
    parser.add_argument("--output_dir", default="runs/evaluate", help="folder of the results (default: runs/evaluate)")
    parser.add_argument("--details", action="store_true", help="also print accuracy by depth, intervals, differences")
    parser.add_argument("--paper", action="store_true", help="print what the paper reports for the same tasks")
    parser.add_argument("--json", metavar="FILE", help="write the results and their comparisons as one JSON")
    return parser


def _texts(name: str, config: str | None, split: str) -> list[str] | None:
    """The texts of a data set's first rows; None where `name` is a text file or folder, which evals reads itself."""
    from .evals.prompts import TEXT_SUFFIXES
    from .train.data import load_documents

    path = Path(name)
    if path.is_dir() or path.suffix in TEXT_SUFFIXES:
        return None
    settings = {"streaming": True} | ({"name": config} if config else {})
    rows = load_documents(name, "train" if path.is_file() else split, **settings)
    texts = [row["text"] for row in islice(rows, MOST_TEXTS) if "text" in row]
    if not texts:
        raise UserError(f"--text {name} has no column text: give a data set that has one, or text files")
    return texts


def evaluate(arguments: list[str]) -> None:
    """Measure one model or several, print one table a task, keep one JSON file a model."""
    given = vars(evaluate_parser().parse_args(arguments))
    threshold, json_file, folder = given.pop("threshold"), given.pop("json"), given.pop("dump_prompts")
    details, config, split = given.pop("details"), given.pop("text_config"), given.pop("text_split")
    from .evals.results import comparisons, effective_lengths
    from .evals.run import EvaluateOptions, evaluate_models, write_prompts
    from .evals.table import paper_table, table_of

    if given.pop("paper"):
        print(paper_table())
        if "--compare" not in arguments:
            return
    options = EvaluateOptions(load_in_4bit=not given.pop("no_4bit"), **given)
    if folder:
        write_prompts(options, Path(folder))
        print(f"The prompts are in {folder}; nothing was measured")
        return
    results = evaluate_models(options, _texts(options.text, config, split) if options.text else None)
    print(f"\n{table_of(results, threshold, options.tasks, details)}")
    content = {
        "results": {label: result.asdict() for label, result in results.items()},
        "comparisons": comparisons(results),
        "effective_lengths": effective_lengths(results, threshold),
    }
    _write_json(json_file, content)
    print(f"The results are in {options.output_dir}: `cream-peft plot {options.output_dir}/*.json` draws them")


def lm_eval(arguments: list[str]) -> None:
    """Run the field's own benchmarks (EleutherAI's lm-eval) on adapters, with their RoPE scaled, and on bases."""
    parser = _Parser(prog="cream-peft lm-eval", description=lm_eval.__doc__, allow_abbrev=False)
    parser.add_argument(
        "--compare", "--adapter", nargs="+", required=True, metavar="MODEL",
        help="adapter folder or Hub id, or a base model; BASE+ntk (linear, yarn) scales its RoPE; LABEL=MODEL names it",
    )  # fmt: skip
    parser.add_argument("--tasks", required=True, help="lm-eval's tasks, by commas: longbench,ruler,hellaswag,mmlu_*")
    parser.add_argument("--target_length", type=int, help="tokens, of bases; default: a window, or 8 if scaled")
    parser.add_argument("--max_length", type=int, help="tokens of prompt and answer; default: the target length")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--chat_template", action="store_true", help="put the prompts in the chat template")
    parser.add_argument("--limit", type=int, help="samples of each task; default: all")
    parser.add_argument("--num_fewshot", type=int, help="default: the task's")
    parser.add_argument("--seed", type=int, help="default: lm-eval's own, with which published figures were made")
    parser.add_argument("--include_path", metavar="DIR", help="task YAMLs beside lm-eval's own")
    parser.add_argument("--metadata", type=json.loads, help="for tasks that need it: '{\"max_seq_lengths\": [32768]}'")
    parser.add_argument("--base_model", help="folder or Hub id to take adapters' bases from, instead of the one named")
    parser.add_argument("--no_4bit", action="store_true", help="load bases unquantized")
    parser.add_argument("--output_dir", default="runs/lm-eval", help="folder of the results (default: runs/lm-eval)")
    parser.add_argument("--json", metavar="FILE", help="write all results as one JSON")
    given = vars(parser.parse_args(arguments))
    json_file = given.pop("json")
    from .evals.harness import run_lm_eval, table_of_harness

    results = run_lm_eval(load_in_4bit=not given.pop("no_4bit"), **given)
    print(f"\n{table_of_harness(results)}")
    _write_json(json_file, results)
    print(f"The results are in {given['output_dir']}")


def plan(arguments: list[str]) -> None:
    """Print what a recipe needs: peak memory term by term, for training and for evaluation with each cache, hours on a
    list of cards, and what to change where it does not fit. No GPU and no weights are needed."""
    parser = _Parser(
        prog="cream-peft plan", description=plan.__doc__, allow_abbrev=False,
        epilog="Every key of a recipe is an option too, such as --context_length 8192 or --memory low: `cream-peft "
        "train --help` lists them. What is set nowhere has the recipe class's default.",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="recipe, such as those under recipes/ (default: the embedded)")
    parser.add_argument("--gpu", help=f"plan for this card alone: {GPU_HELP}")
    parser.add_argument("--json", metavar="FILE", help="write the plan as JSON")
    options, rest = parser.parse_known_args(arguments)
    from .plan.advice import lines_of
    from .plan.gpus import find_card, parse_gpu
    from .train.machine import base_config, plan_of
    from .train.recipe import parse_recipe

    cards = {find_card(options.gpu) or options.gpu: parse_gpu(options.gpu)} if options.gpu else None
    recipe = parse_recipe([*(["--config", options.config] if options.config is not None else []), *rest])
    planned = plan_of(recipe, base_config(recipe), cards)
    for line in lines_of(planned):
        print(line)
    _write_json(options.json, planned)


def bench(arguments: list[str]) -> None:
    """Train a recipe for some steps on random weights and documents: peak memory and speed, with plan beside them."""
    parser = _Parser(
        prog="cream-peft bench", description=bench.__doc__, allow_abbrev=False,
        epilog="Every key of a recipe is an option too, see cream-peft train --help.",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="recipe (default: the embedded one)")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps, the first is a warm-up (default: 5)")
    limited = f"use no more of the GPU than this one has: {GPU_HELP}"
    parser.add_argument("--memory_limit", "--memory-limit", metavar="GPU", help=limited)
    parser.add_argument("--json", metavar="FILE", help="write what was measured as JSON")
    options, rest = parser.parse_known_args(arguments)
    from .plan.gpus import parse_gpu
    from .train.bench import bench_recipe, lines_of, parse_bench

    limit = parse_gpu(options.memory_limit) if options.memory_limit else None
    config = ["--config", options.config] if options.config is not None else []
    measured = bench_recipe(parse_bench([*config, *rest], options.steps), limit)
    for line in lines_of(measured):
        print(line)
    _write_json(options.json, measured)


def plot(arguments: list[str]) -> None:
    """Draw results files over one another: a heat map for needle, else accuracy or perplexity by length and depth."""
    parser = _Parser(prog="cream-peft plot", description=plot.__doc__, allow_abbrev=False)
    parser.add_argument("results", nargs="+", metavar="RESULTS.json")
    parser.add_argument("--output", default="runs/accuracy.png", help="picture, .png or .svg")
    parser.add_argument("--kind", choices=["accuracy", "depth", "heatmap", "perplexity"], help="default: by task")
    parser.add_argument("--task", help="draw this one; default: every task in the files, a picture each")
    parser.add_argument("--title", default="")
    options = parser.parse_args(arguments)
    from .evals.plots import plot_results
    from .evals.results import Results

    for name in options.results:
        if not Path(name).is_file():
            raise UserError(f"no such results file: {name}; `cream-peft evaluate` writes them")
    if Path(options.output).suffix not in (".png", ".svg"):
        raise UserError(f"--output {options.output}: the ending must be .png or .svg")
    labelled: dict[str, Results] = {}
    for name in options.results:
        result = Results.read(name)
        if not result.cells:
            raise UserError(f"{name} cannot be drawn: nothing was measured in it yet; `cream-peft evaluate` fills it")
        label = result.settings.label or Path(name).stem
        labelled[f"{label} ({name})" if label in labelled else label] = result
    for path in plot_results(labelled, options.output, options.kind, options.task, options.title):
        print(f"The picture is {path}")


def push(arguments: list[str]) -> None:
    """Publish an adapter on the Hub: everything it needs in one commit, with a card made from what was measured."""
    parser = _Parser(prog="cream-peft push", description=push.__doc__, allow_abbrev=False)
    parser.add_argument("--adapter", required=True, metavar="DIR", help="folder that `cream-peft train` left")
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create it as a private repository")
    parser.add_argument("--revision", help="branch to publish to; created if it does not exist")
    parser.add_argument("--results", nargs="+", default=[], metavar="FILE", help="results of `cream-peft evaluate`")
    parser.add_argument("--base_model_id", help="Hub id of the base, where it was trained on a local folder")
    parser.add_argument("--license", help="licence in the card's metadata; default: the one on the base's card")
    parser.add_argument("--with-merged", "--with_merged", action="store_true", help="also publish USER/NAME-merged")
    parser.add_argument("--base_model", help="folder or Hub id to take the base from, to merge")
    parser.add_argument("--merged_dir", metavar="DIR", help="where the merged model is made (default: ADAPTER-merged)")
    options = parser.parse_args(arguments)
    folder = Path(options.adapter)
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}; `cream-peft train` leaves an adapter in its output_dir")
    from .publish.push import push_folder

    merged = Path(options.merged_dir or f"{folder}-merged")
    if options.with_merged:
        from .publish.merge import merge_adapter

        # First, so that what cannot be merged is not published in half.
        merge_adapter(folder, merged, base_model=options.base_model)
    shared = {"private": options.private or None, "revision": options.revision, "license": options.license}
    shared["base_model_id"] = options.base_model_id
    print(f"Published: {push_folder(folder, options.repo, results=options.results, **shared)}")
    if options.with_merged:
        print(f"Published: {push_folder(merged, f'{options.repo}-merged', **shared)}")
        print(f"The merged model stays in {merged}")


def check(arguments: list[str]) -> None:
    """Say what an adapter (or merged model) is, whether it fits its base, and what a plain load makes of it."""
    parser = _Parser(prog="cream-peft check", description=check.__doc__, allow_abbrev=False)
    parser.add_argument("--adapter", required=True, metavar="ID_OR_DIR")
    parser.add_argument("--base_model", help="folder or Hub id to take the base from, instead of the one named")
    parser.add_argument("--revision", help="branch, tag or commit of the adapter's repository")
    parser.add_argument("--json", metavar="FILE", help="write the table's content as JSON")
    options = parser.parse_args(arguments)
    from .model.check import check_adapter

    rows = check_adapter(options.adapter, base_model=options.base_model, revision=options.revision)
    for row in rows:
        print(f"{row['item']:<20}{row['verdict']:<8}{row['found']}")
    _write_json(options.json, rows)
    wrong = [row["item"] for row in rows if row["verdict"] == "wrong"]
    if wrong:
        raise UserError(f"{options.adapter} is not right: {', '.join(wrong)} (see above)")


def merge(arguments: list[str]) -> None:
    """Merge an adapter into its 16-bit base, shard by shard, and leave a model that loads in the usual way."""
    parser = _Parser(prog="cream-peft merge", description=merge.__doc__, allow_abbrev=False)
    parser.add_argument("--adapter", required=True, metavar="ID_OR_DIR")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the merged model")
    parser.add_argument("--base_model", help="folder or Hub id to take the base from, instead of the one named")
    parser.add_argument("--revision", help="branch, tag or commit of the adapter's repository")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: the base files' own")
    parser.add_argument(
        "--max_shard_size", default="1GB", help="size of a file, and about what merging holds in memory"
    )
    parser.add_argument("--json", metavar="FILE", help="write the summary as JSON")
    options = parser.parse_args(arguments)
    from .publish.merge import merge_adapter

    summary = merge_adapter(
        options.adapter,
        options.output,
        base_model=options.base_model,
        revision=options.revision,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
    )
    for key, value in summary.items():
        print(f"{key:<20}{value:,}" if isinstance(value, int | float) else f"{key:<20}{value}")
    _write_json(options.json, summary)
    print(f"The merged model is in {options.output}")


def _typed() -> Iterator[str]:
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


def chat(arguments: list[str]) -> None:
    """Talk to an adapter, over a long document if you like. Ctrl-C stops an answer, Ctrl-D or /exit leaves."""
    parser = _Parser(prog="cream-peft chat", description=chat.__doc__, allow_abbrev=False)
    parser.add_argument("--adapter", required=True, metavar="ID_OR_DIR")
    parser.add_argument("--document", metavar="FILE", help="text file to talk about (UTF-8)")
    parser.add_argument("--system", default="", metavar="TEXT", help="system message, for a chat template")
    parser.add_argument(
        "--kv_cache", default="default", choices=["default", "quantized", "offloaded"],
        help="quantized: 4 bits, needs `pip install hqq`; offloaded: in main memory, needs a CUDA GPU",
    )  # fmt: skip
    parser.add_argument("--max_new_tokens", type=int, default=512, help="tokens of an answer at most (default: 512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): the likeliest token each time")
    parser.add_argument("--base_model", help="folder or Hub id to take the base from, instead of the one named")
    parser.add_argument("--revision", help="branch, tag or commit of the adapter's repository")
    parser.add_argument("--no_4bit", action="store_true", help="load the base unquantized")
    options = parser.parse_args(arguments)
    from .chat import ChatSettings, load_chat, read_document, talk

    document = read_document(options.document) if options.document else ""
    settings = ChatSettings(document, options.system, options.kv_cache, options.max_new_tokens, options.temperature)
    load_options = {"base_model": options.base_model, "revision": options.revision, "load_in_4bit": not options.no_4bit}
    talk(load_chat(options.adapter, settings, **load_options), _typed(), lambda text: print(text, end="", flush=True))


COMMANDS = {
    "train": train,
    "evaluate": evaluate,
    "lm-eval": lm_eval,
    "plan": plan,
    "plot": plot,
    "bench": bench,
    "push": push,
    "check": check,
    "merge": merge,
    "chat": chat,
}
