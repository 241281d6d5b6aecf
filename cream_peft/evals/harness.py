"""The field's own benchmarks, through EleutherAI's lm-eval, on a model whose RoPE is scaled as its adapter was trained.

With `peft=`, lm-eval itself puts an adapter on the base as its config.json has it: unscaled, and prompts cut to the
pretrained window. Here the loaded model is handed over. It is an extra: `pip install -e '.[lm-eval]'` in a clone.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
import random
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from .. import rope
from ..errors import about
from ..locks import locked
from ..model.record import machine, versions
from ..model.secrets import without_secrets
from ..terminal import table
from .models import open_models, results_files
from .presets import (
    INSTALL,
    PRESETS,
    RULER_FIRST,
    WITHOUT_CHAT,
    HarnessError,
    check_needs,
    cut_in_the_middle,
    local_data,
    longbench_cut,
    preset_means,
)
from .results import write_whole

SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
LEFT_OUT = ("pretty_env_info", "git_hash", "upper_git_hash")
"""What lm-eval says of the machine, and of whatever repository it was started in."""
ARROWS = {True: " ↑", False: " ↓"}


PER_TASK = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
"""What lm-eval's results hold by task."""


def _names(manager: Any, task: str) -> list[str]:
    """lm-eval's names of a task, group, tag or pattern such as `arc_*`; of a pattern the tasks, once each."""
    names = manager.match_tasks([task])
    if "*" in task:
        # lm-eval refuses a task beside its own group.
        names = [name for name in names if name in manager.all_subtasks] or names
    if not names:
        near = ", ".join(difflib.get_close_matches(task, manager.all_tasks))
        hint = f"did you mean {near}" if near else "`lm-eval ls tasks` lists them"
        raise HarnessError(f"lm-eval has no task {task!r}: {hint}, or give the folder of its YAML as include_path")
    return names


def _load_tasks(manager: Any, names: list[str], seed: int | None) -> list[Any]:
    """lm-eval's objects of tasks, with their data."""
    loaded = []
    for name in names:
        # RULER draws its data now, before lm-eval sets its seeds: they would differ from model to model.
        random.seed(seed or 0)
        np.random.seed(1234 if seed is None else seed)
        with about(f"the data set of task {name} (of the Hub, unless --data_dir has it)"):
            found = manager.load(name)
        loaded += [found["groups"][name]] if name in found["groups"] else found["tasks"].values()
    return loaded


