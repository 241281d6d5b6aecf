"""A conversation with a trained adapter: a long document is read once, answers come word by word."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from tqdm import trange
from transformers import Cache, GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList, TextStreamer

from .evals.prompts import read_text
from .model.adapter import end_token_ids, load_adapter
from .model.kv_cache import PREFILL_CHUNK, can_crop, kv_caches, new_cache, refuse_unusable

Write = Callable[[str], Any]
WITH_DOCUMENT = "Here is a document. Questions about it follow.\n\n{document}\n\n{question}"
PROBE = "Where does this end?"


class ChatError(ValueError):
    """Something that cannot be said or used; its message is one line with the remedy."""


@dataclass
class ChatSettings:
    """How to talk, checked before any model is loaded."""

    document: str = ""
    """Text that the conversation is about."""
    system: str = ""
    """System message; needs a chat template."""
    kv_cache: str = "default"
    """default (16 bits), or quantized (4 bits, HQQ)."""
    max_new_tokens: int = 512
    """Tokens of an answer at most. So many are kept free."""
    temperature: float = 0.0
    """0 takes the likeliest token each time."""

    def __post_init__(self) -> None:
        refuse_unusable(self.kv_cache)
        if self.max_new_tokens < 1 or self.temperature < 0:
            raise ChatError("--max_new_tokens must be at least 1, and --temperature at least 0")


def read_document(path: str | Path) -> str:
    """The text of a file. Raises a ChatError where it is missing, empty or no UTF-8 text."""
    if not Path(path).exists():
        raise ChatError(f"no such document: {path}")
    if Path(path).is_dir():
        raise ChatError(f"{path} is a folder: give a text file")
    try:
        text = read_text(Path(path)).strip()
    except UnicodeError as error:
        raise ChatError(f"{path} is not UTF-8 text: convert it to plain text first") from error
    if not text:
        raise ChatError(f"{path} is empty: it must hold the text to talk about")
    return text


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the base's, the tokenizer's, and the first special one after a turn of the template."""
    ends = end_token_ids(model.generation_config.eos_token_id, tokenizer)
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}]
        after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(PROBE)[2]
        ids = tokenizer(after, add_special_tokens=False).input_ids
        ends += [token for token in ids if token in tokenizer.added_tokens_decoder][:1]
    return sorted(set(ends))


