"""Greedy short answers to long prompts in the memory of one chunk: never a row of logits for each token of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from ..model.kv_cache import new_cache
from .prompts import Prompt, TaskError, Writer, dump_prompts

CHUNK_LENGTH = 1024


@torch.no_grad()
def chunked_logits(
    model: Any, tokens: list[int], cache: Cache, chunk_length: int, first: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Feed those of `tokens` that the cache does not hold yet, chunk by chunk; yield the logits from token `first` on.

    Yields:
        (begin, logits): logits [rows, vocabulary] of the tokens begin..begin + rows - 1, at most `chunk_length` rows.
    """
    ids = torch.tensor([tokens], device=model.device)
    for begin in range(cache.get_seq_length(), len(tokens), chunk_length):
        end = min(begin + chunk_length, len(tokens))
        rows = max(0, end - max(begin, first))
        output = model(
            input_ids=ids[:, begin:end],
            attention_mask=torch.ones_like(ids[:, :end]),
            position_ids=torch.arange(begin, end, device=ids.device)[None],
            past_key_values=cache,
            use_cache=True,
            # 0 would keep them all.
            logits_to_keep=max(1, rows),
        )
        if rows:
            yield end - rows, output.logits[0]


class _LineEnds(StoppingCriteria):
    """Stops a row once a line that says something is over."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_length: int) -> None:
        self.tokenizer, self.prompt_length = tokenizer, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        replies = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        return torch.tensor(["\n" in reply.lstrip() for reply in replies], device=input_ids.device)


def _generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    cache: Cache,
    answer_tokens: int,
    one_line: bool = False,
    chunk_length: int = CHUNK_LENGTH,
) -> list[str]:
    width = max(map(len, prompts))
    eos = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops, default=0)
    # On the left, and masked: transformers numbers each row's own tokens from 0.
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=model.device)
    mask = (torch.arange(width, device=model.device) >= width - lengths).long()
    settings = GenerationConfig(
        max_new_tokens=answer_tokens,
        do_sample=False,
        num_beams=1,
        # Some checkpoints bring a penalty, and the answer always repeats the prompt.
        repetition_penalty=1.0,
        # transformers 5.17 would feed all chunks again into a cache that already holds some.
        prefill_chunk_size=None if cache.get_seq_length() else chunk_length,
        eos_token_id=sorted(stops) or None,
        pad_token_id=pad,
    )
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        generation_config=settings,
        stopping_criteria=StoppingCriteriaList([_LineEnds(tokenizer, width)] if one_line else []),
    )
    replies = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return [reply.strip().split("\n")[0] if one_line else reply.strip() for reply in replies]


def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    answer_tokens: int,
    one_line: bool = False,
    chunk_length: int = CHUNK_LENGTH,
    kv_cache: str = "default",
) -> list[str]:
    """The greedy answer to each prompt (in tokens), at most `answer_tokens` long; prompts are read in chunks.

    Args:
        one_line: stop at the end of the first line that is not blank, as base models go on for ever.
    """
    cache = new_cache(model.config, kv_cache)
    return _generate(model, tokenizer, prompts, cache, answer_tokens, one_line, chunk_length)


def scored_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    expected: list[tuple[list[int], list[int]]],
    *,
    chunk_length: int = CHUNK_LENGTH,
    kv_cache: str = "default",
    **settings: Any,
) -> Iterator[tuple[str, float]]:
    """As `answers`, one prompt after the other; what all of them begin with is read once.

    Args:
        expected: the right reply to each prompt, in tokens: what it says before the answer, and the answer.
        settings: as `answers` has them.

    Yields:
        (answer, loss): loss is the mean negative log-likelihood of the right answer, after the prompt and what is said
        before it, in nats per token.
    """
    if kv_cache == "offloaded":
        raise TaskError("a document that is read once needs a cache that can be cut back: default or quantized")
    cache = new_cache(model.config, kv_cache)
    # Each prompt needs one token of its own, whose logits begin the answer.
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    for prompt, (said, answer) in zip(prompts, expected, strict=True):
        for _ in chunked_logits(model, prompt[:-1], cache, chunk_length, first=len(prompt)):
            pass
        read = prompt + said + answer[:-1]
        told = chunked_logits(model, read, cache, chunk_length, first=len(prompt + said) - 1)
        logits = torch.cat([logits for _, logits in told]).float()
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer, device=logits.device)).item()
        cache.crop(len(prompt) - 1 - cache.get_seq_length())
        reply = _generate(model, tokenizer, [prompt], cache, chunk_length=chunk_length, **settings)[0]
        cache.crop(shared - cache.get_seq_length())
        yield reply, loss


def _cell(depth: float, asked: list[tuple[int, int, float | None]]) -> dict[str, Any]:
    correct, tokens, losses = (list(column) for column in zip(*asked, strict=True))
    value, mean = sum(correct) / len(correct), sum(tokens) / len(tokens)
    cell = {"depth": depth, "metric": "accuracy", "value": value, "samples": len(correct)}
    cell |= {"tokens": round(mean, 1), "correct": "".join(map(str, correct))}
    return cell if None in losses else cell | {"answer_loss": [round(loss, 4) for loss in losses]}


def measure(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    samples: int,
    seed: int,
    *,
    prompt: Callable[..., Prompt],
    grade: Callable[[str, str], bool],
    depths: Collection[float],
    answer_tokens: int,
    done: Collection[float] = (),
    style: str = "auto",
    batch_size: int = 1,
    shared_document: bool = False,
    chunk_length: int = CHUNK_LENGTH,
    kv_cache: str = "default",
    dump: str | Path | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Accuracy of the answers to `samples` prompts at each depth that is not in `done`.

    Args:
        length: tokens that a prompt and its answer may take together.
        prompt: (writer, length, depth, index, seed, answer_tokens=, **options) -> Prompt.
        grade: (reply, answer) -> whether it is right.
        style: form of the prompt; see `prompts.Writer`.
        batch_size: prompts answered together, padded on the left.
        shared_document: the task's document is the same at every depth: read it once and ask it for all of them, unless
            prompts are batched or the cache is offloaded, which cannot be cut back. The cells of a length then come
            together, at its end.
        chunk_length, kv_cache: see `answers`.
        dump: add the prompts to this file, and ask the model nothing.
        options: the task's own.

    Yields:
        cells: depth, metric, value, samples, tokens (mean length of the prompts, without the answers), correct (a
        text of 0 and 1, one for each sample) and, unless prompts are batched or the cache is offloaded, answer_loss
        (for each sample the loss of the right answer in nats per token, see `scored_answers`): it tells models apart
        that are all right or all wrong.
    """
    if min(samples, batch_size, chunk_length) < 1 or not all(0 <= depth <= 1 for depth in depths):
        raise TaskError("samples, batch_size and chunk_length must be at least 1, and depths between 0 and 1")
    writer = Writer(tokenizer, style)
    pending = [depth for depth in depths if depth not in done]
    # Else the cache cannot be cut back.
    one_by_one = batch_size == 1 and kv_cache != "offloaded"
    if shared_document and one_by_one:
        groups = [[(depth, index) for depth in pending] for index in range(samples)] if pending else []
    else:
        cuts = [range(samples)[cut : cut + batch_size] for cut in range(0, samples, batch_size)]
        groups = [[(depth, index) for index in indices] for depth in pending for indices in cuts]
    found: dict[float, list[tuple[int, int, float | None]]] = {depth: [] for depth in pending}
    # A base model never stops by itself.
    settings = {"answer_tokens": answer_tokens, "one_line": writer.style == "plain"}
    settings |= {"chunk_length": chunk_length, "kv_cache": kv_cache}
    for group in groups:
        prompts = [prompt(writer, length, *place, seed, answer_tokens=answer_tokens, **options) for place in group]
        if dump is not None:
            dump_prompts(prompts, dump)
            continue
        read = [asked.tokens for asked in prompts]
        if one_by_one:
            replies = scored_answers(model, tokenizer, read, [asked.reply for asked in prompts], **settings)
        else:
            replies = ((reply, None) for reply in answers(model, tokenizer, read, **settings))
        for (depth, index), asked, (reply, loss) in zip(group, prompts, replies, strict=True):
            found[depth].append((int(grade(reply, asked.answer)), len(asked.tokens), loss))
            if index == samples - 1:
                yield _cell(depth, found[depth])
