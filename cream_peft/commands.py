"""The commands of cream-peft: each reads its options, calls the package and prints what came of it."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .terminal import CommandParser, UserError, is_first_process, table, typed_lines, write_json

GPU = "its name, such as 'RTX 4090', or its memory; 8GB is the 7.6 GiB that an 8 GB GPU reports, 8GiB is 8 GiB"


def train_command(arguments: list[str]) -> None:
    """Train an adapter from a recipe and leave it complete in output_dir."""
    parser = CommandParser(train_command, "json", add_help=False)
    parser.add_argument("--help", "-h", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    from .train.recipe import parse_recipe, print_help

    if options.help:
        return print_help()
    from .train.run import run_recipe

    summary = run_recipe(parse_recipe(rest))
    if not is_first_process():
        return
    peak = "" if summary.peak_gib is None else f", peak memory {summary.peak_gib:.2f} GiB"
    if summary.loss is not None:
        since = f" since step {summary.resumed_step:,}" if summary.resumed_step else ""
        done = f"{summary.steps - summary.resumed_step:,} steps{since} in {summary.seconds:.0f} s"
        print(f"\n{done}, mean loss {summary.loss:.3f}{peak}")
    if summary.redrawn:
        print(f"{summary.redrawn:,} draws held no label and others were taken: raise context_length if they are many")
    if summary.unlabelled:
        print(f"{summary.unlabelled:,} examples held no label and taught nothing: leave out documents with few labels")
    write_json(options.json, asdict(summary))
    compared = shlex.join([summary.base, summary.output_dir])
    print(f"The {summary.kind} is in {summary.output_dir}\nMeasure it: cream-peft evaluate --compare {compared}")


def _texts(name: str, config: str | None, split: str) -> list[str] | None:
    """The texts of a data set's first rows; None where `name` is a text file or folder, which evals reads itself."""
    from .evals.prompts import TEXT_SUFFIXES
    from .train.files import first_texts

    path = Path(name)
    return None if path.is_dir() or path.suffix.lower() in TEXT_SUFFIXES else first_texts(name, config, split)


def evaluate_parser() -> argparse.ArgumentParser:
    """The options of `cream-peft evaluate`."""
    from .evals.options import add_options

    parser = CommandParser(evaluate_command, "base_model", "no_4bit", "json")
    add_options(parser)
    return parser


def evaluate_command(arguments: list[str]) -> None:
    """Measure one model or several, print one table a task, keep one JSON file a model."""
    given = vars(evaluate_parser().parse_args(arguments))
    threshold, json_file, folder = given.pop("threshold"), given.pop("json"), given.pop("dump_prompts")
    details, config, split = given.pop("details"), given.pop("text_config"), given.pop("text_split")
    if not 0 < threshold <= 1:
        raise UserError(f"--threshold {threshold:g} must lie above 0 and not above 1: 0.85 is 85%")
    from .evals.options import EvaluateOptions
    from .evals.results import comparisons, effective_lengths
    from .evals.run import evaluate_models, write_prompts
    from .evals.table import paper_table, table_of

    if given.pop("paper"):
        print(paper_table())
        if not {"--compare", "--adapter"} & {word.partition("=")[0] for word in arguments}:
            return
    options = EvaluateOptions(load_in_4bit=not given.pop("no_4bit"), **given)
    if folder:
        write_prompts(options, Path(folder))
        print(f"The prompts are in {folder}; nothing was measured")
        return
    results = evaluate_models(options, _texts(options.text, config, split) if options.text else None)
    print(f"\n{table_of(results, threshold, options.tasks, details)}")
    if json_file:
        content = {
            "results": {label: result.asdict() for label, result in results.items()},
            "comparisons": comparisons(results),
            "effective_lengths": effective_lengths(results, threshold),
        }
        write_json(json_file, content)
    print(f"The results are in {options.output_dir}: `cream-peft plot {options.output_dir}/*.json` draws them")


