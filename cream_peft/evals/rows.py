"""`cream_peft.evaluate`: a model that is loaded already, measured as `cream-peft evaluate` does, as rows for pandas."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from .models import ModelSpec, OpenedModel
from .options import EvaluateOptions
from .results import Settings
from .run import Texts, measure, refuse_impossible, refuse_other_vocabulary
from .tasks import option_names


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Iterable[str],
    lengths: Iterable[int] | int,
    *,
    samples: int = 32,
    seed: int = 1000,
    kv_cache: str = "auto",
    **options: Any,
) -> list[dict[str, Any]]:
    """Measure a model of `load_adapter`, `load_base` or a trainer; `pandas.DataFrame(rows)` reads what comes of it.

    Args:
        tasks: of `TASKS`, such as kv_retrieval and needle.
        lengths: tokens of a prompt and its answer; a number is one length.
        samples, seed, kv_cache: as those of `cream-peft evaluate`.
        options: of single tasks, as there: depths, keys, style, haystack, ... `text` may be a list of documents too.

    Returns:
        a row a task, length and depth: task, length, depth, metric, value, samples, seconds, and of prompts their mean
        number of tokens, correct (0 or 1 for each sample), answer_loss and alone_loss (means, nats per token; see
        `results.Cell`).

    Raises:
        ValueError: an unknown task or option, one that no task takes, or a task that the model cannot read.
    """
    known = sorted({"samples", "seed", "kv_cache", *option_names()})
    for name in options:
        if name not in known:
            raise ValueError(f"unknown option {name}: use one of {', '.join(known)}")
    if isinstance(lengths, int):
        lengths = [lengths]
    text, documents = options.pop("text", None), None
    if text is not None and not isinstance(text, str | Path):
        documents, text = list(text), "documents"
    asked = EvaluateOptions(
        compare=[],
        tasks=[tasks] if isinstance(tasks, str) else list(tasks),
        samples=samples,
        seed=seed,
        output_dir="",
        lengths=list(lengths),
        load_in_4bit=bool(getattr(model, "is_loaded_in_4bit", False)),
        kv_cache=kv_cache,
        text=None if text is None else str(text),
        **options,
    )
    name = getattr(model.config, "_name_or_path", "") or "the model"
    refuse_other_vocabulary(asked.tasks, model.config, name)
    label = "the adapter" if hasattr(model, "trained_record") else name
    opened = OpenedModel(ModelSpec(label, name), None, name, model.config, Settings(load_in_4bit=asked.load_in_4bit))
    was_training = model.training
    model.eval()
    try:
        texts = Texts.of(asked, documents, asked.lengths or [])
        refuse_impossible(opened, tokenizer, asked.lengths or [], asked, texts)
        results = measure(opened, model, tokenizer, asked.lengths or [], asked, texts, None)
    finally:
        model.train(was_training)
    rows = []
    for cell in results.cells:
        row = {key: value for key, value in asdict(cell).items() if value is not None and key != "first_prompt"}
        rows.append(row | {key: fmean(row[key]) for key in ("answer_loss", "alone_loss") if key in row})
    return rows