def _earlier(path: Path | None, ours: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """The results at `path`, if that was asked in the same way; else those of no task yet."""
    nothing = {"cream_peft": ours}
    if path is None or not path.is_file() or overwrite:
        return nothing
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        was, now = ({**one, **one["asked"]} for one in (found["cream_peft"], ours))
        different = [key for key in now if key not in ("machine", "tasks", "asked") and was.get(key) != now[key]]
        different += [] if isinstance(was["tasks"], list) else ["tasks"]
    except (ValueError, KeyError, TypeError, AttributeError):
        different = ["form"]
    if different:
        remedy = "choose another --output_dir, or replace it with --overwrite"
        raise HarnessError(f"{path} was written with another {different[0]}: {remedy}")
    return found


def _with(found: dict[str, Any], more: dict[str, Any], task: str) -> dict[str, Any]:
    """The results of the tasks so far and of one more."""
    ours = found["cream_peft"] | {"tasks": [*found["cream_peft"]["tasks"], task]}
    joined = {key: found.get(key, {}) | more.get(key, {}) for key in PER_TASK if key in found or key in more}
    return {**found, **more, **joined, "cream_peft": ours}


def _language_model(model: Any, tokenizer: Any, max_length: int | None, batch_size: int) -> Any:
    """lm-eval's wrapper of a loaded model, if the model's RoPE is its config's and reaches max_length."""
    from lm_eval.models.huggingface import HFLM

    rope.check_scaling(model, model.config)
    reach = rope.pretrained_window(model.config)
    if max_length is not None and max_length > reach:
        raise HarnessError(f"max_length {max_length} is beyond the {reach} tokens the model is scaled to: lower it")
    if tokenizer.eos_token is None:
        # lm-eval ends answers at it, and fails on None.
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.eos_token = tokenizer.pad_token
    # Templates that know it would else fill the few tokens of an answer with thoughts.
    settings: dict[str, Any] = {"max_length": max_length or reach, "batch_size": batch_size, "enable_thinking": False}
    return HFLM(pretrained=model, tokenizer=tokenizer, **settings)


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: list[str],
    *,
    max_length: int | None = None,
    batch_size: int = 1,
    chat_template: bool | None = None,
    include_path: str | Path | None = None,
    metadata: Mapping[str, Any] | None = None,
    seed: int | None = None,
    header: Mapping[str, Any] | None = None,
    preset: str | None = None,
    data_dir: str | None = None,
    path: Path | None = None,
    overwrite: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Run lm-eval's `tasks`, or those of a preset, on a model of `load_adapter` or `load_base`.

    Multiple-choice tasks make logits for whole prompts: 8 GiB, twice, for 32,768 tokens of Llama-3 in bfloat16.

    Args:
        max_length: tokens of prompt and answer; lm-eval cuts longer prompts at their beginning, and warns. None: all
            that the model is scaled to.
        chat_template: whether prompts are put in the chat template; None: those of preset longbench, if there is one.
        include_path: folder of task YAMLs beside lm-eval's own.
        metadata: settings of tasks that make their data, such as RULER's {"max_seq_lengths": [32768]}, which by default
            double from 4,096, or a shorter pretrained window, to max_length. With a limit it is max_length alone, since
            RULER's samples are in order of length.
        seed: None for lm-eval's own seeds, with which published figures were made.
        header: what the results say of the model: model, adapter, adapter_sha256, rope_scaling_type, ...
        preset: short, longbench (its prompts cut in the middle) or ruler, in place of `tasks`; see `PRESETS`.
        data_dir: folder with data sets in place of the Hub; see `local_data`.
        path: file of the results, written after each task; the tasks that it holds already are not asked again.
        overwrite: replace a file that was asked in another way.
        options: for lm-eval's simple_evaluate: limit (samples of each task), num_fewshot, gen_kwargs, ...

    Returns:
        lm-eval's results, which its own tools read, and under "cream_peft" the header, versions, machine and the RoPE
        that the model ran with. No samples, no local paths.

    Raises:
        HarnessError: without lm-eval; on an unknown task, a number out of range, or a missing chat template; if the
            file at `path` was asked in another way.
        RopeError: if the model's RoPE is not the one of its config.
    """
    try:
        from lm_eval import evaluator
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import handle_non_serializable
    except ImportError as error:
        raise HarnessError(f"lm-eval is missing ({error}): {INSTALL}") from error
    if any(number is not None and number < 1 for number in (max_length, batch_size, options.get("limit"))):
        raise HarnessError("max_length, batch_size and limit must be at least 1")
    if chat_template is None:
        chat_template = preset == "longbench" and bool(tokenizer.chat_template)
    if chat_template and not tokenizer.chat_template:
        raise HarnessError("the model's tokenizer has no chat template: ask without one")
    if preset and options.get("num_fewshot") is not None:
        raise HarnessError(f"preset {preset} has shots of its own: leave num_fewshot out")
    shots = {task: number for task, (number, _) in PRESETS[preset].tasks.items()} if preset else {}
    lm = _language_model(model, tokenizer, max_length, batch_size)
    first = min(RULER_FIRST, (header or {}).get("pretrained_window") or lm.max_length)
    doubled = [first * 2**power for power in range(20) if first * 2**power < lm.max_length]
    lengths = {"max_seq_lengths": [*([] if options.get("limit") else doubled), lm.max_length]}
    settings: dict[str, Any] = {"tokenizer": tokenizer.name_or_path, **lengths, **(metadata or {})}
    manager = TaskManager(include_path=include_path, metadata=settings)
    seeds = {} if seed is None else dict.fromkeys(SEEDS, seed)
    folders = {"data_dir": data_dir, "include_path": include_path}
    asked: dict[str, Any] = {name: folder and Path(folder).resolve().name for name, folder in folders.items()}
    asked |= {"preset": preset, "max_length": lm.max_length, "metadata": {**lengths, **(metadata or {})}, "seed": seed}
    ours = {**(header or {}), "versions": versions(), "machine": machine(), "chat_template": chat_template, "tasks": []}
    ours |= {key: getattr(model.config, key) for key in ("rope_parameters", "max_position_embeddings")}
    ours = _plain(ours | {"asked": asked | options}, handle_non_serializable)
    found = _earlier(path, ours, overwrite)
    for task, names in [(task, _names(manager, task)) for task in shots or tasks]:
        if task in found["cream_peft"]["tasks"]:
            continue
        with local_data(data_dir):
            loaded = _load_tasks(manager, names, seed)
        given = {**options, **seeds, "batch_size": batch_size, "apply_chat_template": chat_template}
        if preset == "longbench":
            for one in loaded:
                one.doc_to_text = cut_in_the_middle(one.doc_to_text, tokenizer, longbench_cut(lm.max_length))
            given["apply_chat_template"] = chat_template and task.removeprefix("longbench_") not in WITHOUT_CHAT
        if shots.get(task) is not None:
            given["num_fewshot"] = shots[task]
        # Outside a repository git would complain of a hash that is left out.
        with patch.object(evaluator, "get_git_commit_hash", lambda: None):
            results = evaluator.simple_evaluate(lm, tasks=loaded, task_manager=manager, log_samples=False, **given)
        kept = {key: value for key, value in results.items() if key not in LEFT_OUT}
        found = _with(found, _plain(kept, handle_non_serializable), task)
        if path:
            write_whole(path, json.dumps(found, indent=2) + "\n")
    return found


def _plain(content: Any, default: Any) -> Any:
    """What JSON makes of it, without tokens and local paths."""
    return without_secrets(json.loads(json.dumps(content, default=default)))


def _rows(result: Mapping[str, Any]) -> dict[tuple[str, ...], str]:
    """(task, samples, shots, metric) -> "value ± standard error" of one model."""
    rows = {}
    for task, metrics in result["results"].items():
        samples, shots = result["n-samples"].get(task, {}).get("effective", ""), result["n-shot"].get(task, "")
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            # RULER gives -1 for the lengths that were not asked.
            unasked = metric.isdigit() and value == -1
            if not filtered or metric.endswith("_stderr") or unasked or not isinstance(value, int | float):
                continue
            name = metric + ("" if filtered == "none" else f" ({filtered})")
            name += ARROWS.get(result["higher_is_better"].get(task, {}).get(metric), "")
            error = metrics.get(f"{metric}_stderr,{filtered}")
            is_known = isinstance(error, int | float) and math.isfinite(error)
            rows[task, str(samples), str(shots), name] = f"{value:.4f}" + (f" ± {error:.4f}" if is_known else "")
    for name, value in preset_means(result).items():
        rows[f"mean of {result['cream_peft']['asked']['preset']}", "", "", name] = f"{value:.4f}"
    return rows


def table_of_harness(results: Mapping[str, dict[str, Any]]) -> str:
    """One table of label -> results: a row a task and metric, a column a model.

    What was asked with another number of samples or examples stands in another row.
    """
    columns = [_rows(result) for result in results.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(*name, *(column.get(name, "-") for column in columns)) for name in names]
    return table(("task", "samples", "shots", "metric", *results), rows)


def run_lm_eval(
    compare: list[str],
    tasks: str | None = None,
    *,
    output_dir: str,
    preset: str | None = None,
    data_dir: str | None = None,
    target_length: int | None = None,
    base_model: str | None = None,
    load_in_4bit: bool = True,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Label -> lm-eval's results for every model in `compare` (see `ModelSpec`), each in its file of `output_dir` too,
    LABEL.json, or LABEL-PRESET.json.

    An unscaled base is measured at its own window, where the short benchmarks are. `options`: see `run_harness`.
    """
    if bool(tasks) == bool(preset):
        raise HarnessError(f"give either --tasks or --preset, which is one of {', '.join(PRESETS)}")
    check_needs(preset, data_dir)
    options |= {"preset": preset, "data_dir": data_dir}
    found = {}
    models = open_models(
        compare, target_length=target_length, base_model=base_model, load_in_4bit=load_in_4bit, within_window=True
    )
    files = results_files(models, output_dir, f"-{preset}" if preset else "")
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    for opened in models:
        known = {key: value for key, value in asdict(opened.settings).items() if value is not None and key != "options"}
        header = {"model": opened.base, "adapter": opened.spec.name if opened.adapter else None, **known}
        path = files[opened.spec.label]
        refusal = f"{path} is being written by another `cream-peft lm-eval`: wait, or choose another --output_dir"
        with locked(path.with_name(f".{path.name}.lock"), refusal):
            asked = tasks.split(",") if tasks else []
            # Held by no name, the model makes room for the next one.
            found[opened.spec.label] = run_harness(*opened.load(), asked, header=header, path=path, **options)
    return found