def lm_eval_command(arguments: list[str]) -> None:
    """Run the field's own benchmarks (EleutherAI's lm-eval) on adapters, with their RoPE scaled, and on bases."""
    from .evals.options import COMPARED
    from .evals.presets import PRESETS

    parser = CommandParser(lm_eval_command, "base_model", "no_4bit", "json")
    parser.option("compare", COMPARED, "adapter", nargs="+", required=True, metavar="MODEL")
    parser.option("preset", "short: the paper's six; longbench: 16 sets; ruler: 13 tasks", choices=PRESETS)
    parser.option("tasks", "lm-eval's tasks in place of a preset, by commas: hellaswag,mmlu")
    parser.option("data_dir", "data sets OWNER/NAME in place of the Hub's", metavar="DIR")
    parser.option("target_length", "tokens, of bases; default: a window, or 8 if scaled", type=int)
    parser.option("max_length", "tokens of prompt and answer; default: the target length", type=int)
    parser.option("batch_size", "prompts answered together", type=int, default=1)
    chat = "put the prompts in the chat template; default: of --preset longbench, where there is one"
    parser.option("chat_template", chat, action=argparse.BooleanOptionalAction)
    parser.option("overwrite", "replace results that were asked in another way", action="store_true")
    parser.option("limit", "samples of each task; default: all", type=int)
    parser.option("num_fewshot", "examples in the prompt; default: the task's", type=int)
    parser.option("seed", "default: lm-eval's own, with which published figures were made", type=int)
    parser.option("include_path", "task YAMLs beside lm-eval's own", metavar="DIR")
    parser.option("metadata", "JSON for tasks that make their data; default: RULER's lengths", type=json.loads)
    parser.option("output_dir", "folder of the results", default="runs/lm-eval")
    given = vars(parser.parse_args(arguments))
    json_file = given.pop("json")
    from .evals.harness import run_lm_eval, table_of_harness

    results = run_lm_eval(load_in_4bit=not given.pop("no_4bit"), **given)
    print(f"\n{table_of_harness(results)}")
    write_json(json_file, results)
    print(f"The results are in {given['output_dir']}")


def _with_config(options: argparse.Namespace, rest: list[str]) -> list[str]:
    return [*(["--config", options.config] if options.config is not None else []), *rest]


KEYS = "Every key of a recipe is an option too, such as --context_length 8192: see `cream-peft train --help`."


def plan_command(arguments: list[str]) -> None:
    """Print what a recipe needs: peak memory term by term, for training and for evaluation with each KV cache, hours on
    a list of GPUs, and what to change where it does not fit. No GPU and no weights are needed."""
    parser = CommandParser(plan_command, "config", "json", epilog=KEYS)
    parser.option("gpu", f"plan for this GPU alone: {GPU}")
    options, rest = parser.parse_known_args(arguments)
    from .plan.advice import text_of
    from .plan.gpus import find_gpu, parse_gpu
    from .train.machine import base_config, plan_recipe
    from .train.recipe import parse_recipe

    gpus = {find_gpu(options.gpu) or options.gpu: parse_gpu(options.gpu)} if options.gpu else None
    recipe = parse_recipe(_with_config(options, rest))
    planned = plan_recipe(recipe, base_config(recipe), gpus)
    print(text_of(planned))
    write_json(options.json, asdict(planned))


def bench_command(arguments: list[str]) -> None:
    """Train a recipe for some steps on random weights and documents: peak memory and speed, with plan beside them."""
    parser = CommandParser(bench_command, "config", "json", epilog=KEYS)
    parser.option("steps", "optimizer steps, the first is a warm-up", type=int, default=5)
    parser.option("memory-limit", f"use no more of the GPU than this one has: {GPU}", metavar="GPU")
    options, rest = parser.parse_known_args(arguments)
    from .plan.gpus import parse_gpu
    from .train.bench import bench_recipe, parse_bench, text_of

    limit = parse_gpu(options.memory_limit) if options.memory_limit else None
    measured = bench_recipe(parse_bench(_with_config(options, rest), options.steps), limit)
    print(text_of(measured))
    write_json(options.json, asdict(measured))


