"""Perplexity by length: a window of that many tokens slides over a text, and each token is scored once."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ..model.kv_cache import PREFILL_CHUNK, new_cache
from .answers import chunked_logits
from .prompts import TaskError, digest_of, encode, read_texts

logger = logging.getLogger(__name__)

ROWS = 256
"""Rows of logits that are fp32 at a time."""


def window_nats(model: Any, tokens: list[int], scored: int, chunk_length: int, kv_cache: str = "default") -> float:
    """Sum of -ln p over the last `scored` of `tokens` [length], each given all those before it, in nats."""
    first = len(tokens) - scored
    targets = torch.tensor(tokens, device=model.device)
    cache, total = new_cache(model.config, kv_cache), 0.0
    # The last token predicts nothing that is known.
    for begin, logits in chunked_logits(model, tokens[:-1], cache, chunk_length, first=first - 1):
        following = targets[begin + 1 : begin + 1 + len(logits)]
        for rows, targeted in zip(logits.split(ROWS), following.split(ROWS), strict=True):
            total += functional.cross_entropy(rows.float(), targeted, reduction="sum").item()
    return total


def windows(count: int, length: int, stride: int, start: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, scored) of the windows over `count` tokens: `length` tokens each, the last `scored` of them new.

    `start` tokens that can predict the first token stand before every window; without one, the first token of the text
    is not scored.
    """
    begin = scored_up_to = 0
    while scored_up_to < count:
        end = min(begin + length - start, count)
        yield begin, end, end - max(scored_up_to, 1 - start)
        begin, scored_up_to = begin + stride, end


def _tokenised(tokenizer: Any, text: Any, max_tokens: int | None) -> Iterator[list[int]]:
    """The tokens of each document, without special tokens."""
    if text is None:
        raise TaskError("task perplexity has no text: set text to a file, or to a folder of .txt and .md files")
    for document in text if isinstance(text, list) else read_texts(text):
        yield encode(tokenizer, document, add_special_tokens=False)[:max_tokens]


def _kept(documents: list[list[int]], least: int) -> list[list[int]]:
    """The documents that are long enough."""
    kept = [document for document in documents if len(document) >= least]
    if not kept:
        longest = max(map(len, documents))
        raise TaskError(f"length {least:,} is more than the text holds: its longest document has {longest:,} tokens")
    if len(kept) < len(documents):
        logger.info("perplexity leaves out %d documents shorter than %d tokens", len(documents) - len(kept), least)
    return kept


@cache
def _tell_drawn(samples: int, count: int) -> None:
    """Once, not at every length and of every model."""
    logger.warning("perplexity reads %d of %d documents, drawn with the seed: --samples sets how many", samples, count)


def _window_stride(length: int, stride: int | None) -> int:
    stride = stride or length // 2
    if not 1 <= stride < length:
        # At least one token must stand before those that are scored.
        raise TaskError(f"stride={stride} must be between 1 and {length - 1:,}, one less than the length")
    return stride


def refuse_impossible(
    tokenizer: Any,
    length: int,
    *,
    text: Any = None,
    stride: int | None = None,
    min_tokens: int | None = None,
    max_tokens: int | None = None,
    **_: Any,
) -> None:
    """Raise the TaskError of `perplexity` for texts or a stride; texts are read up to the first that is long enough."""
    _window_stride(length, stride)
    least, read = max(length, min_tokens or 0), []
    for document in _tokenised(tokenizer, text, max_tokens):
        if len(document) >= least:
            return
        read.append(document)
    _kept(read, least)


def perplexity(
    model: Any,
    tokenizer: Any,
    length: int,
    samples: int,
    seed: int,
    *,
    done: Collection[float] = (),
    text: str | Path | list[str] | None = None,
    stride: int | None = None,
    min_tokens: int | None = None,
    max_tokens: int | None = None,
    chunk_length: int = PREFILL_CHUNK,
    kv_cache: str = "default",
) -> Iterator[dict[str, Any]]:
    """Perplexity per token of documents read through windows of `length` tokens: one cell, at depth 1.

    After a document's first window, every scored token has at least length - stride tokens before it. Each window
    begins with the beginning-of-text token if the tokenizer writes one. `samples` of the cell are the tokens scored.

    Args:
        samples: documents at most, drawn with `seed`. A file is one document.
        text: a UTF-8 file, a folder of .txt and .md files, or documents. Those shorter than `length` are left out.
        stride: tokens from one window to the next; half of `length` if None.
        min_tokens: leave out those shorter than this too; so that all lengths score the same documents.
        max_tokens: tokens read of each document; all if None.
    """
    if 1.0 in done:
        return
    first = encode(tokenizer, "a", add_special_tokens=True)[:1]
    start = first if first == [tokenizer.bos_token_id] else []
    stride = _window_stride(length, stride)
    documents = _kept(list(_tokenised(tokenizer, text, max_tokens)), max(length, min_tokens or 0))
    if len(documents) > samples:
        _tell_drawn(samples, len(documents))
    chosen = np.random.default_rng(seed).permutation(len(documents))[:samples]
    nats, count = 0.0, 0
    for document in (documents[index] for index in sorted(chosen)):
        for begin, end, scored in windows(len(document), length, stride, len(start)):
            nats += window_nats(model, start + document[begin:end], scored, chunk_length, kv_cache)
            count += scored
    cell = {"depth": 1.0, "metric": "perplexity", "value": math.exp(nats / count), "samples": count}
    yield cell | {"first_prompt": digest_of(start + documents[0][:length])}
