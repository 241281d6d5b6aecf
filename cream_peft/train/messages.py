"""Conversations as messages (role, content), whatever form the data bring them in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from .rows import RowError

ROLES = {"system": "system", "developer": "system", "tool": "tool", "function": "tool", "observation": "tool"}
ROLES |= dict.fromkeys(("human", "user"), "user")
ROLES |= dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant")
FOLLOWS = {"user": (None, "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
"""Role -> the roles that may stand before it; None: the start, after the system message."""
WEIGHTS = ("weight", "train", "loss")
"""Keys by which others leave a turn out of the loss."""
KEPT_IN_TURNS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
TEXT_OF_A_CALL = "text beside a tool call"
BESIDE: dict[str, tuple[type, str]] = {"tools": (list, "list"), "chat_template_kwargs": (dict, "mapping")}
"""Columns that TRL hands to the chat template, and what they hold."""


def _content(turn: Mapping[str, Any]) -> str:
    content = turn.get("content")
    content = turn.get("value") if content is None else content
    if isinstance(content, list):
        for part in content:
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            if kind != "text":
                raise RowError(f"it holds {kind} content, and the model reads text alone")
        content = "".join((part.get("text") or "") if isinstance(part, dict) else str(part) for part in content)
    if content is not None and not isinstance(content, str):
        raise RowError(f"the content of a turn is {type(content).__name__}, not text")
    return content or ""


def _is_blank(value: Any) -> bool:
    return not (value.strip() if isinstance(value, str) else value)


def without_nulls(value: Any) -> Any:
    """Arrow gives each mapping the keys of all the others, as null; a chat template would write them out."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _with_mapping(call: Any) -> Any:
    """A tool call whose arguments are a mapping: as JSON text, which OpenAI's API gives, templates would quote them."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise RowError("a tool call is no mapping")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        # What is no JSON stays text, and is refused below.
        with suppress(ValueError):
            arguments = json.loads(arguments or "{}")
    # None: a call without any.
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise RowError("the arguments of a tool call are no JSON object")
    function = function | {"arguments": arguments}
    return call | {"function": function} if "function" in call else function


def beside_turns(name: str, value: Any) -> Any:
    """What a column of BESIDE holds: of tools a list, perhaps as JSON text, None if that is blank; of
    chat_template_kwargs a mapping.

    Raises:
        RowError: anything else.
    """
    kind, told = BESIDE[name]
    try:
        read = (json.loads(value) if value.strip() else None) if isinstance(value, str) else value
    except ValueError as error:
        raise RowError(f"its {name} are no JSON") from error
    if not isinstance(read, kind | None):
        raise RowError(f"its {name} are no {told}")
    if name == "tools":
        # As it was: TRL reads the text too, and a run is told by its rows.
        return None if read is None else without_nulls(value)
    # TRL makes keyword arguments of it, which null is none of.
    return without_nulls(read or {})


def to_messages(conversation: Any, system: str | None = None) -> list[dict[str, Any]]:
    """One conversation as messages (role, content) that begin with the user, after `system` if it brings none.

    Leading assistant turns are cut off, and what no assistant answers at the end. Tool calls and their answers stay.

    Raises:
        RowError: an unknown role, an empty turn, turns out of order, content that is no text, a turn with a weight.
    """
    if not conversation:
        raise RowError("it holds no turn")
    messages: list[dict[str, Any]] = []
    for turn in conversation:
        if not isinstance(turn, dict):
            raise RowError("a turn is no mapping of role and content")
        said = turn.get("role") or turn.get("from")
        role = ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            raise RowError(f"unknown role {said!r}")
        for key in WEIGHTS:
            if turn.get(key) not in (None, 1):
                raise RowError(f"a turn has a {key}, which is not supported: leave the turn or the {key} out")
        if turn.get("function_call"):
            raise RowError("a turn has a function_call, which is OpenAI's old form of tool_calls")
        content, rest = _content(turn), {key: turn[key] for key in KEPT_IN_TURNS if not _is_blank(turn.get(key))}
        # vLLM's name for it.
        if isinstance(thought := turn.get("reasoning"), str) and thought.strip():
            rest.setdefault("reasoning_content", thought)
        if role == "system" and not content.strip():
            continue
        # A command may print nothing.
        if not content.strip() and not rest.get("tool_calls") and role != "tool":
            is_there = any(turn.get(key) is not None for key in ("content", "value"))
            raise RowError(f"an empty {role} turn" if is_there else f"a turn of the {role} without content")
        rest = without_nulls(rest)
        if "tool_calls" in rest:
            rest["tool_calls"] = [*map(_with_mapping, rest["tool_calls"])]
        messages.append({"role": role, "content": content, **rest})
    start = [messages.pop(0)] if messages and messages[0]["role"] == "system" else []
    if not start and system and system.strip():
        start = [{"role": "system", "content": system}]
    while messages and messages[0]["role"] == "assistant":
        messages.pop(0)
    while messages and messages[-1]["role"] in ("user", "tool"):
        messages.pop()
    before = None
    for message in messages:
        if before not in FOLLOWS.get(message["role"], ()):
            raise RowError(f"turns out of order: {message['role']} after {before or 'the start'}")
        before = message["role"]
    if before != "assistant":
        raise RowError("no turn of the assistant answers one of the user")
    return start + messages


def not_seen(messages: list[dict[str, Any]], beside: dict[str, Any], not_written: set[str]) -> set[str]:
    """What of a conversation, and of the columns `beside` it, the chat template leaves out: see
    `templates.parts_not_written`.

    Raises:
        RowError: if that is a tool call, so that an empty answer would be trained, or a tool's result.
    """
    held = {part for message in messages for part in (*message, message["role"])}
    if any(message.get("tool_calls") and message["content"].strip() for message in messages):
        held.add(TEXT_OF_A_CALL)
    lost = not_written & (held | {name for name, value in beside.items() if value})
    for part, told in (("tool_calls", "a tool call"), ("tool", "a tool's result")):
        if part in lost:
            raise RowError(f"it holds {told}, which the chat template does not write")
    return lost


def pair_of(prompt: Any, completion: Any) -> tuple[Any, Any]:
    """A prompt and its completion: two texts, or the messages of both.

    Raises:
        RowError: one that is empty, of another kind than the other, or a completion that the assistant does not begin.
    """
    for name, value in (("prompt", prompt), ("completion", completion)):
        if _is_blank(value):
            raise RowError(f"an empty {name}")
    if isinstance(prompt, str) != isinstance(completion, str):
        raise RowError("of prompt and completion one is text and the other is not")
    if isinstance(prompt, str):
        return prompt, completion
    messages = to_messages([*prompt, *completion])
    said = completion[0].get("role") or completion[0].get("from")
    if ROLES[said] != "assistant":
        raise RowError(f"its completion begins with a turn of {said}, not of the assistant")
    answers = len(to_messages([{"role": "user", "content": "-"}, *completion])) - 1
    return messages[:-answers], messages[-answers:]
