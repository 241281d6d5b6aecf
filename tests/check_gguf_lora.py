"""Does the base's GGUF with the adapter as a GGUF LoRA compute in llama.cpp what the adapter does in transformers?

Both score every next token of one long text, cut by the adapter's tokenizer. llama.cpp gets the flags of the very line
that `cream-peft merge --gguf_lora` prints. The controls leave one thing out each: the flags, the adapter, and for Llama
and Mistral the order of the rows of q and k. The tokens beyond the base's window are compared; of a text that ends
within it all of them, which is cheaper and tells less.

    pip install llama-cpp-python    # compiles llama.cpp
    python tests/check_gguf_lora.py runs/mine base.gguf book.txt

Memory: as check_gguf.py. Prints JSON. The exit status is 1 unless llama-server would go up to the target, and
llama.cpp's log-probabilities differ from transformers' by less than CLOSE times what each control's do.
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import llama_cpp
import torch
from check_gguf import CLOSE, Scores, difference, loaded_gguf, scores

from cream_peft import load_adapter
from cream_peft.model.record import Record
from cream_peft.publish import gguf_lora


def settings_of(command: str) -> dict[str, Any]:
    """What Llama takes for the flags of a llama-server line."""
    words = shlex.split(command.replace("\\\n", ""))
    given = dict(zip(words[1::2], words[2::2], strict=True))
    kinds = {"linear": llama_cpp.LLAMA_ROPE_SCALING_TYPE_LINEAR, "yarn": llama_cpp.LLAMA_ROPE_SCALING_TYPE_YARN}
    settings: dict[str, Any] = {}
    for flag, value in given.items():
        if flag == "--rope-scaling":
            settings["rope_scaling_type"] = kinds[value]
        elif flag == "--rope-scale":
            settings["rope_freq_scale"] = 1 / float(value)
        elif flag == "--rope-freq-base":
            settings["rope_freq_base"] = float(value)
        elif flag == "--yarn-orig-ctx":
            settings["yarn_orig_ctx"] = int(value)
        elif flag == "--override-kv":
            key, length = value.split("=int:")
            settings["kv_overrides"] = {key: int(length)}
        elif flag not in ("-m", "--lora", "-c"):
            raise SystemExit(f"{flag} of the line is not tried here")
    return settings


def with_llama_cpp(given: argparse.Namespace, tokens: list[int], **settings: Any) -> tuple[Scores, int]:
    """Its scores, and its n_ctx_train, where llama-server stops."""
    model = loaded_gguf(given.gguf, len(tokens), given.threads, verbose=False, **settings)
    model.eval(tokens[:-1])
    longest = llama_cpp.llama_model_n_ctx_train(model._model.model)
    found = scores(model.scores[: len(tokens) - 1], tokens)
    model.close()
    return found, longest


def report(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    text = given.text.read_text(encoding="utf-8")
    record = Record.read(given.adapter, str(given.adapter))
    window = record.pretrained_window
    model, tokenizer = load_adapter(
        given.adapter, base_model=given.base_model, load_in_4bit=False, dtype=torch.float32, attn_implementation="sdpa"
    )
    tokens = tokenizer(text, truncation=False).input_ids[: given.tokens]
    with torch.inference_mode():
        logits = model.eval()(torch.tensor([tokens[:-1]]), use_cache=False).logits[0].numpy()
    wanted = scores(logits, tokens)
    del model, logits

    file, misplaced = folder / "adapter.gguf", folder / "misplaced.gguf"
    written = gguf_lora.write_gguf_lora(given.adapter, file, base_model=given.base_model)
    settings = settings_of(written.command)
    found, longest = with_llama_cpp(given, tokens, lora_path=str(file), **settings)
    controls = {"without_flags": with_llama_cpp(given, tokens, lora_path=str(file))[0]}
    if not given.quick:
        controls["without_adapter"] = with_llama_cpp(given, tokens, **settings)[0]
    with mock.patch.object(gguf_lora, "in_pairs", lambda rows, heads: rows):
        gguf_lora.write_gguf_lora(given.adapter, misplaced, base_model=given.base_model)
    if not given.quick and misplaced.read_bytes() != file.read_bytes():
        controls["rows_in_transformers_order"] = with_llama_cpp(given, tokens, lora_path=str(misplaced), **settings)[0]

    part, where = ("beyond", slice(window, None)) if len(tokens) > window + 1 else ("within", slice(0, window))
    near = difference(wanted, found, where)
    far = {name: difference(wanted, control, where) for name, control in controls.items()}
    is_close = near["mean"] < CLOSE * min(control["mean"] for control in far.values())
    return {
        "agrees": is_close and longest == max(window, record.target_length),
        "tokens": len(tokens),
        "window": window,
        "target": record.target_length,
        "n_ctx_train": longest,
        "layers": written.layers,
        "command": gguf_lora.llama_cpp_command(given.adapter, record),
        f"loss_{part}_window": {
            "transformers": -float(wanted[0][where].mean()),
            "llama_cpp": -float(found[0][where].mean()),
        },
        "within_window": difference(wanted, found, slice(0, window)),
        f"{part}_window": near,
        f"controls_{part}_window": far,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="folder of the adapter")
    parser.add_argument("gguf", type=Path, help="what convert_hf_to_gguf.py made of its base, --outtype f32")
    parser.add_argument("text", type=Path, help="UTF-8 text")
    parser.add_argument("--base_model", help="folder or Hub id of the base, where the adapter does not name it")
    parser.add_argument("--tokens", type=int, default=8192, help="how many tokens of the text to score (8192)")
    parser.add_argument("--quick", action="store_true", help="one control: without the flags")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = report(given, Path(folder))
    print(json.dumps(found, indent=2))
    return 0 if found["agrees"] else 1


if __name__ == "__main__":
    sys.exit(main())
