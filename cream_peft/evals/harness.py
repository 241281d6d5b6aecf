"""The field's own benchmarks, through EleutherAI's lm-eval, on a model whose RoPE is scaled as its adapter was trained.

With `peft=`, lm-eval itself puts an adapter on the base as its config.json has it: unscaled, and prompts cut to the
pretrained window. Here the loaded model is handed over. It is an extra: `pip install -e '.[lm-eval]'` in a clone.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import rope
from ..errors import about
from ..model.record import machine, versions, write_json
from ..model.secrets import without_secrets
from ..terminal import table
from .models import open_models
from .results import file_name

SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
LEFT_OUT = ("pretty_env_info", "git_hash", "upper_git_hash")
"""What lm-eval says of the machine, and of whatever repository it was started in."""
ARROWS = {True: " ↑", False: " ↓"}


class HarnessError(ValueError):
    """lm-eval is not installed, or what was asked of it does not exist or does not fit the model."""


def _load_tasks(manager: Any, tasks: list[str]) -> list[Any]:
    """lm-eval's objects, with their data, of tasks, groups, tags and patterns such as `mmlu_*`."""
    loaded = []
    for task in tasks:
        names = manager.match_tasks([task])
        if not names:
            near = ", ".join(difflib.get_close_matches(task, manager.all_tasks))
            hint = f"did you mean {near}" if near else "`lm-eval ls tasks` lists them"
            raise HarnessError(f"lm-eval has no task {task!r}: {hint}, or give the folder of its YAML as include_path")
        for name in names:
            with about(f"the data set of task {name}"):
                found = manager.load(name)
            loaded += [found["groups"][name]] if name in found["groups"] else found["tasks"].values()
    return loaded


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
    return HFLM(pretrained=model, tokenizer=tokenizer, max_length=max_length or reach, batch_size=batch_size)


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: list[str],
    *,
    max_length: int | None = None,
    batch_size: int = 1,
    chat_template: bool = False,
    include_path: str | Path | None = None,
    metadata: Mapping[str, Any] | None = None,
    seed: int | None = None,
    header: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run lm-eval's `tasks` on a model of `load_adapter` or `load_base`.

    Multiple-choice tasks make logits for whole prompts: 8 GiB, twice, for 32,768 tokens of Llama-3 in bfloat16.

    Args:
        max_length: tokens of prompt and answer; lm-eval cuts longer prompts at their beginning, and warns. None: all
            that the model is scaled to.
        include_path: folder of task YAMLs beside lm-eval's own.
        metadata: settings of tasks that make their data, such as RULER's {"max_seq_lengths": [32768]}, which by default
            double from the pretrained window to max_length. With a limit it is max_length alone, since RULER's samples
            are in order of length.
        seed: None for lm-eval's own seeds, with which published figures were made.
        header: what the results say of the model: model, adapter, adapter_sha256, rope_scaling_type, ...
        options: for lm-eval's simple_evaluate: limit (samples of each task), num_fewshot, gen_kwargs, ...

    Returns:
        lm-eval's results, which its own tools read, and under "cream_peft" the header, versions, machine and the RoPE
        that the model ran with. No samples, no local paths.

    Raises:
        HarnessError: without lm-eval; on an unknown task, a number out of range, or a missing chat template.
        RopeError: if the model's RoPE is not the one of its config.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import handle_non_serializable
    except ImportError as error:
        raise HarnessError(f"lm-eval is missing ({error}): pip install 'lm-eval[longbench,ruler]<0.5'") from error
    if any(number is not None and number < 1 for number in (max_length, batch_size, options.get("limit"))):
        raise HarnessError("max_length, batch_size and limit must be at least 1")
    if chat_template and not tokenizer.chat_template:
        raise HarnessError("the model's tokenizer has no chat template: ask without one")
    lm = _language_model(model, tokenizer, max_length, batch_size)
    window = (header or {}).get("pretrained_window") or lm.max_length
    doubled = [window * 2**power for power in range(20) if window * 2**power < lm.max_length]
    lengths = {"max_seq_lengths": [*([] if options.get("limit") else doubled), lm.max_length]}
    settings: dict[str, Any] = {"tokenizer": tokenizer.name_or_path, **lengths, **(metadata or {})}
    manager = TaskManager(include_path=include_path, metadata=settings)
    seeds = {} if seed is None else dict.fromkeys(SEEDS, seed)
    options |= {**seeds, "batch_size": batch_size, "apply_chat_template": chat_template, "log_samples": False}
    results = simple_evaluate(lm, tasks=_load_tasks(manager, tasks), task_manager=manager, **options)
    ours = {**(header or {}), "versions": versions(), "machine": machine(), "chat_template": chat_template}
    ours |= {key: getattr(model.config, key) for key in ("rope_parameters", "max_position_embeddings")}
    kept = {key: value for key, value in results.items() if key not in LEFT_OUT} | {"cream_peft": ours}
    return without_secrets(json.loads(json.dumps(kept, default=handle_non_serializable)))


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
    tasks: str,
    *,
    output_dir: str,
    target_length: int | None = None,
    base_model: str | None = None,
    load_in_4bit: bool = True,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Label -> lm-eval's results for every model in `compare` (see `ModelSpec`), each in its file of `output_dir` too.

    An unscaled base is measured at its own window, where the short benchmarks are. `options`: see `run_harness`.
    """
    found = {}
    models = open_models(
        compare, target_length=target_length, base_model=base_model, load_in_4bit=load_in_4bit, within_window=True
    )
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    for opened in models:
        model, tokenizer = opened.load()
        known = {key: value for key, value in asdict(opened.settings).items() if value is not None and key != "options"}
        header = {"model": opened.base, "adapter": opened.spec.name if opened.adapter else None, **known}
        label = opened.spec.label
        found[label] = run_harness(model, tokenizer, tasks.split(","), header=header, **options)
        write_json(Path(output_dir) / file_name(label), found[label])
    return found
