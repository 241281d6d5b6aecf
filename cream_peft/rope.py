"""RoPE scaling: the base's config for a longer window, put on a model, checked, and published.

Every function takes transformers configs. A *scaled* config is what `scaled_config` returns: its rope_parameters are
those the model runs with and its max_position_embeddings is the target length L, whatever the scaling.
"""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from .families import (
    RopeError,
    family_of,
    far_parameters,
    keys_of_transformers_4,
    refuse_unknown,
    slowest_exponent,
    with_far_parameters,
)
from .scalings import ROPE_SCALING_TYPES, holds_numbers, own_parameters

UNSCALED = "cream_unscaled"
"""Key of the base_config/config.json beside an adapter: how the base is before it is scaled. The config of a merged
model has none, for its weights are made for the scaled RoPE."""
DEFAULT_FACTOR = 8
"""Target length over the pretrained window, where none is given."""

BASE_ROPE_TYPES = ("default", "llama3", "linear", "yarn", "proportional")
"""rope_type of the bases accepted. The others (dynamic, longrope) change with the length of the input."""


def pretrained_window(config: PreTrainedConfig) -> int:
    """P, the length in tokens that the base was pretrained for: its max_position_embeddings."""
    window = getattr(config, "max_position_embeddings", None)
    if not isinstance(window, int) or window < 1:
        raise RopeError(f"max_position_embeddings is {window!r}: set it to the base's pretrained window, in tokens")
    return window


def doubts(config: PreTrainedConfig, target_length: int, rope_scaling_type: str | None) -> list[str]:
    """A line for each reason to doubt that the base, unscaled, reaches `target_length` tokens.

    Without scaling nothing was done for positions beyond the window. And max_position_embeddings may be a part of what
    the base reads: with linear RoPE scaling some models' configs have it multiplied by the factor, and some have not.
    """
    parameters, window, found = far_parameters(config), pretrained_window(config), []
    if target_length <= window:
        return found
    if rope_scaling_type is None:
        found.append(
            f"rope_scaling_type is none and target_length={target_length:,} is beyond the base's window of {window:,}: "
            "positions that the base never saw are left to the training alone; yarn, linear or ntk scale them"
        )
    if parameters.get("rope_type") == "linear" and not family_of(config.model_type).has_whole_window:
        factor = parameters["factor"]
        found.append(
            f"the base has linear RoPE scaling already, of factor {factor:g}, and its max_position_embeddings, "
            f"{window:,}, is taken for all that it reads. If that is {window * factor:,.0f}, set it in a copy of its "
            "config.json"
        )
    return found


def _far_parameters(config: PreTrainedConfig, target_length: int = 0) -> dict[str, Any]:
    """RoPE parameters of the layers that see everything, or a RopeError where the formulas here would not be what the
    model computes."""
    refuse_unknown(config, target_length)
    kind, parameters = config.model_type, far_parameters(config)
    if parameters.get("rope_theta") is None:
        raise RopeError(
            f"rope_theta is missing from config.rope_parameters of model_type {kind!r} (assigning rope_scaling drops "
            "it): set config.rope_parameters['rope_theta']"
        )
    stray = vars(config).get("rope_theta")
    if stray is not None and stray != parameters["rope_theta"]:
        raise RopeError(
            f"config.rope_theta is {stray} but config.rope_parameters['rope_theta'] is {parameters['rope_theta']}, "
            "and only the second has an effect: set that one"
        )
    return parameters


