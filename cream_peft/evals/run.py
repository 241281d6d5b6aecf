"""Models named on the command line, measured with the tasks of evals over lengths; what a kill leaves is resumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedConfig

from ..model.record import machine, versions
from ..plan.fit import fitting_kv_cache, reading_explained
from ..plan.memory import Reading
from ..tiny.documents import VOCABULARY_SIZE
from .models import OpenedModel, open_models
from .options import EvaluateOptions
from .results import Cell, Results, file_name
from .tasks import TASKS, Task


def _refuse_other_settings(path: Path, earlier: Results, now: Results, tasks: Iterable[str]) -> None:
    """A ValueError that names what differs between the results in a file and those that would be added to it."""
    found, wanted = (_flat(one.asdict(), set(tasks) & {cell.task for cell in earlier.cells}) for one in (earlier, now))
    differing = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if earlier.cells and differing:
        was, new = found.get(differing[0]), wanted.get(differing[0])
        told = f" ({was}, now {new})" if isinstance(new, int | str | list) else ""
        told = " (the adapter was trained again)" if differing[0] == "adapter_sha256" else told
        raise ValueError(
            f"{path} was measured with other settings, {differing[0]}{told}: choose another --output_dir, or delete it"
        )


def _flat(content: dict[str, Any], tasks: Iterable[str]) -> dict[str, Any]:
    """What decides the values of a results file, the options being those of `tasks`."""
    settings = content["settings"]
    options = {f"{key} of {task}": value for task in tasks for key, value in settings["options"].get(task, {}).items()}
    return {key: content[key] for key in ("model", "adapter", "versions", "seed")} | settings | {"options": 0} | options


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Callable[..., Iterable[Mapping[str, Any]]]],
    results: Results,
    path: Path,
    *,
    lengths: list[int],
    samples: int,
    options: Mapping[str, dict[str, Any]] | None = None,
) -> Results:
    """Measure every task at every length (tokens) and return the results, written to `path` after each cell.

    `results` says of which model and with which settings; a file at `path` of the same is resumed, and its other tasks
    and lengths stay. `options`: task -> keyword arguments of its own.

    Raises:
        ValueError: if the file at `path` was measured otherwise: nothing that was measured is thrown away.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        earlier = Results.read(path)
        _refuse_other_settings(path, earlier, results, tasks)
        both = earlier.settings.options | results.settings.options
        results = replace(results, settings=replace(results.settings, options=both), cells=list(earlier.cells))
    pending = [(name, length) for name in tasks for length in lengths]
    # By tokens, not by cells: one at 32K takes as long as eight at 4K.
    total = sum(length for _, length in pending)
    shape = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(
        total=total, desc=f"evaluate {results.settings.label or results.model}", bar_format=shape, delay=0
    ) as bar:
        for name, length in pending:
            bar.set_postfix(task=name, length=length)
            done = [cell.depth for cell in results.of_task(name) if cell.length == length]
            start = time.perf_counter()
            own = (options or {}).get(name, {})
            for cell in tasks[name](model, tokenizer, length, samples, results.seed, done=done, **own):
                seconds = round(time.perf_counter() - start, 3)
                results.cells.append(Cell(task=name, length=length, seconds=seconds, **cell))
                results.write(path)
                start = time.perf_counter()
            bar.update(length)
    if not path.is_file():
        results.write(path)
    return results


def _refuse_other_vocabulary(tasks: list[str], config: PreTrainedConfig, name: str) -> None:
    if "recall" in tasks and config.vocab_size != VOCABULARY_SIZE:
        raise ValueError(f"task recall is for the embedded model's vocabulary, {name} has another: leave it out")
    known = [task for task in TASKS if TASKS[task].embedded]
    text = [task for task in tasks if task not in known]
    if text and config.vocab_size == VOCABULARY_SIZE:
        raise ValueError(f"{name} reads no text, which {text[0]} is: its tasks are {', '.join(known)}")


def _opened(options: EvaluateOptions) -> list[tuple[OpenedModel, list[int]]]:
    """Each model and the lengths it is asked at."""
    found = []
    target, in_4bit = options.target_length, options.load_in_4bit
    models = open_models(options.compare, target_length=target, base_model=options.base_model, load_in_4bit=in_4bit)
    for model in models:
        _refuse_other_vocabulary(options.tasks, model.config, model.spec.name)
        window, target = model.settings.pretrained_window or 0, model.settings.target_length or 0
        lengths = options.lengths or [window * 2**power for power in range(20) if window * 2**power <= target]
        if options.lengths is None and (options.keys or options.lines):
            # So many keys are as long as they are; the longest length has room for them.
            lengths = [target]
        found.append((model, lengths))
    return found


def _measure(opened: OpenedModel, lengths: list[int], options: EvaluateOptions, documents: list[str] | None) -> Results:
    model, tokenizer = opened.load()
    longest, kv_cache = max(lengths), options.kv_cache
    if kv_cache == "auto":
        kv_cache = fitting_kv_cache(opened.config, longest)
    shown = {task: options.of_task(task) for task in options.tasks}
    for task in shown:
        if "chunk_length" in TASKS[task].options:
            shown[task]["kv_cache"] = kv_cache
    if "perplexity" in shown:
        # Every length scores the same documents.
        shown["perplexity"]["min_tokens"] = longest
    given = {
        task: own | ({"text": documents} if documents and task == "perplexity" else {}) for task, own in shown.items()
    }
    settings = replace(opened.settings, samples=options.samples, machine=machine(), options=shown)
    adapter = opened.spec.name if opened.adapter else None
    results = Results(opened.base, adapter, versions(), options.seed, settings)
    tasks, path = {name: TASKS[name] for name in options.tasks}, Path(options.output_dir) / file_name(opened.spec.label)
    reading = Reading(length=longest, load_in_4bit=options.load_in_4bit, kv_cache=kv_cache)
    with reading_explained(opened.config, reading):
        return evaluate(model, tokenizer, tasks, results, path, lengths=lengths, samples=options.samples, options=given)


def evaluate_models(options: EvaluateOptions, documents: list[str] | None = None) -> dict[str, Results]:
    """Label -> results of every model in `options.compare`, each kept in its own file of `options.output_dir`.

    `documents`: the texts that `options.text` names, where it is a data set.
    """
    return {opened.spec.label: _measure(opened, lengths, options, documents) for opened, lengths in _opened(options)}


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
