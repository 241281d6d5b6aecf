"""Models named on the command line, measured with the tasks of evals over lengths; what a kill leaves is resumed."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedConfig

from ..locks import locked
from ..model.kv_cache import PREFILL_CHUNK, refuse_unusable
from ..model.record import machine, versions
from ..plan.fit import fitting_kv_cache, reading_explained
from ..plan.memory import Reading
from ..tiny.documents import VOCABULARY_SIZE
from .models import OpenedModel, open_models, results_files
from .options import EvaluateOptions
from .prompts import TaskError, read_texts
from .results import Cell, Results
from .tasks import TASKS, Task

logger = logging.getLogger(__name__)


def _differing(earlier: Results, now: Results, tasks: Iterable[str]) -> list[str]:
    """What differs between the results in a file and those that would be added to it, in words."""
    found, wanted = (_flat(one.asdict(), set(tasks) & {cell.task for cell in earlier.cells}) for one in (earlier, now))
    differing = []
    for key in {**wanted, **found} if earlier.cells else ():
        was, new = found.get(key), wanted.get(key)
        if was != new:
            told = f" ({was}, now {new})" if isinstance(new, int | str | list) else ""
            differing.append(key + (" (the adapter was trained again)" if key == "adapter_sha256" else told))
    return differing


def _with_earlier(
    results: Results, path: Path, tasks: Iterable[str], overwrite: bool, unknown: str = "", say: bool = False
) -> Results:
    """`results` with what is at `path` already, if that was measured with the same settings; else a ValueError, or with
    `overwrite` the other tasks of what is there, if they were. `unknown` begins the settings that are not known yet;
    `say` which tasks will be deleted."""
    if not path.is_file():
        return results
    earlier = Results.read(path)
    differing = [told for told in _differing(earlier, results, tasks) if not unknown or not told.startswith(unknown)]
    if differing and overwrite:
        kept = [cell for cell in earlier.cells if cell.task not in tasks]
        # Options are of a task; the rest is of all.
        if wide := _differing(replace(earlier, cells=kept), results, ()):
            lost = ", ".join(dict.fromkeys(cell.task for cell in kept))
            if say:
                logger.warning("%s: %s is deleted too, it was measured with other settings, %s", path, lost, wide[0])
            return results
        earlier = replace(earlier, cells=kept)
    elif differing:
        raise ValueError(
            f"{path} was measured with other settings, {differing[0]}: choose another --output_dir, or replace it "
            "with --overwrite"
        )
    both = earlier.settings.options | results.settings.options
    return replace(results, settings=replace(results.settings, options=both), cells=list(earlier.cells))


def _flat(content: dict[str, Any], tasks: Iterable[str]) -> dict[str, Any]:
    """What decides the values of a results file, the options being those of `tasks`."""
    settings = content["settings"]
    options = {f"{key} of {task}": value for task in tasks for key, value in settings["options"].get(task, {}).items()}
    return {key: content[key] for key in ("model", "adapter", "versions", "seed")} | settings | {"options": 0} | options


@contextmanager
def _of_task(label: str, task: str) -> Generator[None]:
    try:
        yield
    except TaskError as error:
        raise TaskError(f"{label}, {task}: {error}") from error


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Callable[..., Iterable[Mapping[str, Any]]]],
    results: Results,
    path: Path | None,
    *,
    lengths: list[int],
    samples: int,
    options: Mapping[str, dict[str, Any]] | None = None,
    overwrite: bool = False,
) -> Results:
    """Measure every task at every length (tokens) and return the results, written to `path`, if any, after each cell.

    `results` says of which model and with which settings; a file at `path` of the same is resumed, and its other tasks
    and lengths stay. `options`: task -> keyword arguments of its own. `overwrite`: replace a file that was measured
    with other settings, once the first cell is measured.

    Raises:
        ValueError: if the file at `path` was measured otherwise, without `overwrite`.
    """
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        results = _with_earlier(results, path, tasks, overwrite)
    pending = [(name, length) for name in tasks for length in lengths]
    # By tokens, not by cells: one at 32K takes as long as eight at 4K.
    total = sum(length for _, length in pending)
    label, shape = results.settings.label or results.model, "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=total, desc=f"evaluate {label}", bar_format=shape, delay=0) as bar:
        for name, length in pending:
            bar.set_postfix(task=name, length=length)
            done = [cell.depth for cell in results.of_task(name) if cell.length == length]
            begin = start = time.perf_counter()
            own = (options or {}).get(name, {})
            with _of_task(label, name):
                for cell in tasks[name](model, tokenizer, length, samples, results.seed, done=done, **own):
                    seconds = round(time.perf_counter() - start, 3)
                    results.cells.append(Cell(task=name, length=length, seconds=seconds, **cell))
                    if path:
                        results.write(path)
                    start = time.perf_counter()
            bar.update(length)
            if bar.disable:
                seconds = time.perf_counter() - begin
                logger.info(f"{label}: {name} at {length:,} tokens took {seconds:.0f} s")
    if path and not path.is_file():
        results.write(path)
    return results


def refuse_other_vocabulary(tasks: list[str], config: PreTrainedConfig, name: str) -> None:
    """Raise a ValueError for a task that the model `name` cannot read: it, or the embedded model, has a vocabulary of
    its own."""
    own = [task for task in ("recall", "new_skill") if task in tasks]
    if own and config.vocab_size != VOCABULARY_SIZE:
        raise ValueError(f"task {own[0]} is for the embedded model's vocabulary, {name} has another: leave it out")
    known = [task for task in TASKS if TASKS[task].embedded]
    text = [task for task in tasks if task not in known]
    if text and config.vocab_size == VOCABULARY_SIZE:
        raise ValueError(f"{name} reads no text, which {text[0]} is: its tasks are {', '.join(known)}")


def _opened(options: EvaluateOptions) -> list[tuple[OpenedModel, list[int]]]:
    """Each model and the lengths it is asked at."""
    found = []
    same = {name: getattr(options, name) for name in ("target_length", "base_model", "load_in_4bit", "dtype")}
    models = open_models(options.compare, **same)
    fed = [model.context_length for model in models if model.context_length]
    for model in models:
        refuse_other_vocabulary(options.tasks, model.config, model.spec.name)
        if options.kv_cache != "auto":
            refuse_unusable(options.kv_cache, model.config)
        window, target = model.settings.pretrained_window or 0, model.settings.target_length or 0
        # What was taught within the window is asked from the length on that it was taught at.
        first = min(fed, default=window) if target <= window else window
        lengths = options.lengths or [first * 2**power for power in range(20) if first * 2**power <= target]
        if options.lengths is None and (options.keys or options.lines):
            # So many keys are as long as they are; the longest length has room for them.
            lengths = [target]
        if not lengths:
            raise ValueError(f"{model.spec.name} has a window of {window:,} tokens, above its target: set --lengths")
        # What is too short for a task is refused before a longer one takes hours.
        found.append((model, sorted(set(lengths))))
    return found


@dataclass(frozen=True)
class Texts:
    """What is read of the user's texts, the same for all models that are compared."""

    documents: list[str] | None
    """Those that --text names, where it is a data set; else the task reads its files."""
    least: int
    """Tokens that a document of perplexity has at least, for the longest length of any model."""
    digests: dict[str, str]
    """Option -> SHA-256 of the texts that it names."""

    @classmethod
    def of(cls, options: EvaluateOptions, documents: list[str] | None, lengths: Iterable[int]) -> Texts:
        texts = {"text": documents} if documents else {}
        for name in ("text", "haystack"):
            path = getattr(options, name)
            if path and name not in texts:
                try:
                    texts[name] = read_texts(path)
                except TaskError as error:
                    raise TaskError(f"--{name}: {error}") from error
        digests = {name: sha256(json.dumps(found).encode()).hexdigest() for name, found in texts.items()}
        return cls(documents, max(lengths), digests)