def scaled_config(config: PreTrainedConfig, target_length: int, rope_scaling_type: str | None) -> PreTrainedConfig:
    """A new config with the RoPE for `target_length` tokens; `config` itself is not touched.

    With P the pretrained window, s = target_length / P, d the features of a head that rotate and inverse frequencies
    theta^(-2i/d):

    - linear: every frequency divided by s (arXiv 2306.15595).
    - ntk: theta * s^(d/(d-2)) (bloc97, 2023): the fastest pair is kept, the slowest is divided by s. Written as a
      plain larger rope_theta, which every runtime reads.
    - yarn: arXiv 2309.00071, with cosines and sines times 0.1 ln s + 1. That factor is every runtime's default and is
      not written out: llama.cpp takes its own 0.1 ln s + 1, whatever is written.
    - a name that register_scaling was given: the numbers of that function, see scalings.py.
    - None: rope_parameters untouched.

    Where a family has a RoPE for each kind of layer, that of the full-attention layers is scaled and that of the
    sliding ones stays. gpt-oss has one for both, and runtimes read one: its sliding layers are scaled too.

    A base that is scaled already keeps its rope_type: it takes that type again, its factor multiplied by s (yarn's
    attention factor follows), or ntk. For llama3 (Llama-3.1) that is right because
    its rule maps each frequency to another one by its wavelength, and is applied after theta: the fastest pair is
    still kept and the slowest still divided by exactly s, on top of the base's own scaling; pairs whose longer
    wavelength moves them along llama3's ramp are slowed by more than s, none is sped up.
    target_length equal to P changes nothing.
    """
    if rope_scaling_type not in (None, *ROPE_SCALING_TYPES):
        allowed = ", ".join(ROPE_SCALING_TYPES)
        raise RopeError(f"rope_scaling_type is {rope_scaling_type!r}: choose one of {allowed}, or leave it unset")
    parameters, window = _far_parameters(config, target_length), pretrained_window(config)
    found = parameters.get("rope_type", "default")
    if found not in BASE_ROPE_TYPES and not holds_numbers(parameters):
        allowed = ", ".join(BASE_ROPE_TYPES)
        raise RopeError(f"the base has rope_type {found!r}: use a base whose rope_type is one of {allowed}")
    if rope_scaling_type is not None and target_length < window:
        raise RopeError(
            f"target_length {target_length} is below the base's window of {window} tokens: set rope_scaling_type to "
            "none, or raise it"
        )

    scaled = copy.deepcopy(config)
    scaled.max_position_embeddings = max(window, target_length)
    if rope_scaling_type is not None and target_length > window:
        far = _scaled_parameters(config, parameters, target_length, rope_scaling_type)
        scaled.rope_parameters = with_far_parameters(scaled, far)
    return scaled


def _scaled_parameters(
    config: PreTrainedConfig, parameters: dict[str, Any], target_length: int, rope_scaling_type: str
) -> dict[str, Any]:
    window, theta = pretrained_window(config), float(parameters["rope_theta"])
    factor, found = target_length / window, parameters.get("rope_type", "default")
    trained = parameters.get("original_max_position_embeddings", window) * parameters.get("factor", 1.0)
    if found == "yarn" and trained != window:
        raise RopeError(
            f"the base's yarn reaches {trained:.0f} tokens but its max_position_embeddings is {window}: set it to "
            "what was trained"
        )
    if ROPE_SCALING_TYPES[rope_scaling_type]:
        return own_parameters(config, parameters, window, target_length, rope_scaling_type)
    if rope_scaling_type == "ntk":
        if family_of(config.model_type).has_one_theta:
            raise RopeError(
                "'ntk' needs a theta for the full-attention layers alone, and transformers 4 and vLLM read one theta "
                f"for all layers of model_type {config.model_type!r}: use 'yarn'"
            )
        return copy.deepcopy(parameters) | {"rope_theta": theta * factor ** (1 / slowest_exponent(config, parameters))}
    if rope_scaling_type == found or (rope_scaling_type, found) == ("linear", "proportional"):
        earlier = parameters.get("factor", 1.0)
        usual = {None, round(0.1 * math.log(earlier) + 1, 6)}
        written = parameters.get("attention_factor")
        if (written and round(written, 6)) not in usual or parameters.get("mscale"):
            raise RopeError(f"the base's yarn has an attention factor of its own ({parameters}): use 'ntk'")
        scaled = {key: value for key, value in parameters.items() if key != "attention_factor"}
        return scaled | {"factor": earlier * factor}
    if found != "default":
        own = {"llama3": "", "longrope": "", "proportional": "'linear' or "}.get(found, f"{found!r} or ")
        raise RopeError(
            f"{rope_scaling_type!r} needs an unscaled base, and this one has rope_type {found!r}: use {own}'ntk'"
        )
    scaled = copy.deepcopy(parameters) | {"rope_type": rope_scaling_type, "rope_theta": theta, "factor": factor}
    if rope_scaling_type == "yarn":
        # Without it transformers takes max_position_embeddings, which is the target length here.
        scaled["original_max_position_embeddings"] = window
    return scaled


