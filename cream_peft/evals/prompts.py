"""What all prompts share: seeded draws, a form that the model knows, and a length counted by its own tokenizer."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jinja2 import TemplateError

STYLES = ("auto", "chat", "plain", "vicuna")
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: {} ASSISTANT:"
)
"""FastChat's template vicuna_v1.1, into which the CREAM paper's evaluation puts LongChat-Lines and the needle."""
TEXT_SUFFIXES = (".txt", ".md")
WORDS: dict[str, list[str]] = json.loads((Path(__file__).parent / "words.json").read_text(encoding="utf-8"))
"""What invented documents are made of."""
T = TypeVar("T")


class TaskError(ValueError):
    """Options of a task that cannot be met, such as a length too short for its question."""


@dataclass(frozen=True)
class Case:
    """Which prompt of a task: these, the task's options and the tokenizer determine every byte of it.

    The prompt and `answer_tokens` of answer take at most `length` tokens. The answer stands at `depth` of the document,
    0 being its start and 1 its end; `depths` are all that are measured.
    """

    length: int
    depth: float
    index: int
    seed: int
    answer_tokens: int
    depths: tuple[float, ...] = ()


@dataclass(frozen=True)
class Request:
    """A question in the task's own words, and its answer.

    `lead` begins the answer of a base model, `said` that of a chat model, its space or quotation mark included. `extra`
    is what a file of prompts says besides, such as the number of keys.
    """

    text: str
    lead: str
    said: str
    answer: str
    extra: dict[str, int]


@dataclass(frozen=True)
class Prompt:
    """A question in the form that the model reads, and its answer.

    `replies` are the forms of a right reply, each what is said before the answer, and the answer: the task's own, and
    for chat models the answer alone, which a model that was trained to answer so gives.
    """

    text: str
    tokens: list[int]
    answer: str
    replies: list[tuple[list[int], list[int]]]
    depth: float
    extra: dict[str, int]


def encode(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    """The tokens of a text, which may be longer than the tokenizer's model_max_length."""
    try:
        return tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    except Exception as error:
        # The tokenizers library raises nothing narrower for a vocabulary without words, as the embedded model's.
        raise TaskError(f"this model's tokenizer does not read text: {error}") from error


def digest_of(tokens: list[int]) -> str:
    """A short SHA-256 of tokens, see `results.Cell.first_prompt`."""
    return sha256(repr(tokens).encode()).hexdigest()[:16]