def _planned(
    opened: OpenedModel, texts: Texts, options: EvaluateOptions, kv_cache: str
) -> tuple[Results, dict[str, dict[str, Any]]]:
    """What the results will say of the model and of how it is asked, and the options of each task."""
    shown = {task: options.of_task(task) for task in options.tasks}
    for task in shown:
        if "chunk_length" in TASKS[task].options:
            shown[task]["kv_cache"] = kv_cache
    if "perplexity" in shown:
        # Every length and every model scores the same documents.
        shown["perplexity"]["min_tokens"] = texts.least
    # A path is told by its last part, and what lies there may change.
    told = {
        task: own | {f"{name}_sha256": digest for name, digest in texts.digests.items() if name in own}
        for task, own in shown.items()
    }
    settings = replace(opened.settings, samples=options.samples, machine=machine(), options=told)
    adapter = opened.spec.name if opened.adapter else None
    return Results(opened.base, adapter, versions(), options.seed, settings), shown


def _given(shown: dict[str, dict[str, Any]], texts: Texts) -> dict[str, dict[str, Any]]:
    """The options of each task, with the texts of a data set in place of its name."""
    documents = {"perplexity": {"text": texts.documents}} if texts.documents else {}
    return {task: own | documents.get(task, {}) for task, own in shown.items()}