class _Stream(TextStreamer):
    """Writes whole words as they come, keeps the tokens, and is the stopping criterion that Ctrl-C sets."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Write) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.tokens, self.stopped = write, [], False

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.tokens += value.tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.write(text)

    def stop(self, *_: Any) -> None:
        """End the answer after the token in hand, which leaves the cache whole; at once before the first token, or when
        called again."""
        if self.stopped or not self.tokens:
            raise KeyboardInterrupt
        self.stopped = True

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((1,), self.stopped, device=input_ids.device)


@dataclass
class Chat:
    """A conversation, its model, and the cache of what the model has read.

    With a chat template the document goes into the first user turn. Without one the model continues a text: the
    document, then each line and its continuation.

    Raises:
        ChatError: a document that leaves no room for an answer, or a system message without a chat template.
        ValueError: see `kv_cache.refuse_unusable`.
    """

    model: Any
    """A PreTrainedModel or PeftModel; its generation_config is replaced by the settings."""
    tokenizer: Any
    pretrained_window: int
    """Tokens that the base was pretrained for."""
    target_length: int
    """Tokens that it was trained for."""
    settings: ChatSettings
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._cache: Cache | None = None
        self._cached: list[int] = []
        refuse_unusable(self.settings.kv_cache, self.model.config)
        if self.settings.system and not self.tokenizer.chat_template:
            raise ChatError("--system needs a chat template, and this tokenizer has none: leave it out")
        self.tokenizer.model_max_length = 10**30  # it would warn beyond the base's window
        # Not the base's own, which may ask for sampling or penalties.
        self.model.generation_config = GenerationConfig(
            max_new_tokens=self.settings.max_new_tokens,
            do_sample=self.settings.temperature > 0,
            temperature=self.settings.temperature or None,
            eos_token_id=end_tokens(self.model, self.tokenizer) or None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        self._refuse_too_long(self.tokens)

    @property
    def tokens(self) -> int:
        """Tokens of the conversation so far, the document included."""
        return len(self._ids(self.messages or [{"role": "user", "content": ""}]))

    def status(self) -> str:
        """How full the context is, in one line."""
        window, target = f"{self.pretrained_window:,}", f"{self.target_length:,}"
        reach = f"extended from {window} to {target}"
        if self.target_length <= self.pretrained_window:
            reach = f"trained for {target}, its window is {window}"
        return f"{self.tokens:,} tokens in the context; the model was {reach}"

    def ask(self, question: str, write: Write) -> str:
        """The answer to `question`, handed to `write` word by word; Ctrl-C ends it, and what there is of it stays.

        For the main thread: Python lets Ctrl-C be handled there only.

        Raises:
            ChatError: when an answer might not fit, or memory runs out; the conversation is then as before.
        """
        turns = [*self.messages, {"role": "user", "content": question}]
        ids = self._ids(turns)
        self._refuse_too_long(len(ids))
        stream = _Stream(self.tokenizer, write)
        handler = signal.signal(signal.SIGINT, stream.stop)
        try:
            self._generate(ids, stream)
        except KeyboardInterrupt:
            pass  # the tokens that came are the answer
        except (torch.OutOfMemoryError, MemoryError) as error:
            others = [kind for kind in kv_caches(self.model.config)[1:] if kind != self.settings.kv_cache]
            remedy = "take a shorter document" + "".join(f", or --kv_cache {kind}" for kind in others)
            raise ChatError(f"out of memory with {len(ids):,} tokens in the context: {remedy}") from error
        finally:
            signal.signal(signal.SIGINT, handler)
        # Decoded after its prompt: on its own it may lose the space that it begins with.
        before, after = (self.tokenizer.decode(part, skip_special_tokens=True) for part in (ids, ids + stream.tokens))
        answer = after[len(before) :]
        if stream.tokens:
            self.messages = [*turns, {"role": "assistant", "content": answer}]
        return answer

    def _ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of the conversation, ready for an answer where the user has the last word."""
        settings, (first, *others) = self.settings, messages
        try:
            if not self.tokenizer.chat_template:
                text = settings.document
                for message in messages:
                    text += "\n" * bool(text and message["role"] == "user") + message["content"]
                return self.tokenizer(text).input_ids
            if settings.document:
                content = WITH_DOCUMENT.format(document=settings.document, question=first["content"])
                first = {"role": "user", "content": content}
            system = [{"role": "system", "content": settings.system}] * bool(settings.system)
            return self.tokenizer.apply_chat_template(
                [*system, first, *others],
                add_generation_prompt=messages[-1]["role"] == "user",
                return_dict=False,
                # As it was trained and as `evaluate` asks.
                enable_thinking=False,
            )
        except Exception as error:  # tokenizers and templates raise nothing more precise
            raise ChatError(f"the tokenizer refuses this conversation: {error}") from error

    def _refuse_too_long(self, length: int) -> None:
        room = self.settings.max_new_tokens
        if length + room > self.target_length:
            document = "a shorter document or " if self.settings.document else ""
            reset = ", or start over with /reset" if self.messages else ""
            raise ChatError(
                f"{length:,} tokens and an answer of up to {room:,} exceed the {self.target_length:,} that the model "
                f"was trained for: take {document}a lower --max_new_tokens{reset}"
            )

    def _take_cache(self, ids: list[int]) -> tuple[Cache, int]:
        """The cache, cut to what it shares with `ids`, and how many tokens that is; a new one where it cannot be cut.

        It is put back after a whole answer only: one that an error left in mid-step is never used again.
        """
        cache, cached, self._cache, self._cached = self._cache, self._cached, None, []
        # The last token is always read, for its logits.
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(cached, ids[:-1], strict=False)))
        surplus = len(cached) - shared
        if cache is None or (surplus and not all(map(can_crop, cache.layers))):
            return new_cache(self.model.config, self.settings.kv_cache), 0
        if surplus:
            cache.crop(-surplus)
        return cache, shared

    @torch.no_grad()
    def _generate(self, ids: list[int], stream: _Stream) -> None:
        """Read what is not cached of `ids`, a chunk at a time, and generate after it."""
        cache, done = self._take_cache(ids)
        prompt, last = torch.tensor([ids], device=self.model.device), len(ids) - 1
        mask = torch.ones_like(prompt)
        # Not generate's prefill_chunk_size, which shows no progress.
        for start in trange(done, last, PREFILL_CHUNK, desc="reading", unit="chunk", leave=False, delay=2):
            end = min(start + PREFILL_CHUNK, last)
            self.model(prompt[:, start:end], mask[:, :end], past_key_values=cache, use_cache=True, logits_to_keep=1)
        inputs = {"input_ids": prompt, "attention_mask": mask, "past_key_values": cache}
        output = self.model.generate(**inputs, streamer=stream, stopping_criteria=StoppingCriteriaList([stream]))
        # The last token of an answer has not been read.
        self._cache, self._cached = cache, output[0, : cache.get_seq_length()].tolist()


def load_chat(adapter: str | Path, settings: ChatSettings, **load_options: Any) -> Chat:
    """A conversation with an adapter, a Hub id or a folder. `load_options` are those of `load_adapter`."""
    model, tokenizer = load_adapter(adapter, **load_options)
    record = model.trained_record
    return Chat(model, tokenizer, record.pretrained_window, record.target_length, settings)


def talk(chat: Chat, lines: Iterable[str], write: Write) -> int:
    """Answer `lines` until they end, /exit comes, or Ctrl-C is pressed while a line is awaited.

    Returns:
        How many of them were refused.
    """
    refused = 0
    write(f"{chat.status()}. /tokens counts again, /reset starts over, /exit leaves.\n")
    if not chat.tokenizer.chat_template:
        write("The tokenizer has no chat template: the model continues the text that you type.\n")
    try:
        for line in map(str.strip, lines):
            if line == "/exit":
                break
            if line.startswith("/") and line not in ("/reset", "/tokens"):
                write(f"{line.split()[0]} is no command: there are /tokens, /reset and /exit\n")
                refused += 1
                continue
            if line == "/reset":
                chat.messages = []
            if line in ("/reset", "/tokens"):
                write(f"{chat.status()}\n")
            elif line:
                try:
                    chat.ask(line, write)
                except ChatError as error:
                    write(f"error: {error}")
                    refused += 1
                write("\n")
    except KeyboardInterrupt:
        write("\n")
    return refused