def plot_command(arguments: list[str]) -> None:
    """Draw results files over one another: a heat map for needle, else accuracy or perplexity by length and depth.
    With --positions, draw instead which positions each strategy gives to the tokens that are fed."""
    parser = CommandParser(plot_command)
    parser.add_argument("results", nargs="*", metavar="RESULTS.json")
    parser.option("output", "picture, .png or .svg", default="runs/accuracy.png", metavar="FILE")
    kinds = ["accuracy", "depth", "heatmap", "perplexity", "tasks"]
    parser.option("kind", "default: by task; tasks: one picture, a panel a model and task", choices=kinds)
    parser.option("task", "draw this one; default: every task in the files, a picture each")
    parser.option("title", "what stands above", default="")
    parser.option("positions", "draw the positions of each strategy, no results", action="store_true")
    parser.option(
        "strategies", "of --positions, such as pose,chunks=4", nargs="+", default=["contiguous", "pose", "cream"]
    )
    parser.option("context_length", "of --positions: tokens fed", type=int, default=256)
    parser.option("target_length", "of --positions: the length to reach", type=int, default=2048)
    options = parser.parse_args(arguments)
    if options.positions == bool(options.results):
        parser.error("give RESULTS.json or --positions")
    if Path(options.output).suffix not in (".png", ".svg"):
        raise UserError(f"--output {options.output}: the ending must be .png or .svg")
    from .evals.plots import plot_results, save, tasks_figure, told_apart

    if options.positions:
        from .evals.draw_positions import positions_figure

        figure = positions_figure(options.context_length, options.target_length, strategies=options.strategies)
        print(f"The picture is {save(figure, Path(options.output))}")
        return
    found = told_apart(options.results, options.kind == "tasks")
    if options.kind == "tasks":
        paths = [save(tasks_figure(found, options.title), Path(options.output))]
    else:
        labelled = {str(result.settings.label): result for result in found}
        paths = plot_results(labelled, options.output, options.kind, options.task, options.title)
    print("\n".join(f"The picture is {path}" for path in paths))


def push_command(arguments: list[str]) -> None:
    """Publish an adapter on the Hub: everything it needs in one commit, with a card made from what was measured. What
    an earlier push left there and the folder no longer has is deleted; files of yours stay."""
    parser = CommandParser(push_command, "base_model")
    parser.option("adapter", "folder that `cream-peft train` left", required=True, metavar="DIR")
    parser.option("repo", "created if it does not exist", required=True, metavar="USER/NAME")
    parser.option("private", "create it as a private repository", action="store_true")
    parser.option("revision", "branch to publish to; created if it does not exist")
    parser.option("results", "results of `cream-peft evaluate`", nargs="+", default=[], metavar="FILE")
    parser.option("base_model_id", "Hub id of the base, where it was trained on a local folder")
    parser.option("license", "licence in the card's metadata; default: the one on the base's card")
    parser.option("with-merged", "also publish USER/NAME-merged", action="store_true")
    parser.option("merged_dir", "where the merged model is made; default: ADAPTER-merged", metavar="DIR")
    parser.option("dry_run", "send nothing: leave what would be published in this new folder", metavar="DIR")
    options = parser.parse_args(arguments)
    folder = Path(options.adapter)
    if options.dry_run and options.with_merged:
        parser.error("--dry_run shows what is published of one folder: leave out --with_merged")
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}; `cream-peft train` leaves an adapter in its output_dir")
    from .publish.push import push_folder

    merged = Path(options.merged_dir or f"{folder}-merged")
    if options.with_merged:
        from .publish.merge import merge_adapter

        # First, so that what cannot be merged is not published in half.
        merge_adapter(folder, merged, base_model=options.base_model)
    names = ("revision", "license", "base_model", "base_model_id")
    shared: dict[str, Any] = {"private": options.private or None} | {name: getattr(options, name) for name in names}
    published = push_folder(folder, options.repo, results=options.results, dry_run=options.dry_run, **shared)
    if options.dry_run:
        unmeasured = "" if options.results else "; the card says that nothing was measured (--results)"
        print(f"Nothing was sent. What {options.repo} would get is in {published}{unmeasured}")
        return
    print(f"Published: {published}")
    if options.with_merged:
        print(f"Published: {push_folder(merged, f'{options.repo}-merged', results=options.results, **shared)}")
        print(f"The merged model stays in {merged}")


