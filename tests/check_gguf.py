"""Does a GGUF of a merged model compute in llama.cpp what the merged model computes in transformers?

Both score every next token of one long text. The control is the same weights with the base's own RoPE: the text must
be longer than the base's window, since at short distances scaled and unscaled RoPE are hardly told apart.

    pip install llama-cpp-python    # compiles llama.cpp
    python tests/check_gguf.py merged model.gguf book.txt --base meta-llama/Llama-2-7b-hf

Memory: the weights in fp32, and twice tokens x vocabulary x 4 bytes of logits. Prints JSON. The exit status is 1 unless
both cut the text into the same tokens and, beyond the window, llama.cpp's log-probabilities differ from transformers'
by less than CLOSE times what the control's do.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

CLOSE = 0.1
"""Relative, since f16 or 4-bit weights move every log-probability a little, and wrong RoPE moves them far more."""

Scores = tuple[np.ndarray, np.ndarray]
"""log p (N-1,) of every next token in nats, and the likeliest next tokens (N-1,)."""


def scores(logits: np.ndarray, tokens: list[int]) -> Scores:
    """Of logits (N-1, V) for the N tokens, 512 rows at a time to spare memory."""
    targets = torch.tensor(tokens[1:])[:, None]
    rows = zip(torch.from_numpy(logits).split(512), targets.split(512), strict=True)
    found = [part.double().log_softmax(-1).gather(1, target) for part, target in rows]
    return torch.cat(found)[:, 0].numpy(), logits.argmax(axis=1)


def with_transformers(folder: Path, config: PreTrainedConfig | None, tokens: list[int]) -> Scores:
    """In fp32 on the CPU, with `config` instead of the folder's where one is given."""
    given = {} if config is None else {"config": config}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given).eval()
    with torch.inference_mode():
        return scores(model(torch.tensor([tokens[:-1]]), use_cache=False).logits[0].numpy(), tokens)


def loaded_gguf(path: Path, context: int, threads: int, **settings: Any) -> llama_cpp.Llama:
    """fp32 keys and values and plain attention: what is left is RoPE, the weights' format and rounding. `settings`:
    others of Llama's."""
    return llama_cpp.Llama(
        str(path),
        n_ctx=context,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=0,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        **settings,
    )


def difference(one: Scores, other: Scores, where: slice) -> dict[str, float]:
    """How far two scorings of the tokens `where` are apart, in nats a token."""
    distance = np.abs(one[0] - other[0])[where]
    return {
        "mean": float(distance.mean()),
        "largest": float(distance.max()),
        "same_likeliest_token": float((one[1] == other[1])[where].mean()),
    }


def report(given: argparse.Namespace) -> dict[str, object]:
    text = given.text.read_text(encoding="utf-8")
    tokens = AutoTokenizer.from_pretrained(given.merged)(text).input_ids[: given.tokens]
    base = AutoConfig.from_pretrained(given.base)
    window = base.max_position_embeddings
    if len(tokens) <= window + 1:
        raise SystemExit(f"{given.text} has {len(tokens)} tokens, the base's window is {window}: give a longer text")
    model = loaded_gguf(given.gguf, len(tokens), given.threads)
    model.eval(tokens[:-1])
    found = {
        "transformers": with_transformers(given.merged, None, tokens),
        "llama_cpp": scores(model.scores[: len(tokens) - 1], tokens),
        "control": with_transformers(given.merged, base, tokens),
    }
    within, beyond = slice(0, window), slice(window, None)
    near = difference(found["transformers"], found["llama_cpp"], beyond)
    far = difference(found["transformers"], found["control"], beyond)
    same_tokens = model.tokenize(text.encode())[: len(tokens)] == tokens
    return {
        "agrees": same_tokens and near["mean"] < CLOSE * far["mean"],
        "same_tokens": same_tokens,
        "tokens": len(tokens),
        "window": window,
        "loss_beyond_window": {name: -float(part[0][beyond].mean()) for name, part in found.items()},
        "llama_cpp_within_window": difference(found["transformers"], found["llama_cpp"], within),
        "llama_cpp_beyond_window": near,
        "control_beyond_window": far,
        "gguf": {key: value for key, value in model.metadata.items() if "rope" in key or "context_length" in key},
        "llama_cpp_python": llama_cpp.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("merged", type=Path, help="folder of the merged model, with its config.json and tokenizer")
    parser.add_argument("gguf", type=Path, help="what convert_hf_to_gguf.py made of it")
    parser.add_argument("text", type=Path, help="UTF-8 text, longer than the base's window")
    parser.add_argument("--base", required=True, help="the unscaled base: its folder or Hub id, for the config only")
    parser.add_argument("--tokens", type=int, default=8192, help="how many tokens of the text to score (8192)")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = report(given)
    print(json.dumps(found, indent=2))
    return 0 if found["agrees"] else 1


if __name__ == "__main__":
    sys.exit(main())
