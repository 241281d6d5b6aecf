"""What of this machine may become public: no tokens, no local paths."""

from __future__ import annotations

import enum
import json
import math
import os
import re
from pathlib import Path
from typing import Any

TOKENS = re.compile(
    rb"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{20}|sk-[A-Za-z0-9]{20}|sk-(proj|ant|svcacct|admin|or)-[\w-]{20}|"
    rb"gh[oprsu]_[A-Za-z0-9]{30}|github_pat_\w{22}|AKIA[0-9A-Z]{16}|xox[a-z]-[A-Za-z0-9-]{10}|glpat-[\w-]{20})|"
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
"""Those of Hugging Face, OpenAI and Anthropic, GitHub, AWS, Slack and GitLab, and private keys."""
PATHS = re.compile(rb"(?:(?<=file://)|(?<![\w./~+-]))(?:/[\w.+@-]+){2,}")
EVERYWHERE = (b"/usr/", b"/bin/", b"/sbin/", b"/lib/", b"/lib64/", b"/etc/", b"/dev/", b"/proc/", b"/sys/")
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "tokenizer.model")
VOCABULARIES += ("sentencepiece.bpe.model", "spiece.model", "spm.model")


def public_name(text: str) -> str:
    """`text` as it may be published: of a local path the last part, everything else as it is."""
    # One part after the root may be text, as "/no_think" is, unless it is there, as a container's /model is.
    is_absolute = text.startswith("/") and "/" in text[1:]
    is_there = "/" in text and text != "/" and os.path.exists(text)
    is_path = is_absolute or is_there or text.startswith(("./", "../", "~"))
    return Path(text).name if is_path and "\n" not in text else text


def without_secrets(content: Any) -> Any:
    """`content` for a JSON file that is published: no key that names a token, no local path, enums as their values,
    inf as text, which JSON has no number for."""
    if isinstance(content, dict):
        return {key: without_secrets(value) for key, value in content.items() if not _is_secret(key)}
    if isinstance(content, list | tuple):
        return [without_secrets(value) for value in content]
    if isinstance(content, enum.Enum):
        return content.value
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    return public_name(content) if isinstance(content, str) else content


def _is_secret(key: Any) -> bool:
    return str(key) == "token" or (str(key).endswith("_token") and not str(key).startswith(("eos", "pad", "bos")))


def find_secret(file: str, content: bytes, token: str | None, folder: Path) -> str | None:
    """What a text file holds that must not become public, in words: this token or one of a common kind, the path of
    `folder`, one in the user's home, or another that is there. Of vocabularies only tokens and longer paths count: one
    may well hold "/root/" and "sk-"."""
    if token and token.encode() in content:
        return "your token"
    if found := TOKENS.search(content):
        return f"what looks like a secret ({found[0][:6].decode()}...)"
    is_vocabulary = file in VOCABULARIES
    home = (str(Path.home()), r"/[\w.-]+/" if is_vocabulary else "/")
    for path, end in (home, (str(folder.resolve()), r"(?![\w.-])")):
        # JSON has a spelling of its own for what is not ASCII.
        either = "|".join(re.escape(spelling) for spelling in {path, json.dumps(path)[1:-1]})
        if path.strip("/") and re.search(f"({either}){end}".encode(), content):
            return f"a path of this machine ({path})"
    for path in () if is_vocabulary else sorted({match[0].rstrip(b".") for match in PATHS.finditer(content)}):
        if not path.startswith(EVERYWHERE) and (os.path.exists(path) or _is_in_a_folder_here(path)):
            return f"a path of this machine ({path.decode()})"
    return None


def _is_in_a_folder_here(path: bytes) -> bool:
    folder = os.path.dirname(path)
    return folder.count(b"/") > 1 and os.path.isdir(folder)
