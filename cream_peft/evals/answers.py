"""Greedy short answers to long prompts, read in chunks: no row of logits is made for each token of a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import Cache

from ..model.adapter import end_token_ids
from ..model.kv_cache import PREFILL_CHUNK, Mark, new_cache
from .prompts import Prompt, shared_tokens


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
    chunk_length: int = PREFILL_CHUNK,
) -> str:
    """The greedy answer to a prompt, of which the cache may hold the beginning; `one_line`: its first line.

    Not `model.generate`, which applies penalties that some checkpoints bring: the answer always repeats the prompt.
    """
    stops = end_token_ids(model.generation_config.eos_token_id, tokenizer)
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
    return reply.strip().split("\n")[0] if one_line else reply.strip()


def scored_answers(
    model: Any,
    tokenizer: Any,
    prompts: list[Prompt],
    *,
    chunk_length: int = PREFILL_CHUNK,
    kv_cache: str = "default",
    **settings: Any,
) -> Iterator[tuple[str, list[float]]]:
    """Answer prompts one by one, with the settings of `greedy_answer`; what all of them begin with is read once.

    Yields:
        (answer, losses): the greedy answer, and for each form of a right reply the mean negative log-likelihood of the
        right answer, after the prompt and what is said before the answer, in nats per token.
    """
    cache = new_cache(model.config, kv_cache)

    def read(tokens: list[int]) -> Mark:
        for _ in chunked_logits(model, tokens, cache, chunk_length, first=len(tokens)):
            pass
        return Mark.at_end_of(cache)

    # The last token of each prompt is not shared: its logits begin the answer.
    beginning = read(prompts[0].tokens[: shared_tokens([prompt.tokens[:-1] for prompt in prompts])])
    for prompt in prompts:
        tokens, losses = prompt.tokens, []
        asked = read(tokens[:-1])
        for said, answer in prompt.replies:
            first = len(tokens + said) - 1
            told = chunked_logits(model, tokens + said + answer[:-1], cache, chunk_length, first)
            logits = torch.cat([logits for _, logits in told]).float()
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer, device=logits.device)).item())
            asked.rewind(cache)
        yield greedy_answer(model, tokenizer, tokens, cache, chunk_length=chunk_length, **settings), losses
        beginning.rewind(cache)
