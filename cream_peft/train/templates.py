"""Chat templates: those that conversations can be trained with."""

from __future__ import annotations

from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .rows import DataError

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
# A tool's result is a turn of this role; tools is a column beside the turns, the others are keys of an answer.
PARTS: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "tool_calls": ([PROBE[1], _call(MARK)], None),
    "tool": ([PROBE[1], _call("look"), RESULT, PROBE[2]], None),
    "tools": (PROBE[1:3], [{"type": "function", "function": TOOL}]),
    "reasoning_content": ([PROBE[1], PROBE[2] | {"reasoning_content": MARK}], None),
    "thinking": ([PROBE[1], PROBE[2] | {"thinking": MARK}], None),
}


def parts_not_written(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Those of PARTS that the chat template leaves out without a word, so that the model would never see them."""
    found = set()
    for part, (messages, tools) in PARTS.items():
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


def training_chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A template with generation marks that renders exactly what the tokenizer's own does, or None.

    TRL has training templates for many families; Llama-2, Llama-3.1 and SmolLM2 are not among them. One of ours is
    used only where the two render a probe conversation to the same string, so that the model is trained on the format
    it is served with.
    """
    if not tokenizer.chat_template or isinstance(tokenizer.chat_template, dict):
        return None
    for file in files("cream_peft").joinpath("train/chat_templates").iterdir():
        ours = file.read_text(encoding="utf-8")
        # A template may refuse the probe.
        with suppress(Exception):
            if all(
                tokenizer.apply_chat_template(probe, tokenize=False)
                == tokenizer.apply_chat_template(probe, tokenize=False, chat_template=ours)
                for probe in (PROBE, PROBE[1:])
            ):
                return ours
    return None