def shared_tokens(rows: list[list[int]]) -> int:
    """With how many tokens all rows begin alike."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))


@dataclass(frozen=True)
class Writer:
    """Writes requests in the form that the model knows, and counts their tokens."""

    tokenizer: Any
    style: str = "auto"
    """chat (the tokenizer's chat template), plain (for base models: the answer is begun for them), vicuna (the
    paper's), or auto: chat where the tokenizer has a template, else plain."""
    is_least: bool = False
    """Write no more than the question needs, to see whether it fits."""

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise TaskError(f"style={self.style!r} is unknown: use one of {', '.join(STYLES)}")
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if self.style == "chat" and not has_template:
            raise TaskError("style=chat needs a chat template and this tokenizer has none: use style=plain")
        if self.style == "auto":
            object.__setattr__(self, "style", "chat" if has_template else "plain")

    def text(self, request: Request) -> str:
        """All that the model reads."""
        if self.style == "chat":
            return self._chat(request.text) + self._header
        return VICUNA.format(request.text) if self.style == "vicuna" else request.text + request.lead

    def _chat(self, question: str, answer: str | None = None) -> str:
        """A conversation in the tokenizer's template, which announces an answer unless one is given."""
        turns = [{"role": "user", "content": question}]
        turns += [] if answer is None else [{"role": "assistant", "content": answer}]
        # enable_thinking: templates that know it would else fill the answer's few tokens with thoughts.
        settings = {"add_generation_prompt": answer is None, "tokenize": False, "enable_thinking": False}
        try:
            return self.tokenizer.apply_chat_template(turns, **settings)
        except TemplateError as error:
            raise TaskError(f"the chat template refuses a plain question ({error}): use --style plain") from error

    @cached_property
    def _header(self) -> str:
        """What a template puts between its announcement of an answer and the answer, such as a channel, or the end of
        thoughts that it began: without it the answer's few tokens would go to thoughts."""
        begun, whole = self._chat("?"), self._chat("?", "28527")
        if begun.rstrip().endswith("<think>"):
            return "\n</think>\n\n"
        header = whole.removeprefix(begun).partition("28527")[0]
        return header if whole.startswith(begun) and header.strip() else ""

    def tokens(self, text: str) -> list[int]:
        """The tokens of a prompt. A chat template has written the special tokens already."""
        return encode(self.tokenizer, text, add_special_tokens=self.style != "chat")

    def fitted(self, case: Case, build: Callable[[int], Request], unit: str, asked: int = 0) -> Prompt:
        """The prompt of `asked` units (keys, sentences), or of as many as fit with the answer if that is 0.

        `build` makes the request of so many units; more units must take more tokens.
        """
        budget = case.length - case.answer_tokens

        def taken(units: int) -> int:
            return len(self.tokens(self.text(build(units))))

        few = asked or 1
        low = taken(few)
        if low > budget:
            raise TaskError(
                f"length {case.length:,} is too short for {few} {unit}{'s' * (few > 1)}: they take {low:,} tokens and "
                f"the answer up to {case.answer_tokens}; use a length of at least {low + case.answer_tokens:,}"
            )
        if asked or self.is_least:
            return self.prompt(case, build(few))
        # One more may be no more than a blank, as at the end of a text.
        grown, many = ((taken(units) - low) / (units - 1) for units in (2, 4, 8)), math.inf
        each = next((tokens for tokens in grown if tokens > 0), 0)
        if not each:
            raise TaskError(f"this model's tokenizer does not read text: it makes no tokens of a {unit}")
        while many - few > 1:
            guess = int(min(few + max(1, (budget - low) // each), many - 1))
            used = taken(guess)
            each = max(1, (used - low) / (guess - few))
            if used <= budget:
                few, low = guess, used
            else:
                many = guess
        return self.prompt(case, build(few))

    def prompt(self, case: Case, request: Request) -> Prompt:
        """The request as the model reads it, and the tokens of a right reply in each of its forms."""
        text = self.text(request)
        tokens = self.tokens(text)
        forms = [""] if self.style == "plain" else dict.fromkeys((request.said, ""))
        replies = [self._reply(request, text, tokens, said) for said in forms]
        return Prompt(text, tokens, request.answer, replies, case.depth, request.extra)

    def _reply(self, request: Request, text: str, tokens: list[int], said: str) -> tuple[list[int], list[int]]:
        """The tokens of a reply that says `said` before the answer: those before the answer's own, and those."""
        answer, before = request.answer, f" {said}"
        if self.style == "chat":
            turn = self._chat(request.text, said + answer).removeprefix(text)
            # Some templates put a space before a reply; some write another turn than they announce.
            blank = turn[: turn.find(said + answer)]
            before = said if blank.strip() else blank + said
        before_tokens, whole = self.tokens(text + before), self.tokens(text + before + answer)
        if whole[: len(tokens)] != tokens:
            whole = tokens + encode(self.tokenizer, before + answer, add_special_tokens=False)
            before_tokens = tokens + encode(self.tokenizer, before, add_special_tokens=False)
        same = shared_tokens([before_tokens, whole])
        return whole[len(tokens) : same], whole[same:]


def drawn(draw: Callable[[], T]) -> Callable[[int], list[T]]:
    """Number -> so many units, drawn one by one when first needed: fewer units are the first of more."""
    units: list[T] = []

    def first(count: int) -> list[T]:
        units.extend(draw() for _ in range(count - len(units)))
        return units[:count]

    return first


def prompt_rng(task: str, seed: int, *place: int | float) -> np.random.Generator:
    """A random generator, determined by the task's name, the seed and the place (length, depth, index)."""
    whole = [round(number * 1e6) if isinstance(number, float) else number for number in place]
    return np.random.default_rng([zlib.crc32(task.encode()), seed, *whole])


def one_of(choices: Sequence[str], rng: np.random.Generator) -> str:
    """One of `choices`, drawn uniformly."""
    # rng.choice would make an array of them each time.
    return choices[int(rng.integers(len(choices)))]


def position(depth: float, count: int) -> int:
    """Index of the unit at `depth`, of `count` units, rounded half up: depth 0 is the first, 1 the last."""
    return int(depth * (count - 1) + 0.5)


def contains(reply: str, answer: str) -> bool:
    """Whether the answer is in the reply, upper and lower case being the same."""
    return answer.lower() in reply.lower()


def contains_all(reply: str, answer: str) -> bool:
    """Whether each of the words that the answer lists ("a, b") is a word of the reply, in any order."""
    words = answer.split(", ")
    return all(re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", reply, re.IGNORECASE) for word in words)


def first_integer(reply: str, answer: str) -> bool:
    """Whether the first integer of the reply is the answer."""
    found = re.search(r"\d+", reply)
    return found is not None and int(found.group()) == int(answer)


def dump_prompts(prompts: Iterable[Prompt], path: str | Path) -> None:
    """Append prompts to a file as JSON lines: text, answer, depth, tokens (their number) and `extra`."""
    with Path(path).open("a", encoding="utf-8") as file:
        for prompt in prompts:
            row = {"text": prompt.text, "answer": prompt.answer, "depth": prompt.depth, "tokens": len(prompt.tokens)}
            file.write(json.dumps(row | prompt.extra, ensure_ascii=False) + "\n")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without the mark that Windows puts before it.

    Raises:
        UnicodeError: of another encoding. UTF-16 without a mark is UTF-8 with a NUL at every other place.
    """
    text = path.read_text(encoding="utf-8-sig")
    if "\0" in text:
        raise UnicodeError(f"{path} holds NUL")
    return text


def read_texts(path: str | Path) -> list[str]:
    """The text of a file, or of each .txt and .md file of a folder and its subfolders, in the order of their names."""
    path = Path(path).expanduser()
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES) if path.is_dir() else [path]
    texts = []
    for file in files:
        try:
            texts.append(read_text(file))
        except (FileNotFoundError, UnicodeError) as error:
            raise TaskError(f"{file} is no text that can be read: give a UTF-8 file or a folder of them") from error
    if not any(text.strip() for text in texts):
        raise TaskError(f"{path} holds no text: give a file, or a folder of {' or '.join(TEXT_SUFFIXES)} files")
    return texts
