"""Greedy short answers to long prompts, read in chunks: no row of logits is made for each token of a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

import torch
from transformers import Cache

from ..model.kv_cache import new_cache
from .prompts import Prompt

CHUNK_LENGTH = 1024


@torch.no_grad()
def chunked_logits(
    model: Any, tokens: list[int], cache: Cache, chunk_length: int, first: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Read those of `tokens` that the cache does not hold yet, chunk by chunk; yield the logits from token `first` on.

    Yields:
        (begin, logits): logits [rows, vocabulary] of the tokens begin..begin + rows - 1, at most `chunk_length` rows.
    """
    held = cache.get_seq_length()
    ids = torch.tensor([tokens[held:]], device=model.device)
    for begin in range(held, len(tokens), chunk_length):
        end = min(begin + chunk_length, len(tokens))
        rows = max(0, end - max(begin, first))
        output = model(
            input_ids=ids[:, begin - held : end - held],
            attention_mask=torch.ones(1, end, dtype=torch.long, device=ids.device),
            position_ids=torch.arange(begin, end, device=ids.device)[None],
            past_key_values=cache,
            use_cache=True,
            # 0 would keep them all.
            logits_to_keep=max(1, rows),
        )
        if rows:
            yield end - rows, output.logits[0]


def greedy_answer(
    model: Any,
    tokenizer: Any,
    prompt: list[int],
    cache: Cache,
    *,
    answer_tokens: int,
    one_line: bool = False,
    chunk_length: int = CHUNK_LENGTH,
) -> str:
    """The greedy answer to a prompt, whose first tokens the cache may hold; at most `answer_tokens` tokens long.

    Not `model.generate`, which applies penalties that some checkpoints bring: the answer always repeats the prompt.

    Args:
        one_line: stop after the first line that is not blank. A base model never stops by itself.
    """
    eos = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
    tokens, reply = list(prompt), ""
    while len(tokens) < len(prompt) + answer_tokens:
        ((_, logits),) = chunked_logits(model, tokens, cache, chunk_length, first=len(tokens) - 1)
        token = int(logits[-1].argmax())
        if token in stops:
            break
        tokens.append(token)
        reply = tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)
        if one_line and "\n" in reply.lstrip():
            break
    reply = reply.strip()
    return reply.split("\n")[0] if one_line else reply


def _loss(model: Any, prompt: Prompt, cache: Cache, chunk_length: int) -> float:
    """Mean negative log-likelihood of the right answer, in nats per token. The cache then holds it as well."""
    said, answer = prompt.reply
    before = prompt.tokens + said
    chunks = chunked_logits(model, before + answer[:-1], cache, chunk_length, first=len(before) - 1)
    logits = torch.cat([logits for _, logits in chunks]).float()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(answer, device=logits.device)).item()


def scored_answers(
    model: Any,
    tokenizer: Any,
    prompts: list[Prompt],
    *,
    chunk_length: int = CHUNK_LENGTH,
    kv_cache: str = "default",
    **settings: Any,
) -> Iterator[tuple[str, float]]:
    """Answer prompts one by one; the tokens with which all of them begin are read once.

    Args:
        settings: those of `greedy_answer`.

    Yields:
        (answer, loss): the greedy answer, see `greedy_answer`, and the mean negative log-likelihood of the right one,
        after the prompt and what is said before the answer, in nats per token.
    """
    cache = new_cache(model.config, kv_cache)
    # The last token of each prompt is not shared: its logits begin the answer.
    columns = zip(*(prompt.tokens[:-1] for prompt in prompts), strict=False)
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    for prompt in prompts:
        tokens = prompt.tokens
        for _ in chunked_logits(model, tokens[:-1], cache, chunk_length, first=len(tokens)):
            pass
        loss = _loss(model, prompt, cache, chunk_length)
        cache.crop(len(tokens) - 1 - cache.get_seq_length())
        yield greedy_answer(model, tokenizer, tokens, cache, chunk_length=chunk_length, **settings), loss
        cache.crop(shared - cache.get_seq_length())
