"""What the tasks share: seeded prompts, fitted to a length by the model's own tokenizer, and texts from files."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

STYLES = ("auto", "chat", "plain", "vicuna")
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: {} ASSISTANT:"
)
"""FastChat's template vicuna_v1.1, into which the CREAM paper's evaluation puts LongChat-Lines and the needle."""
TEXT_SUFFIXES = (".txt", ".md")
QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)
FIFTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Middles of five equal parts: their mean stands for a place drawn uniformly, as some of the originals draw it."""


class TaskError(ValueError):
    """Options of a task that cannot be met, such as a length too short for its question."""


@dataclass(frozen=True)
class Prompt:
    """One question, its answer and where in the document the answer stands."""

    text: str
    """All that the model reads, chat template included."""
    tokens: list[int]
    """`text` in tokens, as fed."""
    answer: str
    reply: tuple[list[int], list[int]]
    """Tokens of a right reply: what it says before the answer, and the answer."""
    depth: float
    """The depth asked for, in [0, 1]: 0 is the start of the document."""
    extra: dict[str, Any] = field(default_factory=dict)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> list[int]:
    """The tokens of a text that may be longer than the tokenizer's model_max_length."""
    try:
        return tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    except Exception as error:
        # The tokenizers library raises nothing narrower for a vocabulary without words, as the embedded model's.
        raise TaskError(f"this model's tokenizer does not read text: {error}") from error


