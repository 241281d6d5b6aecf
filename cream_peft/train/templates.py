"""Chat templates: those that conversations can be trained with, and where answers are in what they write."""

from __future__ import annotations

import json
from contextlib import suppress
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import is_conversational

from .messages import TEXT_OF_A_CALL
from .rows import DataError, RowError, column_names

PROBE: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]


MARK = "probed"
"""A word in that part of a probe that a template may leave out."""


def _call(name: str) -> dict[str, Any]:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": {"city": "Rome"}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


TOOL = {"name": MARK, "description": "Looks.", "parameters": {"type": "object", "properties": {}}}
RESULT = {"role": "tool", "name": "look", "tool_call_id": "abcdefghi", "content": MARK}
# system and tool are roles of a turn, tools a column beside the turns, the others keys of an answer.
PARTS: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "system": ([PROBE[0] | {"content": MARK}, *PROBE[1:3]], None),
    "tool_calls": ([PROBE[1], _call(MARK)], None),
    "tool": ([PROBE[1], _call("look"), RESULT, PROBE[2]], None),
    "tools": (PROBE[1:3], [{"type": "function", "function": TOOL}]),
    TEXT_OF_A_CALL: ([PROBE[1], _call("look") | {"content": MARK}], None),
    "reasoning_content": ([PROBE[1], PROBE[2] | {"reasoning_content": MARK}], None),
    "thinking": ([PROBE[1], PROBE[2] | {"thinking": MARK}], None),
}


def parts_not_written(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Those of PARTS that the chat template leaves out without a word, so that the model would never see them."""
    found: set[str] = set()
    # Of several templates rows with tools take another one.
    several = not isinstance(tokenizer.chat_template, str)
    for part, (messages, tools) in () if several else PARTS.items():
        # A template that refuses the probe refuses the rows too.
        with suppress(Exception):
            if MARK not in str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)):
                found.add(part)
    return found


def check_template(tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """Refuse a chat template that is missing, or after whose answers nothing says that they end."""
    if not tokenizer.chat_template:
        raise DataError(
            f"{what} but the tokenizer has no chat template: use a chat model, or set chat_template_path to a "
            ".jinja file"
        )
    rendered, answer = "", PROBE[2]["content"]
    # A template may refuse the probe.
    with suppress(Exception):
        rendered = str(tokenizer.apply_chat_template(PROBE[1:3], tokenize=False))
    if answer in rendered and not rendered.rpartition(answer)[2].strip():
        raise DataError(
            f"{what} but the chat template writes nothing after an answer, so the model would never learn to stop: set "
            "chat_template_path to one that ends answers with the end token"
        )


def set_chat_template(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Give the tokenizer the chat template in a .jinja file; a DataError if it is none.

    TRL also takes a model's name, and then resizes the embeddings, which an adapter would have to hold.
    """
    if not Path(path).is_file() or Path(path).suffix not in (".jinja", ".j2"):
        raise DataError(f"chat_template_path={path}: no such .jinja file")
    tokenizer.chat_template = Path(path).read_text(encoding="utf-8")


def is_marked(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template says where answers are ({% generation %}), or TRL has a copy of it that does."""
    if not isinstance(tokenizer.chat_template, str):
        return True
    with suppress(ValueError):
        return has_generation_markers(tokenizer.chat_template) or bool(get_training_chat_template(tokenizer))
    return False


def template_options(beside: dict[str, Any]) -> dict[str, Any]:
    """What the columns beside the turns are to the chat template, as TRL hands them to it."""
    tools = beside.get("tools")
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools} | (
        beside.get("chat_template_kwargs") or {}
    )


def written(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> str:
    """A conversation as the chat template writes it. `options`: see `template_options`.

    Raises:
        RowError: a template that refuses it.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, TypeError, ValueError) as error:
        raise RowError(f"the chat template refuses it ({' '.join(str(error).split()):.100})") from error


def answer_spans(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], first: int = 0, **options: Any
) -> tuple[str, list[tuple[int, int, bool]]]:
    """A conversation as the chat template writes it, and the characters there, from and to, of each answer from message
    `first` on, with what ends it; and whether a token may reach beyond. `options`: see `template_options`.

    Raises:
        RowError: a template that refuses it, or writes a turn otherwise once others follow.
    """
    spans: list[tuple[int, int, bool]] = []
    whole, asked = written(tokenizer, messages, **options), [turn for turn in messages if turn["role"] != "system"]
    # Mistral's write a system message into the last turn if that is a question, so never into what is trained.
    with suppress(RowError):
        if len(asked) < len(messages) and written(tokenizer, asked, **options) == whole:
            first, messages = max(0, first - len(messages) + len(asked)), asked
    for index in range(first, len(messages)):
        if messages[index]["role"] != "assistant":
            continue
        before = written(tokenizer, messages[:index], add_generation_prompt=True, **options)
        after = written(tokenizer, messages[: index + 1], **options).rstrip()
        shared = len(commonprefix([whole, after]))  # noqa: RUF071 - characters are meant
        content = str(messages[index]["content"]).strip()
        # Some templates end the whole with a token of its own; but the answer, and what ends it, must be the same.
        is_there = bool(content) and content in after
        needed = after.rfind(content) + len(content) + 1 if is_there else len(after)
        said = after[len(before) :] if after.startswith(before) else ""
        if said and shared >= max(needed, len(before) + 1):
            spans.append((len(before), shared, shared == len(after)))
            continue
        # Mistral's write the tools before the last question: the same answer stands elsewhere.
        end = spans[-1][1] if spans else 0
        if not said or whole.count(said, end) != 1:
            raise RowError(
                "the chat template writes an answer otherwise once turns follow: assistant_only_loss needs a "
                "chat_template_path with {% generation %} marks"
            )
        start = whole.index(said, end)
        spans.append((start, start + len(said), True))
    return whole, spans


