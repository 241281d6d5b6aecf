"""The base's tokenizer: loaded, and written so that all that load it read it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import about
from .base import resolve_base

TIME_LIMIT = 20
"""Seconds that a chat template or the module names of an adapter may take."""
PROBE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]


def load_tokenizer(name: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with a pad token.

    Raises:
        ValueError: damaged files, or a chat template that does not come to an end.
    """
    with about(name):
        try:
            loaded = AutoTokenizer.from_pretrained(resolve_base(name), **({"trust_remote_code": False} | kwargs))
            tokenizer = with_pad_token(loaded)
        except (OSError, ValueError, ImportError):
            raise
        except Exception as error:  # of tokenizers, which names no file
            raise ValueError(f"the tokenizer of {name} is damaged ({error}): get it again") from error
    if tokenizer.chat_template and not ends_in_time(lambda: tokenizer.apply_chat_template(PROBE, tokenize=False)):
        raise ValueError(f"the chat template of {name} does not come to an end: do not use it")
    return tokenizer


def ends_in_time(task: Callable[[], Any]) -> bool:
    """Whether `task`, with or without an error, ends within TIME_LIMIT seconds. It is tried in a child process, since a
    loop inside of a regular expression or a template cannot be broken off."""
    if not hasattr(os, "fork"):  # Windows
        return True
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            task()
        os._exit(0)
    timer = threading.Timer(TIME_LIMIT, os.kill, (child, signal.SIGKILL))
    timer.daemon = True
    timer.start()
    try:
        return os.waitpid(child, 0)[1] == 0
    finally:
        timer.cancel()


def with_pad_token(tokenizer: Any) -> Any:
    """The tokenizer; a missing pad token becomes the end token. Masks are made from lengths, never from ids, and the
    embeddings are never resized (PEFT would then save whole embedding matrices)."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    return tokenizer


def make_tokenizer_readable(folder: Path, target_length: int) -> None:
    """Put names that transformers 4 knows too into <folder>/tokenizer_config.json, if there is one, and the length in
    tokens at which it truncates."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    settings["model_max_length"] = extended_max_length(settings.get("model_max_length"), target_length)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def extended_max_length(found: Any, target_length: int) -> int:
    """model_max_length of a tokenizer: below the target it is the base's window, and 1e30 is none; another one is
    somebody's choice."""
    is_chosen = isinstance(found, int | float) and target_length <= found < 1e20
    return int(found) if is_chosen else target_length
