"""The tasks: what is asked, where in the document the answer stands, and how a reply is graded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from ..model.kv_cache import PREFILL_CHUNK
from ..plugins import PluginError, add
from ..tiny.documents import MARK
from .answers import scored_answers
from .frequency import common_words_prompt, frequent_words_prompt
from .kv_retrieval import kv_depths, kv_prompt
from .longchat_lines import lines_prompt
from .needle import (
    multikey_prompt,
    needle_prompt,
    passkey_prompt,
    several_prompt,
    split_sentences,
    variable_tracking_prompt,
)
from .perplexity import perplexity, refuse_impossible
from .prompts import Case, Prompt, TaskError, Writer, contains, contains_all, digest_of, dump_prompts, first_integer
from .recall import embedded_kv_prompt, embedded_needle_prompt, is_embedded, recall

FIFTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Middles of five equal parts: their mean stands for a place drawn uniformly, as some of the originals draw it."""
SIXTEENTHS = tuple(round((place + 0.5) / 16, 4) for place in range(16))
THROUGHOUT = (1.0,)
"""Of what is spread over the document: one cell, as perplexity has it."""
TENTHS = tuple(round(tenth / 10, 1) for tenth in range(11))


@dataclass(frozen=True)
class Task:
    """Prompts of a known answer, called as task(model, tokenizer, length, samples, seed, done=depths, **options)."""

    prompt: Callable[..., Prompt]
    """(writer, case, **options) -> Prompt."""
    grade: Callable[[str, str], bool]
    """(reply, answer) -> whether the reply is right."""
    depths: tuple[float, ...] | Callable[[int], tuple[float, ...]]
    """Where answers stand if no depths are given; or a function of the option `keys` that says so."""
    answer_tokens: int
    options: tuple[str, ...] = ()
    """The options of the command line that it takes."""
    sentence_tokens: int | None = None
    """In place of answer_tokens where the answer is a sentence: in every style but plain."""
    one_line: bool = True
    """In the style plain the answer ends with its line; a list may have a line an item."""
    shared_document: bool = False
    """The document is the same at every depth: it is read once, and the cells of a length come together, at its end."""
    embedded: Task | None = None
    """The task in the vocabulary of the embedded model, which reads no text."""

    def __call__(
        self,
        model: Any,
        tokenizer: Any,
        length: int,
        samples: int,
        seed: int,
        *,
        done: Collection[float] = (),
        depths: Collection[float] | None = None,
        style: str = "auto",
        answer_tokens: int | None = None,
        haystack: str | Path | None = None,
        chunk_length: int = PREFILL_CHUNK,
        kv_cache: str = "default",
        dump: str | Path | None = None,
        check_only: bool = False,
        **options: Any,
    ) -> Iterator[dict[str, Any]]:
        """Accuracy of the answers to `samples` prompts at each depth that is not in `done`.

        Args:
            length: tokens that a prompt and its answer may take together.
            depths, answer_tokens: instead of the task's.
            style: see `prompts.Writer`. The paper's for longchat_lines is vicuna, for base models too.
            haystack: text file, or folder of .txt and .md files, in place of invented sentences.
            chunk_length: tokens read at once.
            dump: append the prompts to this file, and ask the model nothing.
            check_only: see whether the questions fit, and ask the model nothing.
            options: those of `prompt`.

        Yields:
            cells of results.Cell's fields: answer_loss tells models apart that are all right or all wrong.
        """
        task = self.embedded if self.embedded and is_embedded(tokenizer) else self
        if task is not self and (lost := [name for name in options if name not in task.options]):
            raise TaskError(f"in the embedded model's vocabulary this task has no {lost[0]}: leave it out")
        usual = task.depths if isinstance(task.depths, tuple) else task.depths(options.get("keys", 0))
        places = tuple(dict.fromkeys(map(float, depths or usual)))
        if min(samples, chunk_length) < 1 or not all(0 <= depth <= 1 for depth in places):
            raise TaskError("samples and chunk_length must be at least 1, and depths between 0 and 1")
        if haystack is not None:
            options["sentences"] = split_sentences(haystack)
        writer = Writer(tokenizer, style, check_only)
        is_plain = writer.style == "plain"
        room = answer_tokens or (task.answer_tokens if is_plain else task.sentence_tokens or task.answer_tokens)
        pending = [depth for depth in places if depth not in done]
        cases = [Case(length, depth, index, seed, room, places) for depth in pending for index in range(samples)]
        # Those of a group share a document.
        count = min(samples if task.shared_document else len(cases), len(cases))
        groups = [cases[index::count] for index in range(count)]
        settings = {
            "answer_tokens": room,
            "one_line": is_plain and task.one_line,
            "chunk_length": chunk_length,
            "kv_cache": kv_cache,
        }
        asked, first = defaultdict(list), {}
        for group in groups:
            prompts = [task.prompt(writer, case, **options) for case in group]
            if dump is not None:
                dump_prompts(prompts, dump)
            if dump is not None or check_only:
                continue
            replies = scored_answers(model, tokenizer, prompts, **settings)
            for case, prompt, (reply, losses) in zip(group, prompts, replies, strict=True):
                found, _ = asked[case.depth], first.setdefault(case.depth, digest_of(prompt.tokens))
                right = int(task.grade(reply, prompt.answer))
                found.append((right, len(prompt.tokens), [round(loss, 4) for loss in losses]))
                if len(found) == samples:
                    yield _cell(case.depth, found) | {"first_prompt": first[case.depth]}

    def check(self, tokenizer: Any, length: int, seed: int, **options: Any) -> None:
        """Raise a TaskError if a question does not fit a length; of each depth the first is tried."""
        list(self(None, tokenizer, length, 1, seed, check_only=True, **options))