def refuse_impossible(
    opened: OpenedModel, tokenizer: Any, lengths: list[int], options: EvaluateOptions, texts: Texts
) -> None:
    """Raise a TaskError, before anything is measured, for what the tokenizer alone tells of the shortest length: that a
    question does not fit, or that the texts are too short."""
    _, shown = _planned(opened, texts, options, options.kv_cache)
    for task, own in _given(shown, texts).items():
        with _of_task(opened.spec.label, task):
            TASKS[task].check(tokenizer, min(lengths), options.seed, **own)


def measure(
    opened: OpenedModel,
    model: Any,
    tokenizer: Any,
    lengths: list[int],
    options: EvaluateOptions,
    texts: Texts,
    path: Path | None,
) -> Results:
    """What `options` asks of one model, which is loaded; in the file at `path` too."""
    longest, kv_cache = max(lengths), options.kv_cache
    record = getattr(model, "trained_record", None)
    if record and longest > record.target_length:
        told = (opened.spec.label, f"{longest:,}", f"{record.target_length:,}")
        logger.warning("%s is asked at %s tokens, and was trained for %s", *told)
    chunk_length = options.chunk_length or PREFILL_CHUNK
    reading = Reading(length=longest, load_in_4bit=options.load_in_4bit, chunk_length=chunk_length)
    if kv_cache == "auto":
        kv_cache = fitting_kv_cache(opened.config, reading)
    results, shown = _planned(opened, texts, options, kv_cache)
    given = _given(shown, texts)
    common: dict[str, Any] = {"lengths": lengths, "samples": options.samples, "overwrite": options.overwrite}
    tasks = {name: TASKS[name] for name in options.tasks}
    with reading_explained(opened.config, replace(reading, kv_cache=kv_cache)):
        return evaluate(model, tokenizer, tasks, results, path, options=given, **common)


def evaluate_models(options: EvaluateOptions, documents: list[str] | None = None) -> dict[str, Results]:
    """Label -> results of every model in `options.compare`, each kept in its own file of `options.output_dir`.

    `documents`: the texts that `options.text` names, where it is a data set.

    Raises:
        ValueError: before any model is measured, if two have one file, a file was measured with other settings, or a
            length is too short for a task.
        LockedError: if another process writes one of the files.
    """
    found = _opened(options)
    files = results_files((opened for opened, _ in found), options.output_dir)
    texts = Texts.of(options, documents, (length for _, lengths in found for length in lengths))
    with ExitStack() as locks:
        for path in files.values():
            refusal = f"{path} is being written by another `cream-peft evaluate`: wait, or choose another --output_dir"
            locks.enter_context(locked(path.with_name(f".{path.name}.lock"), refusal))
        for opened, _ in found:
            planned, _ = _planned(opened, texts, options, options.kv_cache)
            # Which cache fits is known once the model is loaded.
            unknown = "kv_cache of " if options.kv_cache == "auto" else ""
            _with_earlier(planned, files[opened.spec.label], options.tasks, options.overwrite, unknown, say=True)
        for opened, lengths in found:
            refuse_impossible(opened, opened.tokenizer(), lengths, options, texts)
        results = {
            opened.spec.label: measure(opened, *opened.load(), lengths, options, texts, files[opened.spec.label])
            for opened, lengths in found
        }
    _say_other_caches(results)
    return results


def _say_other_caches(results: dict[str, Results]) -> None:
    caches = {
        label: own["kv_cache"]
        for label, one in results.items()
        for own in one.settings.options.values()
        if "kv_cache" in own
    }
    if len(set(caches.values())) > 1:
        told = ", ".join(f"{label}: {kind}" for label, kind in caches.items())
        logger.warning("the models had different KV caches (%s), which tell in their answers: set --kv_cache", told)


def write_prompts(options: EvaluateOptions, folder: Path) -> None:
    """Write the prompts that each model would be asked to <folder>/LABEL-TASK-LENGTH.jsonl, and measure nothing."""
    for opened, lengths in _opened(options):
        tokenizer = opened.tokenizer()
        for task in options.tasks:
            if not isinstance(TASKS[task], Task):
                raise ValueError(f"task {task} has no prompts to write out: leave it out of --tasks")
            for length in lengths:
                path = folder / f"{opened.spec.label}-{task}-{length}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
                own: dict[str, Any] = {**options.of_task(task), "dump": path}
                list(TASKS[task](None, tokenizer, length, options.samples, options.seed, **own))
