"""Models named on the command line, measured with the tasks of evals."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..model.base import load_tokenizer
from ..model.kv_cache import KV_CACHES, refuse_unusable
from ..model.record import machine, versions
from ..plan.fit import fitting_kv_cache, reading_explained
from ..rope import DEFAULT_FACTOR
from ..tiny.documents import VOCABULARY_SIZE
from ..train.data import load_documents
from .harness import run_harness
from .models import Subject, load_subject, open_subject, public_name, result_file, subjects_of
from .prompts import STYLES, TEXT_SUFFIXES
from .runner import evaluate
from .tasks import TASKS

GENERATED = ("kv_retrieval", "longchat_lines", "multikey_needle", "needle", "passkey")
TAKEN_BY = {
    "keys": ("kv_retrieval",),
    "key_length": ("kv_retrieval",),
    "lines": ("longchat_lines",),
    "haystack": ("multikey_needle", "needle"),
    "text": ("perplexity",),
    "stride": ("perplexity",),
    "max_tokens": ("perplexity",),
    "depths": GENERATED,
    "style": GENERATED,
    "batch_size": GENERATED,
    "chunk_length": (*GENERATED, "perplexity"),
}
"""Option on the command line -> the tasks that take it."""
MOST_DOCUMENTS = 1000
EMBEDDED = ("kv_retrieval", "needle", "recall")
"""The tasks of the embedded model."""


def add_options(parser: ArgumentParser) -> None:
    """The options of `cream-peft evaluate`."""
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
    parser.add_argument("--threshold", type=float, default=0.85, help="accuracy that counts as of use (default: 0.85)")
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
    parser.add_argument("--batch_size", type=int, help="prompts answered together (default: 1)")
    parser.add_argument("--chunk_length", type=int, help="tokens read at once (default: 1024)")
    parser.add_argument(
        "--kv_cache", choices=["auto", *KV_CACHES], default="auto",
        help="default: 16-bit where it fits, else quantized, offloaded",
    )  # fmt: skip
    parser.add_argument("--dump_prompts", "--dump-prompts", metavar="DIR", help="write the prompts, measure nothing")
    parser.add_argument("--base_model", help="folder or Hub id to take adapters' bases from, instead of the one named")
    parser.add_argument("--no_4bit", action="store_true", help="load bases unquantized")
    parser.add_argument("--output_dir", default="runs/evaluate", help="folder of the results (default: runs/evaluate)")


def _task_options(options: Namespace) -> dict[str, dict[str, Any]]:
    """Task -> what was set for it; an option that no task of this run takes is refused."""
    found: dict[str, dict[str, Any]] = {task: {} for task in options.tasks}
    for name, takers in TAKEN_BY.items():
        value = getattr(options, name)
        if value is None:
            continue
        mine = [task for task in options.tasks if task in takers]
        if not mine:
            raise ValueError(f"--{name} is for {', '.join(takers)}, and --tasks has {', '.join(options.tasks)}")
        for task in mine:
            found[task][name] = value
    return found


def _documents(options: Namespace) -> str | list[str]:
    """What --text names: a text file or folder as it is, or the texts of a data set's first rows."""
    path = Path(options.text)
    if path.is_dir() or path.suffix in TEXT_SUFFIXES:
        return options.text
    settings = {"streaming": True} | ({"name": options.text_config} if options.text_config else {})
    rows = load_documents(options.text, "train" if path.is_file() else options.text_split, **settings)
    texts = [row["text"] for row in islice(rows, MOST_DOCUMENTS) if "text" in row]
    if not texts:
        raise ValueError(f"--text {options.text} has no column text: give a data set that has one, or text files")
    return texts


def _refuse_other_vocabulary(tasks: list[str], config: PreTrainedConfig, name: str) -> None:
    if "recall" in tasks and config.vocab_size != VOCABULARY_SIZE:
        raise ValueError(f"task recall is for the embedded model's vocabulary, {name} has another: leave it out")
    text = [task for task in tasks if task not in EMBEDDED]
    if text and config.vocab_size == VOCABULARY_SIZE:
        raise ValueError(f"{name} reads no text, which {text[0]} is: its tasks are {', '.join(EMBEDDED)}")