def check_command(arguments: list[str]) -> None:
    """Say what an adapter (or merged model) is, whether it fits its base, and what a plain load makes of it."""
    options = CommandParser(check_command, "adapter", "base_model", "revision", "json").parse_args(arguments)
    from .model.check import check_adapter

    found = check_adapter(options.adapter, base_model=options.base_model, revision=options.revision)
    print(table(("item", "verdict", "found"), [(one.item, one.verdict, one.found) for one in found]))
    write_json(options.json, [asdict(one) for one in found])
    wrong = [one.item for one in found if one.verdict == "wrong"]
    if wrong:
        raise UserError(f"{options.adapter} is not right: {', '.join(wrong)} (see above)")


def merge_command(arguments: list[str]) -> None:
    """Merge an adapter into its 16-bit base, shard by shard, and leave a model that loads in the usual way. With
    --gguf_lora: write the adapter alone, for llama.cpp."""
    parser = CommandParser(merge_command, "adapter", "base_model", "revision", "json")
    parser.option("output", "folder of the merged model", metavar="DIR")
    parser.option("gguf-lora", "instead: the adapter alone as a GGUF, with llama.cpp's line printed", metavar="FILE")
    parser.option("dtype", "default: the base files' own", choices=["bfloat16", "float16", "float32"])
    parser.option("max_shard_size", "size of a file, and about what merging holds in memory; default: 1GB")
    given = {key: value for key, value in vars(parser.parse_args(arguments)).items() if value is not None}
    json_file, folder, file = (given.pop(name, None) for name in ("json", "output", "gguf_lora"))
    if bool(folder) == bool(file):
        parser.error("give one of --output (a merged model) and --gguf_lora (the adapter alone, for llama.cpp)")
    if file:
        if unused := sorted({"dtype", "max_shard_size"} & given.keys()):
            parser.error(f"--{unused[0]} is for --output, and --gguf_lora writes the adapter as it is: leave it out")
        from .publish.gguf_lora import write_gguf_lora

        written = write_gguf_lora(given.pop("adapter"), file, **given)
        write_json(json_file, asdict(written))
        print(f"{written.layers:,} linear layers are adapted by {file}. On the base's own GGUF, in any quantization:\n")
        print(written.command)
        return
    from .publish.merge import merge_adapter

    summary = asdict(merge_adapter(given.pop("adapter"), folder, **given))
    rows = [(key, f"{value:,}" if isinstance(value, int | float) else value) for key, value in summary.items()]
    print(table(rows[0], rows[1:]))
    write_json(json_file, summary)
    print(f"The merged model is in {folder}")


def chat_command(arguments: list[str]) -> None:
    """Talk to an adapter, over a long document if you like. Ctrl-C stops an answer, Ctrl-D or /exit leaves."""
    from .model.kv_cache import KV_CACHES

    parser = CommandParser(chat_command, "adapter", "base_model", "revision", "no_4bit")
    parser.option("document", "text file to talk about (UTF-8)", metavar="FILE")
    parser.option("system", "system message, for a chat template", default="", metavar="TEXT")
    parser.option("kv_cache", "quantized: 4 bits, needs `pip install hqq`", default="default", choices=KV_CACHES)
    parser.option("max_new_tokens", "tokens of an answer at most", type=int, default=512)
    parser.option("temperature", "0 (default): the likeliest token each time", type=float, default=0.0)
    options = parser.parse_args(arguments)
    from .chat import ChatSettings, load_chat, read_document, talk

    document = read_document(options.document) if options.document else ""
    settings = ChatSettings(document, options.system, options.kv_cache, options.max_new_tokens, options.temperature)
    load_options = {"base_model": options.base_model, "revision": options.revision, "load_in_4bit": not options.no_4bit}
    chat = load_chat(options.adapter, settings, **load_options)
    refused = talk(chat, typed_lines(), lambda text: print(text, end="", flush=True))
    # Whoever types has seen it; a script reads the exit code.
    if refused and not sys.stdin.isatty():
        raise UserError(f"{refused} of the lines got no answer (see above)")


COMMANDS = {
    "train": train_command,
    "evaluate": evaluate_command,
    "lm-eval": lm_eval_command,
    "plan": plan_command,
    "plot": plot_command,
    "bench": bench_command,
    "push": push_command,
    "check": check_command,
    "merge": merge_command,
    "chat": chat_command,
}