@dataclass(frozen=True)
class Writer:
    """Puts a request in the form that the model reads.

    `style`: chat (the tokenizer's chat template), plain (for base models, the lead-in of the answer included), vicuna
    (the paper's), or auto: chat where the tokenizer has a template, else plain.
    """

    tokenizer: PreTrainedTokenizerBase
    style: str = "auto"

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise TaskError(f"style={self.style!r} is unknown: use one of {', '.join(STYLES)}")
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if self.style == "chat" and not has_template:
            raise TaskError("style=chat needs a chat template and this tokenizer has none: use style=plain")
        if self.style == "auto":
            object.__setattr__(self, "style", "chat" if has_template else "plain")

    def text(self, request: str, lead: str = "") -> str:
        """The whole prompt. `lead` begins the answer of a base model; the others are asked only."""
        if self.style == "chat":
            # enable_thinking: templates that know it would else fill the answer's few tokens with thoughts.
            settings = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": False}
            return self.tokenizer.apply_chat_template([{"role": "user", "content": request}], **settings)
        return VICUNA.format(request) if self.style == "vicuna" else request + lead

    def tokens(self, text: str) -> list[int]:
        """A chat template writes its own special tokens; the tokenizer adds them to the rest."""
        return encode(self.tokenizer, text, add_special_tokens=self.style != "chat")

    def fitted(
        self, build: Callable[[int], tuple[str, str]], length: int, answer_tokens: int, unit: str, asked: int = 0
    ) -> int:
        """The most units with which the prompt and `answer_tokens` of answer stay within `length` tokens.

        `build(units)` gives the request and the lead of a prompt of that many units, and more units take more tokens.
        `asked`: so many units are wanted, if not 0, and only checked.

        Raises:
            TaskError: if not even one fits, or not as many as asked.
        """
        budget = length - answer_tokens

        def taken(units: int) -> int:
            return len(self.tokens(self.text(*build(units))))

        few = asked or 1
        low = taken(few)
        if low > budget:
            raise TaskError(
                f"length {length:,} is too short for {few} {unit}{'s' * (few > 1)}: they take {low:,} tokens and the "
                f"answer up to {answer_tokens}; use a length of at least {low + answer_tokens:,}"
            )
        if asked:
            return asked
        many, high = 2, taken(2)
        if high <= low:
            raise TaskError(f"this model's tokenizer does not read text: it makes no tokens of a {unit}")
        while high <= budget:
            step = max(1, (budget - high) * (many - few) // max(1, high - low))
            few, low, many, high = many, high, many + step, taken(many + step)
        while many - few > 1:
            guess = few + max(1, min(many - few - 1, (budget - low) * (many - few) // max(1, high - low)))
            used = taken(guess)
            if used <= budget:
                few, low = guess, used
            else:
                many, high = guess, used
        return few

    def prompt(self, request: str, lead: str, said: str, answer: str, depth: float, **extra: Any) -> Prompt:
        """`said`: what a chat model's reply says before the answer, its space or quotation mark included."""
        text = self.text(request, lead)
        tokens = self.tokens(text)
        return Prompt(text, tokens, answer, self._reply(request, text, tokens, said, answer), depth, extra)

    def _reply(self, request: str, text: str, tokens: list[int], said: str, answer: str) -> tuple[list[int], list[int]]:
        before = " " if self.style == "plain" else f" {said}"
        if self.style == "chat":
            turns = [{"role": "user", "content": request}, {"role": "assistant", "content": said + answer}]
            turn = self.tokenizer.apply_chat_template(turns, tokenize=False).removeprefix(text)
            # Some templates put a space before a reply; some write another turn than they announce.
            blank = turn[: turn.find(said + answer)]
            before = said if blank.strip() else blank + said
        before_tokens, whole = self.tokens(text + before), self.tokens(text + before + answer)
        if whole[: len(tokens)] != tokens:
            whole = tokens + encode(self.tokenizer, before + answer, add_special_tokens=False)
            before_tokens = tokens + encode(self.tokenizer, before, add_special_tokens=False)
        pairs = zip(before_tokens, whole, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return whole[len(tokens) : same], whole[same:]


class Drawn:
    """Units drawn one by one as they are asked for, so that a shorter prompt holds the first of a longer one."""

    def __init__(self, draw: Callable[[], Any]) -> None:
        self._draw, self._units = draw, []

    def first(self, count: int) -> list[Any]:
        while len(self._units) < count:
            self._units.append(self._draw())
        return self._units[:count]


def generator(task: str, seed: int, *place: int | float) -> np.random.Generator:
    """A random generator that is a pure function of the task's name, the seed and the place (length, depth, index)."""
    whole = [round(number * 1e6) if isinstance(number, float) else number for number in place]
    return np.random.default_rng([zlib.crc32(task.encode()), seed, *whole])


def one_of(choices: Sequence[str], rng: np.random.Generator) -> str:
    # rng.choice would make an array of them each time.
    return choices[rng.integers(len(choices))]


def position(depth: float, count: int) -> int:
    """Which of `count` units stands at `depth`, rounded half up: 0 is the first, 1 the last."""
    return int(depth * (count - 1) + 0.5)


def contains(reply: str, answer: str) -> bool:
    """Whether the answer stands in the reply, whatever the case."""
    return answer.lower() in reply.lower()


def first_integer(reply: str, answer: str) -> bool:
    """Whether the first integer of the reply is the answer."""
    found = re.search(r"\d+", reply)
    return found is not None and int(found.group()) == int(answer)


def dump_prompts(prompts: Iterable[Prompt], path: str | Path) -> None:
    """Add prompts to a file as JSON lines: text, answer, depth, tokens (their number) and what the task adds."""
    with Path(path).open("a", encoding="utf-8") as file:
        for prompt in prompts:
            row = {"text": prompt.text, "answer": prompt.answer, "depth": prompt.depth, "tokens": len(prompt.tokens)}
            file.write(json.dumps(row | prompt.extra, ensure_ascii=False) + "\n")


def read_texts(path: str | Path) -> list[str]:
    """The text of a file, or of each .txt and .md file of a folder and its subfolders, in the order of their names.

    Raises:
        TaskError: if there is nothing to read.
    """
    path = Path(path)
    files = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES) if path.is_dir() else [path]
    try:
        texts = [file.read_text(encoding="utf-8") for file in files]
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} is no text that can be read: give a UTF-8 file or a folder of them") from error
    if not any(text.strip() for text in texts):
        raise TaskError(f"{path} holds no text: give a file, or a folder of {' or '.join(TEXT_SUFFIXES)} files")
    return texts