def _cell(depth: float, asked: list[tuple[int, int, list[float]]]) -> dict[str, Any]:
    correct, tokens, losses = (list(column) for column in zip(*asked, strict=True))
    cell = {"depth": depth, "metric": "accuracy", "value": fmean(correct), "samples": len(correct)}
    cell |= {"tokens": round(fmean(tokens), 1), "correct": "".join(map(str, correct))}
    # Where there is one form, it is the answer alone.
    alone = {"alone_loss": [forms[-1] for forms in losses]} if len(losses[0]) > 1 else {}
    return cell | {"answer_loss": [min(forms) for forms in losses]} | alone


@dataclass(frozen=True)
class Measurement:
    """A task that has no prompts to write out; called as a Task is."""

    measure: Callable[..., Iterator[dict[str, Any]]]
    options: tuple[str, ...] = ()
    embedded: bool = False
    refuse: Callable[..., None] | None = None
    """(tokenizer, length, **options): raise a TaskError for what can be told without the model."""

    def __call__(self, *place: Any, **options: Any) -> Iterator[dict[str, Any]]:
        """Cells: depth, metric, value and samples."""
        return self.measure(*place, **options)

    def check(self, tokenizer: Any, length: int, seed: int, **options: Any) -> None:
        """Raise a TaskError if the task cannot be measured at a length, as far as the tokenizer tells."""
        if self.refuse:
            self.refuse(tokenizer, length, **options)


def _listing(prompt: Callable[..., Prompt], tokens: int, *options: str, sentence_tokens: int | None = None) -> Task:
    """A task whose answer is a list, spread over the document."""
    taken = ("chunk_length", "style", *options)
    return Task(prompt, contains_all, THROUGHOUT, tokens, taken, sentence_tokens, one_line=False)


OF_PROMPTS = ("chunk_length", "depths", "style")
TASKS: dict[str, Task | Measurement] = {
    # Graded as the original's scripts/evaluate_kv_responses.py does.
    "kv_retrieval": Task(
        kv_prompt,
        contains,
        kv_depths,
        50,
        (*OF_PROMPTS, "keys", "query_aware"),
        # Key and value in a sentence, as the original allows for.
        sentence_tokens=100,
        shared_document=True,
        embedded=Task(embedded_kv_prompt, contains, kv_depths, 1, ("keys",), shared_document=True),
    ),
    # Graded as in the CREAM paper; LongEval takes the last integer.
    "longchat_lines": Task(lines_prompt, first_integer, FIFTHS, 35, (*OF_PROMPTS, "lines"), shared_document=True),
    "multikey_needle": Task(
        multikey_prompt, first_integer, SIXTEENTHS, 20, (*OF_PROMPTS, "haystack"), shared_document=True
    ),
    "needle": Task(
        needle_prompt,
        first_integer,
        TENTHS,
        50,
        (*OF_PROMPTS, "haystack"),
        embedded=Task(embedded_needle_prompt, contains, TENTHS, 1),
    ),
    # RULER gives part marks to a part of the list, and so do the presets of lm-eval.
    "multi_value": _listing(partial(several_prompt, task="multi_value", cities=1), 128, "haystack"),
    "multi_query": _listing(partial(several_prompt, task="multi_query", cities=4), 128, "haystack"),
    "variable_tracking": _listing(variable_tracking_prompt, 30, sentence_tokens=60),
    "common_words": _listing(common_words_prompt, 120),
    "frequent_words": _listing(frequent_words_prompt, 50),
    # The original's 10 tokens are for the bare number.
    "passkey": Task(passkey_prompt, first_integer, FIFTHS, 10, OF_PROMPTS, sentence_tokens=35),
    "perplexity": Measurement(perplexity, ("text", "stride", "max_tokens", "chunk_length"), refuse=refuse_impossible),
    "recall": Measurement(recall, embedded=True),
    "new_skill": Measurement(partial(recall, mark=MARK), embedded=True),
}
"""Name -> task; `register_task` adds to it."""


def option_names() -> list[str]:
    """The options of all tasks, each once."""
    return list(dict.fromkeys(name for task in TASKS.values() for name in task.options))


def register_task(name: str, task: Task | Measurement) -> None:
    """Make `cream-peft evaluate --tasks name` ask a task of your own.

    Raises:
        PluginError: a name that is taken, no task, or an option that the command line does not have.
    """
    if not isinstance(task, Task | Measurement):
        raise PluginError(f"task {name!r} is {task!r}, and must be a Task or a Measurement of cream_peft.evals.tasks")
    known = sorted(option_names())
    if unknown := sorted(set(task.options) - set(known)):
        raise PluginError(f"task {name!r} has the options {', '.join(unknown)}: evaluate has {', '.join(known)}")
    add(TASKS, "task", name, task, task.prompt if isinstance(task, Task) else task.measure)