def _measure(subject: Subject, options: Namespace, task_options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    folder, settings, base, config = open_subject(subject, options)
    _refuse_other_vocabulary(options.tasks, config, subject.name)
    window, target = settings["pretrained_window"], settings["target_length"]
    lengths = options.lengths or [window * 2**power for power in range(20) if window * 2**power <= target]
    if options.lengths is None and (options.keys or options.lines):
        # So many keys are as long as they are; the longest length has room for them.
        lengths = [target]
    if options.dump_prompts:
        return _dump(subject, options, task_options, lengths, str(folder or subject.name))
    model, tokenizer = load_subject(subject, folder, settings, options)
    kv_cache = options.kv_cache
    if kv_cache == "auto":
        kv_cache = fitting_kv_cache(config, max(lengths), options.batch_size or 1)
    given = {task: dict(own) for task, own in task_options.items()}
    for task in given:
        if task in TAKEN_BY["chunk_length"]:
            given[task]["kv_cache"] = kv_cache
        if task == "perplexity":
            # Every length scores the same documents.
            given[task] |= {"min_tokens": max(lengths), "text": _documents(options)}
    shown = {
        task: {key: public_name(getattr(options, key)) if key in ("text", "haystack") else own[key] for key in own}
        for task, own in given.items()
    }
    header = {
        "model": public_name(base),
        "adapter": folder and public_name(subject.name),
        "versions": versions(),
        "seed": options.seed,
        "settings": settings | {"samples": options.samples, "machine": machine(), "options": shown},
    }
    tasks, path = {name: TASKS[name] for name in options.tasks}, result_file(subject, options)
    reading = {"length": max(lengths), "load_in_4bit": not options.no_4bit, "kv_cache": kv_cache}
    with reading_explained(config, options.batch_size or 1, **reading):
        return evaluate(
            model, tokenizer, tasks, lengths=lengths, samples=options.samples, path=path, header=header, options=given
        )


def _dump(
    subject: Subject, options: Namespace, task_options: dict[str, dict[str, Any]], lengths: list[int], source: str
) -> dict[str, Any]:
    """Write the prompts that the subject would be asked to <dump_prompts>/LABEL-TASK-LENGTH.jsonl."""
    tokenizer = load_tokenizer(source)
    for task in options.tasks:
        if task not in GENERATED:
            raise ValueError(f"task {task} has no prompts to write out: leave it out of --tasks")
        for length in lengths:
            path = Path(options.dump_prompts) / f"{subject.label}-{task}-{length}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            list(TASKS[task](None, tokenizer, length, options.samples, options.seed, dump=path, **task_options[task]))
    return {}


def evaluate_models(options: Namespace) -> dict[str, dict[str, Any]]:
    """Label -> results for every model in `options.compare`, each kept in its own file of `options.output_dir`.

    Raises:
        ValueError: on an unknown task, a length or number of samples below 1, or two models of one label.
    """
    for task in options.tasks:
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}: use one of {', '.join(TASKS)}")
    for name, values in (("samples", [options.samples]), ("lengths", options.lengths or [])):
        if min(values, default=1) < 1:
            raise ValueError(f"--{name} {min(values)} must be at least 1")
    for depth in options.depths or []:
        if not 0 <= depth <= 1:
            raise ValueError(f"--depths {depth:g} must lie between 0 (start) and 1 (end)")
    if options.kv_cache != "auto":
        refuse_unusable(options.kv_cache)
    if "perplexity" in options.tasks and options.text is None:
        raise ValueError("task perplexity has no text: set --text to a file, or to a folder of .txt and .md files")
    for name in ("text", "haystack"):
        value = getattr(options, name)
        is_path = name == "haystack" or Path(str(value)).suffix in TEXT_SUFFIXES
        if value is not None and is_path and not Path(value).exists():
            raise ValueError(f"--{name} {value}: no such file or folder")
    task_options = _task_options(options)
    return {subject.label: _measure(subject, options, task_options) for subject in subjects_of(options)}


def add_harness_options(parser: ArgumentParser) -> None:
    """The options of `cream-peft lm-eval`."""
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
    parser.add_argument("--metadata", type=json.loads, help="for tasks that want it: '{\"max_seq_lengths\": [32768]}'")
    parser.add_argument("--base_model", help="folder or Hub id to take adapters' bases from, instead of the one named")
    parser.add_argument("--no_4bit", action="store_true", help="load bases unquantized")
    parser.add_argument("--output_dir", default="runs/lm-eval", help="folder of the results (default: runs/lm-eval)")


def run_lm_eval(options: Namespace) -> dict[str, dict[str, Any]]:
    """Label -> lm-eval's results for every model in `options.compare`, each written to its file of output_dir."""
    found = {}
    for subject in subjects_of(options):
        # An unscaled base is measured at its own window, where the short benchmarks are.
        folder, settings, base, _ = open_subject(subject, options, DEFAULT_FACTOR if subject.rope_scaling_type else 1)
        model, tokenizer = load_subject(subject, folder, settings, options)
        header = {"model": public_name(base), "adapter": folder and public_name(subject.name), **settings}
        keys = ("max_length", "batch_size", "chat_template", "include_path", "metadata", "seed", "limit", "num_fewshot")
        given = {key: getattr(options, key) for key in keys}
        found[subject.label] = run_harness(model, tokenizer, options.tasks.split(","), header=header, **given)
        path = result_file(subject, options)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found[subject.label], indent=1) + "\n", encoding="utf-8")
    return found
