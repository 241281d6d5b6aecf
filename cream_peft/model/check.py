"""What a downloaded adapter is, and what happens to those who load it in the usual way."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from .. import rope
from ..errors import explain, is_out_of_reach
from ..families import far_parameters, key_mapping
from .adapter import Adapter, adapter_folder, open_adapter
from .fingerprint import weight_files
from .misfit import read_peft_config, read_scaled_config, refuse_misfit
from .record import Record, is_adapter
from .tokenizer import load_tokenizer

PRIVATE_FILE = "training_args.bin"
UNSCALED = (
    "{rope}: UNSCALED. PeftModel and AutoModelForCausalLM give this without a word; it looks right on short prompts "
    "and is not the model that was trained. Beyond {window:,} tokens it fails. Use cream_peft.load_adapter, or pass "
    "config=AutoConfig.from_pretrained({name!r}, subfolder='base_config')"
)


@dataclass(frozen=True)
class Finding:
    """One line of what `cream-peft check` prints."""

    item: str
    verdict: str
    """ok, trap (silent and wrong for those who load it in the usual way), wrong, or not read."""
    found: str


def describe_rope(config: PreTrainedConfig, scaling: str | None = None) -> str:
    """RoPE of a config in one line; `scaling` by its name, which is not in the config if it is ntk."""
    parameters = dict(far_parameters(config))
    kind, theta = parameters.pop("rope_type", "default"), parameters.pop("rope_theta")
    named = kind if scaling in (None, kind) else scaling if kind == "default" else f"{scaling} on {kind}"
    rest = "".join(f", {key} {value:g}" for key, value in parameters.items() if isinstance(value, int | float))
    return f"{named}, theta {theta:,.0f}{rest}, max_position_embeddings {config.max_position_embeddings:,}"


def _reach(record: Record) -> Finding:
    if record.is_within_window:
        found = f"{record.target_length:,} tokens, within the base's window of {record.pretrained_window:,}"
        return Finding("trained for", "ok", found)
    how = "" if record.rope_scaling_type else ", without RoPE scaling"
    return Finding("extended", "ok", f"{record.pretrained_window:,} to {record.target_length:,} tokens{how}")


def check_weights(path: Path) -> Finding:
    """Whether the adapter's tensors are finite, and have moved: lora_B starts at zero."""
    item = "adapter weights"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    damaged = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if damaged:
        return Finding(item, "wrong", f"{damaged[0]} holds values that are not finite: train it again")
    ups = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    if ups and not any(tensor.any() for tensor in ups):
        return Finding(item, "wrong", "lora_B is zero throughout: the adapter does nothing, it never trained")
    size = sum(tensor.numel() for tensor in tensors.values())
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    return Finding(item, "ok", f"{len(tensors)} tensors, {size / 1e6:.2f} M parameters, {', '.join(kinds)}")


def _tokenizer(load: Callable[[], PreTrainedTokenizerBase], config: PreTrainedConfig) -> Finding:
    """Whether it loads, and has no id that the embeddings lack."""
    try:
        tokenizer = load()
    except Exception as error:  # of the libraries' many kinds
        return Finding("tokenizer", "wrong", explain(error))
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= config.vocab_size:
        found = f"its largest id, {largest:,}, is outside the vocabulary of {config.vocab_size:,}: take the base's"
        return Finding("tokenizer", "wrong", found)
    return Finding("tokenizer", "ok", f"{largest + 1:,} ids, truncates at {tokenizer.model_max_length:,} tokens")


def _private_files(folder: Path) -> list[Finding]:
    if not (folder / PRIVATE_FILE).exists():
        return []
    return [Finding("other files", "wrong", f"{PRIVATE_FILE} may hold tokens and paths: remove it before sharing")]


def _mixture(folder: Path, record: Record) -> list[Finding]:
    """What is wrong with weights that were put beside another adapter's cream.json."""
    if record.is_of(folder):
        return []
    return [Finding("cream.json", "wrong", "was written for other weights than those beside it: get the adapter again")]


def _check_whole(folder: Path, config: PreTrainedConfig) -> Finding:
    """Whether a model's files hold the tensors that its config asks for, as transformers loads them, and all of them
    are finite."""
    item, files, shown = "weights", weight_files(folder), transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        loader: Any = AutoModelForCausalLM
        _, found = loader.from_pretrained(
            folder, config=copy.deepcopy(config), device_map="meta", trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True, **key_mapping(config),
        )  # fmt: skip
    except RuntimeError:
        return Finding(
            item, "wrong", "transformers cannot join an expert's tensors, of which some may be missing: merge again"
        )
    finally:
        transformers_logging.set_verbosity(shown)
    wrong: dict[str, tuple[Any, Any]] = dict.fromkeys(found["missing_keys"], ("missing", "it"))
    wrong |= dict.fromkeys(found["unexpected_keys"], ("there", "no such tensor"))
    wrong |= {name: (list(there), list(asked)) for name, there, asked in found["mismatched_keys"]}
    for name, (there, asked) in sorted(wrong.items()):
        return Finding(item, "wrong", f"{name} is {there}, and config.json asks for {asked}: merge again")
    for path in sorted({path for path, _ in files.values()}):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if not torch.isfinite(file.get_tensor(name)).all():
                    return Finding(item, "wrong", f"{name} holds values that are not finite: train it again")
    return Finding(item, "ok", f"{len(files)} tensors, as config.json asks for")


