"""Key-value retrieval of "Lost in the Middle" (arXiv 2307.03172): a JSON object of random UUIDs, one key asked for."""

from __future__ import annotations

import uuid

from .prompts import Case, Prompt, Request, Writer, drawn, position, prompt_rng

QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)
PAPER_POSITIONS = {75: (0, 18, 37, 54, 74), 140: (0, 34, 69, 104, 139)}
"""Number of keys -> the five places asked by the CREAM paper (wutong4012/CREAM, scripts/eval_lost_in_the_middle.sh)."""


def kv_depths(keys: int = 0) -> tuple[float, ...]:
    """Quarters, or the paper's places for its numbers of keys."""
    if keys not in PAPER_POSITIONS:
        return QUARTERS
    return tuple(round(place / (keys - 1), 4) for place in PAPER_POSITIONS[keys])


def _question(pairs: list[tuple[str, str]], key: str, query_aware: bool) -> str:
    # nelson-liu/lost-in-the-middle, src/lost_in_the_middle/prompts/kv_retrieval.prompt, and beside it
    # kv_retrieval_with_query_aware_contextualization.prompt
    before = f'Key: "{key}"\n\n' if query_aware else ""
    records = ",\n ".join(f'"{name}": "{value}"' for name, value in pairs)
    return (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        f'{before}JSON data:\n{{{records}}}\n\nKey: "{key}"\nCorresponding value:'
    )


def kv_prompt(writer: Writer, case: Case, *, keys: int = 0, query_aware: bool = False) -> Prompt:
    """One key of `keys` pairs of version 4 UUIDs, or of as many as fit. The document is the same at every depth.

    Args:
        query_aware: name the key before the document as well, as in section 4.2 of the paper.
    """
    rng = prompt_rng("kv_retrieval", case.seed, case.length, case.index)

    def word() -> str:
        return str(uuid.UUID(bytes=rng.bytes(16), version=4))

    pairs = drawn(lambda: (word(), word()))

    def build(count: int) -> Request:
        asked, document = position(case.depth, count), pairs(count)
        key, value = document[asked]
        said = f'The value of "{key}" is "'
        return Request(_question(document, key, query_aware), "", said, value, {"keys": count, "position": asked})

    return writer.fitted(case, build, "key", keys)