def with_answer_masks(
    dataset: Any, tokenizer: PreTrainedTokenizerBase, completion_only: bool, is_training: bool = True
) -> Any:
    """Conversations (messages, or a prompt and a completion, of which with `completion_only` the completion counts)
    tokenised, with assistant_masks, for a chat template that does not say where answers are. Rows that bring masks, and
    held-out rows of another kind, stay as they are.

    Raises:
        DataError: training rows of another kind, or a tokenizer that does not say which characters its tokens are.
    """
    is_chat = is_conversational(next(iter(dataset)))
    if "assistant_masks" in column_names(dataset) or not (is_chat or is_training):
        return dataset
    if not is_chat:
        raise DataError("assistant_only_loss=true is for conversations: messages, or prompt and completion as messages")
    if not tokenizer.is_fast:
        raise DataError(
            "assistant_only_loss=true needs a fast tokenizer, or a chat template with {% generation %} marks"
        )

    def masked(row: dict[str, Any]) -> dict[str, Any]:
        prompt, completion = row.get("prompt", []), row.get("completion", row.get("messages"))
        first = len(prompt) if completion_only else 0
        whole, spans = answer_spans(tokenizer, [*prompt, *completion], first, **template_options(row))
        found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        starts, ends = np.array(found["offset_mapping"]).reshape(-1, 2).T
        masks = np.zeros(len(starts), dtype=np.int64)
        for start, end, may_reach_beyond in spans:
            inside = np.flatnonzero(
                (ends > start) & (starts < ends) & ((starts if may_reach_beyond else ends - 1) < end)
            )
            if len(inside):
                # From the first to the last: some tokenizers give the blanks between them no width.
                masks[inside[0] : inside[-1] + 1] = 1
        return {"input_ids": found["input_ids"], "assistant_masks": masks.tolist()}

    # Beside what they were, as TRL leaves them: a run is told by its rows.
    return dataset.map(masked)