def _rotary_modules(model: nn.Module) -> dict[str, Any]:
    modules = {
        name: module
        for name, module in model.named_modules()
        if "RotaryEmbedding" in type(module).__name__ and _frequencies(module)
    }
    if not modules:
        raise RopeError(f"{type(model).__name__} has no rotary embedding module: RoPE scaling needs a model with RoPE")
    return modules


def _frequencies(module: nn.Module) -> dict[str, torch.Tensor]:
    """inv_freq of a rotary embedding; or one of each kind of layer, such as full_attention_inv_freq."""
    buffers = dict(module.named_buffers(recurse=False))
    return {name: one for name, one in buffers.items() if re.fullmatch(r"(\w+_attention_)?inv_freq", name)}


def apply_scaling(model: Any, config: PreTrainedConfig) -> None:
    """Put the RoPE of a scaled `config` on a model already built, PEFT-wrapped or not.

    Changing the config of a built model does nothing, so every rotary embedding is computed again: on the CPU and in
    fp32, as from_pretrained does, then moved to the device it was on. Equal bit for bit to from_pretrained(config=...).
    """
    _far_parameters(config)
    modules = _rotary_modules(model)
    fresh = {name: type(module)(copy.deepcopy(config)) for name, module in modules.items()}
    for name, module in modules.items():
        wanted = _frequencies(fresh[name])
        for kind, frequencies in _frequencies(module).items():
            size, new = 2 * frequencies.numel(), 2 * wanted[kind].numel() if kind in wanted else 0
            if size != new:
                raise RopeError(f"{name} rotates {size} dimensions, the config {new}: it is another model's config")
    # The model's parts and its PEFT wrapper share the config object: change it, do not replace it.
    model.config.rope_parameters = copy.deepcopy(config.rope_parameters)
    model.config.max_position_embeddings = config.max_position_embeddings
    for name, module in modules.items():
        # transformers keeps longrope's frequencies beyond the window there once they were needed.
        vars(module).pop("long_inv_freq", None)
        # In place, not by replacing the module: accelerate's device hooks live on it.
        for attribute, value in vars(fresh[name]).items():
            if attribute in ("rope_type", "max_seq_len_cached", "original_max_seq_len") or _is_factor(attribute):
                setattr(module, attribute, value)
        device = next(iter(_frequencies(module).values())).device
        for buffer_name, buffer in fresh[name].named_buffers():
            setattr(module, buffer_name, buffer.to(device))


def _is_factor(attribute: str) -> bool:
    """attention_scaling; or that of a kind of layer, such as full_attention_attention_scaling."""
    return attribute.endswith("attention_scaling")


def check_scaling(model: nn.Module, config: PreTrainedConfig) -> None:
    """Raise a RopeError unless every rotary embedding of `model` is what `config` computes, in fp32.

    model.to(torch.bfloat16) rounds inv_freq: at position 32,767 the angles are then wrong by many turns.
    """
    _far_parameters(config)
    remedy = "call apply_scaling, or pass the scaled config to from_pretrained"
    for name, module in _rotary_modules(model).items():
        fresh = type(module)(copy.deepcopy(config))
        expected = _frequencies(fresh)
        for kind, found in _frequencies(module).items():
            if found.dtype != torch.float32:
                raise RopeError(
                    f"{name}.{kind} is {found.dtype}, not torch.float32: load the model with "
                    "from_pretrained(dtype=...) instead of model.to(dtype), or call apply_scaling after it"
                )
            wanted = expected.get(kind, found[:0])
            if found.shape != wanted.shape or not torch.allclose(found.cpu(), wanted, rtol=1e-6, atol=0):
                raise RopeError(f"{name}.{kind} is not the one of the config ({config.rope_parameters}): {remedy}")
        for attribute in filter(_is_factor, vars(fresh)):
            found, wanted = getattr(module, attribute), getattr(fresh, attribute)
            if found != wanted:
                raise RopeError(f"{name}.{attribute} is {found}, the config computes {wanted}: {remedy}")