def _check_listed(name: str, commit: str, token: Any = None, cache_dir: Any = None, **_: Any) -> Finding:
    """Whether a model's repository on the Hub has the files of its weights. They are not downloaded for this."""
    item, wanted = "weights", {SAFE_WEIGHTS_NAME}
    try:
        files = set(HfApi(token=token).list_repo_files(name, revision=commit))
        if SAFE_WEIGHTS_INDEX_NAME in files:
            at: dict[str, Any] = {"revision": commit, "token": token, "cache_dir": cache_dir}
            index = Path(hf_hub_download(name, SAFE_WEIGHTS_INDEX_NAME, **at))
            wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except Exception as error:
        if not is_out_of_reach(error):
            raise
        return Finding(item, "not read", explain(error))
    if lost := sorted(wanted - files):
        return Finding(item, "wrong", f"{lost[0]} is not there: publish the model again")
    return Finding(item, "not read", f"{len(wanted)} file{'s' * (len(wanted) > 1)}, not downloaded for this")


def _check_merged(folder: Path, record: Record, is_here: bool) -> list[Finding]:
    config, target = rope.load_base_config(folder / "config.json"), record.target_length
    scaling = record.rope_scaling_type
    is_other = scaling in ("linear", "yarn") and far_parameters(config)["rope_type"] not in (scaling, "proportional")
    if is_other or config.max_position_embeddings != max(target, record.pretrained_window):
        found = f"{describe_rope(config)}: config.json is not that of the merge ({scaling}, {target:,} tokens)"
        return [Finding("RoPE", "wrong", f"{found}: merge again")]
    return [
        Finding("kind", "ok", f"{'a fully trained' if record.full else 'a merged'} model of {record.base_model}"),
        _reach(record),
        Finding("RoPE", "ok", describe_rope(config, scaling)),
        # Those of a model on the Hub are not downloaded for this.
        *([_check_whole(folder, config), *_mixture(folder, record)] if is_here else []),
        _tokenizer(lambda: load_tokenizer(str(folder)), config),
        Finding("plain load", "ok", "AutoModelForCausalLM.from_pretrained is right as it is"),
        *_private_files(folder),
    ]


def _check_own(adapter: Adapter) -> list[Finding]:
    """What can be said of an adapter's own files."""
    return [
        check_weights(adapter.folder / "adapter_model.safetensors"),
        *_mixture(adapter.folder, adapter.record),
        _tokenizer(adapter.tokenizer, adapter.scaled_config),
        *_private_files(adapter.folder),
    ]


def check_without_base(folder: Path) -> list[Finding]:
    """Findings on an adapter whose base cannot be read, such as a gated one: on its own files.

    Raises:
        AdapterError: if the adapter is not complete, or its files do not fit one another.
    """
    name = str(folder)
    record, trained = Record.read(folder, name), read_scaled_config(folder, name, None, "")
    options = {"trust_remote_code": False}
    adapter = Adapter(folder, record, record.base_model, options, trained, trained, read_peft_config(folder, name))
    refuse_misfit(adapter, name)
    return _check_own(adapter)


def check_adapter(
    repo_or_dir: str | Path,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **hub_kwargs: Any,
) -> list[Finding]:
    """Findings on an adapter or a merged model. Options: see `open_adapter`.

    Raises:
        AdapterError: as `open_adapter`: if the adapter is not complete, such as one that plain PEFT saved, if its files
            do not fit one another, or the base is not the one trained on.
    """
    folder = adapter_folder(repo_or_dir, revision=revision, **hub_kwargs)
    if not is_adapter(folder) and (folder / "config.json").is_file():
        is_here = Path(repo_or_dir).is_dir()
        found = _check_merged(folder, Record.read(folder, str(repo_or_dir), is_here), is_here)
        return found if is_here else [_check_listed(str(repo_or_dir), folder.name, **hub_kwargs), *found]
    adapter = open_adapter(
        repo_or_dir, base_model=base_model, revision=revision, trust_remote_code=trust_remote_code, **hub_kwargs
    )
    record, trained, plain = adapter.record, adapter.scaled_config, adapter.base_config
    load = Finding("plain PEFT load", "ok", "the base's RoPE is not scaled, so nothing is lost")
    if plain.rope_parameters != trained.rope_parameters:
        said = UNSCALED.format(rope=describe_rope(plain), window=record.pretrained_window, name=str(repo_or_dir))
        load = Finding("plain PEFT load", "trap", said)
    at = f" at {record.base_revision[:12]}" if record.base_revision else ""
    return [
        Finding("files", "ok", "complete, and the adapter's tensors are those that its base takes"),
        Finding("base", "ok", f"{adapter.base_name}{at}, shape and vocabulary as trained on"),
        _reach(record),
        Finding("RoPE trained with", "ok", describe_rope(trained, record.rope_scaling_type)),
        *_check_own(adapter),
        load,
    ]