def _published_factor(config: PreTrainedConfig) -> float:
    """Target length over the max_position_embeddings published: for linear vLLM multiplies by the factor itself, but
    not for Gemma 3, whose own configs have max_position_embeddings multiplied already."""
    parameters = _far_parameters(config)
    is_multiplied = parameters["rope_type"] in ("linear", "proportional")
    is_multiplied = is_multiplied and not family_of(config.model_type).has_whole_window
    return parameters.get("factor", 1) if is_multiplied else 1


def published_config(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config.json says of a scaled `config`, for every runtime.

    Readable by transformers 4.57 (rope_theta, rope_scaling), by 5 (rope_parameters) and by vLLM. save_pretrained drops
    the old keys, and transformers 4 then reads the model as unscaled, hence JSON of our own. How and from where the
    base was loaded (quantization_config, _name_or_path) is left out. cream_window, which other readers pass over, is
    the target length, for `whole_window`.
    """
    target_length, factor = config.max_position_embeddings, _published_factor(config)
    published = round(target_length / factor)
    if round(published * factor) != target_length:
        raise RopeError(
            f"target_length {target_length} is not a whole number of tokens times the base's linear factor {factor}, "
            "and could not be read back: choose another"
        )
    content = config.to_dict() | {"max_position_embeddings": published, "cream_window": target_length}
    content |= keys_of_transformers_4(config)
    for key in ("_name_or_path", "quantization_config", UNSCALED):
        content.pop(key, None)
    return content


def save_base_config(config: PreTrainedConfig, folder: str | Path, unscaled: PreTrainedConfig | None = None) -> Path:
    """Write `published_config(config)` to <folder>/base_config/config.json, with what `unscaled_config` needs if the
    base's own config is given; returns that path."""
    path = Path(folder) / "base_config" / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = published_config(config)
    if unscaled is not None:
        content[UNSCALED] = {key: unscaled.to_dict()[key] for key in ("max_position_embeddings", "rope_parameters")}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def unscaled_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a loaded model's config, as the base has it: of one that `save_base_config` wrote, before scaling."""
    config = whole_window(copy.deepcopy(config))
    for name, value in vars(config).pop(UNSCALED, {}).items():
        setattr(config, name, value)
    return config


def whole_window(config: PreTrainedConfig) -> PreTrainedConfig:
    """`config`, as it was read from a file, its max_position_embeddings all that the model reads: where we published
    it, that may be a part, see `_published_factor`."""
    if vars(config).pop("cream_window", None):
        config.max_position_embeddings = round(config.max_position_embeddings * _published_factor(config))
    return config


def load_base_config(folder_or_file: str | Path) -> PreTrainedConfig:
    """The scaled config that `save_base_config` wrote, its max_position_embeddings being the target length again.

    Takes the JSON file, or a folder that holds base_config/config.json or config.json.
    """
    given = Path(folder_or_file)
    candidates = [given / "base_config" / "config.json", given / "config.json"] if given.is_dir() else [given]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise RopeError(
            f"no base config at {given}: expected {candidates[0]}, which training writes beside the adapter"
        )
    content = json.loads(path.read_text(encoding="utf-8"))
    content.pop(UNSCALED, None)
    return whole_window(AutoConfig.for_model(content.pop("model_type"), **content))
