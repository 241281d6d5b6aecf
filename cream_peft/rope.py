"""RoPE scaling: the base's config for a longer window, put on a model, checked, and published.

Every function takes transformers configs. A *scaled* config is what `scaled_config` returns: its rope_parameters are
those the model runs with and its max_position_embeddings is the target length L, whatever the scaling.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

ROPE_SCALING_TYPES = ("linear", "ntk", "yarn")
"""The values of rope_scaling_type; None leaves the base's RoPE as it is."""

DEFAULT_FACTOR = 8
"""Target length over the pretrained window, where none is given."""

BASE_ROPE_TYPES = ("default", "llama3", "linear", "yarn")
"""rope_type of the bases accepted. The others (dynamic, longrope) change with the length of the input."""


class RopeError(ValueError):
    """A base, a length or a model that the RoPE scaling asked for does not fit."""


def pretrained_window(config: PreTrainedConfig) -> int:
    """P, the length in tokens that the base was pretrained for: its max_position_embeddings."""
    window = getattr(config, "max_position_embeddings", None)
    if not isinstance(window, int) or window < 1:
        raise RopeError(f"max_position_embeddings is {window!r}: set it to the base's pretrained window, in tokens")
    return window


def _rope_parameters(config: PreTrainedConfig) -> dict[str, Any]:
    """config.rope_parameters, or a RopeError where the formulas here would not be what the model computes."""
    kind, parameters = config.model_type, getattr(config, "rope_parameters", None)
    remedy = "use a text decoder with one RoPE over whole heads (llama, mistral, qwen2, qwen3)"
    if not parameters:
        raise RopeError(f"model_type {kind!r} has no rope_parameters: {remedy}")
    per_layer = sorted(key for key, value in parameters.items() if isinstance(value, dict))
    if per_layer:
        raise RopeError(f"model_type {kind!r} has rope_parameters per layer type ({', '.join(per_layer)}): {remedy}")
    share = parameters.get("partial_rotary_factor", 1.0)
    if share != 1.0:
        raise RopeError(f"model_type {kind!r} rotates a part of each head (partial_rotary_factor {share}): {remedy}")
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


def _check_sliding_window(config: PreTrainedConfig, target_length: int) -> None:
    """Refuse a window that hides the long context.

    transformers masks by the token's index, not by its position, so training at context_length <= sliding_window
    never meets the mask, and the model still cannot look back further once the input is long. Qwen's configs hold
    None unless use_sliding_window is set, and only the layers called sliding_attention then slide.
    """
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window is not None and "sliding_attention" in layer_types and window < target_length:
        raise RopeError(
            f"sliding_window is {window}, below target_length {target_length}: the model would not look back further; "
            "use a base without it (mistralai/Mistral-7B-v0.3), or a config of sliding_window None"
        )


def scaled_config(config: PreTrainedConfig, target_length: int, rope_scaling_type: str | None) -> PreTrainedConfig:
    """A new config with the RoPE for `target_length` tokens; `config` itself is not touched.

    With P the pretrained window, s = target_length / P, d the head size and inverse frequencies theta^(-2i/d):

    - linear: every frequency divided by s (arXiv 2306.15595).
    - ntk: theta * s^(d/(d-2)) (bloc97, 2023): the fastest pair is kept, the slowest is divided by s. Written as a
      plain larger rope_theta, which every runtime reads.
    - yarn: arXiv 2309.00071, with cosines and sines times 0.1 ln s + 1. That factor is every runtime's default and is
      not written out: llama.cpp takes its own 0.1 ln s + 1, whatever is written.
    - None: rope_parameters untouched.

    A base that is scaled already takes ntk only; it keeps its rope_type. For llama3 (Llama-3.1) that is right because
    its rule maps each frequency to another one by its wavelength, and is applied after theta: the fastest pair is
    still kept and the slowest still divided by exactly s, on top of the base's own scaling; pairs whose longer
    wavelength moves them along llama3's ramp are slowed by more than s, none is sped up.
    target_length equal to P changes nothing.
    """
    if rope_scaling_type not in (None, *ROPE_SCALING_TYPES):
        allowed = ", ".join(ROPE_SCALING_TYPES)
        raise RopeError(f"rope_scaling_type is {rope_scaling_type!r}: choose one of {allowed}, or leave it unset")
    parameters, window = _rope_parameters(config), pretrained_window(config)
    found = parameters.get("rope_type", "default")
    if found not in BASE_ROPE_TYPES:
        allowed = ", ".join(BASE_ROPE_TYPES)
        raise RopeError(f"the base has rope_type {found!r}: use a base whose rope_type is one of {allowed}")
    if rope_scaling_type is not None and target_length < window:
        raise RopeError(
            f"target_length {target_length} is below the base's window of {window} tokens: set rope_scaling_type to "
            "none, or raise it"
        )
    _check_sliding_window(config, target_length)

    scaled = copy.deepcopy(config)
    scaled.max_position_embeddings = max(window, target_length)
    if rope_scaling_type is not None and target_length > window:
        scaled.rope_parameters = _scaled_parameters(config, parameters, target_length, rope_scaling_type)
    if target_length > window:
        # For `unscaled_config`; other readers pass over it.
        scaled.cream_unscaled = {"max_position_embeddings": window, "rope_parameters": copy.deepcopy(parameters)}
    return scaled


def unscaled_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config from which `scaled_config` made this one, or a copy of another."""
    config = copy.deepcopy(config)
    for name, value in (getattr(config, "cream_unscaled", None) or {}).items():
        setattr(config, name, value)
    return config


def _scaled_parameters(
    config: PreTrainedConfig, parameters: dict[str, Any], target_length: int, rope_scaling_type: str
) -> dict[str, Any]:
    window, theta = pretrained_window(config), float(parameters["rope_theta"])
    factor, found = target_length / window, parameters.get("rope_type", "default")
    if rope_scaling_type == "ntk":
        trained = parameters.get("original_max_position_embeddings", window) * parameters.get("factor", 1.0)
        if found == "yarn" and trained != window:
            raise RopeError(
                f"the base's yarn reaches {trained:.0f} tokens but its max_position_embeddings is {window}: set it to "
                "what was trained"
            )
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return copy.deepcopy(parameters) | {"rope_theta": theta * factor ** (head_size / (head_size - 2))}
    if found != "default":
        raise RopeError(
            f"{rope_scaling_type!r} needs an unscaled base, and this one has rope_type {found!r}: use 'ntk'"
        )
    scaled: dict[str, Any] = {"rope_type": rope_scaling_type, "rope_theta": theta, "factor": factor}
    if rope_scaling_type == "yarn":
        # Without it transformers takes max_position_embeddings, which is the target length here.
        scaled["original_max_position_embeddings"] = window
    return scaled


def _rotary_modules(model: nn.Module) -> dict[str, Any]:
    modules = {
        name: module
        for name, module in model.named_modules()
        if "RotaryEmbedding" in type(module).__name__ and "inv_freq" in dict(module.named_buffers())
    }
    if not modules:
        raise RopeError(f"{type(model).__name__} has no rotary embedding module: RoPE scaling needs a model with RoPE")
    return modules


def apply_scaling(model: Any, config: PreTrainedConfig) -> None:
    """Put the RoPE of a scaled `config` on a model already built, PEFT-wrapped or not.

    Changing the config of a built model does nothing, so every rotary embedding is computed again: on the CPU and in
    fp32, as from_pretrained does, then moved to the device it was on. Equal bit for bit to from_pretrained(config=...).
    """
    parameters, modules = _rope_parameters(config), _rotary_modules(model)
    fresh = {name: type(module)(copy.deepcopy(config)) for name, module in modules.items()}
    for name, module in modules.items():
        size, wanted = 2 * module.inv_freq.numel(), 2 * fresh[name].inv_freq.numel()
        if size != wanted:
            raise RopeError(f"{name} rotates {size} dimensions, the config {wanted}: it is another model's config")
    # The model's parts and its PEFT wrapper share the config object: change it, do not replace it.
    model.config.rope_parameters = copy.deepcopy(parameters)
    model.config.max_position_embeddings = config.max_position_embeddings
    for name, module in modules.items():
        # In place, not by replacing the module: accelerate's device hooks live on it.
        for attribute in ("rope_type", "attention_scaling", "max_seq_len_cached", "original_max_seq_len"):
            if hasattr(fresh[name], attribute):
                setattr(module, attribute, getattr(fresh[name], attribute))
        for buffer_name, buffer in fresh[name].named_buffers():
            setattr(module, buffer_name, buffer.to(module.inv_freq.device))


def check_scaling(model: nn.Module, config: PreTrainedConfig) -> None:
    """Raise a RopeError unless every rotary embedding of `model` is what `config` computes, in fp32.

    model.to(torch.bfloat16) rounds inv_freq: at position 32,767 the angles are then wrong by many turns.
    """
    _rope_parameters(config)
    for name, module in _rotary_modules(model).items():
        if module.inv_freq.dtype != torch.float32:
            raise RopeError(
                f"{name}.inv_freq is {module.inv_freq.dtype}, not torch.float32: load the model with "
                "from_pretrained(dtype=...) instead of model.to(dtype), or call apply_scaling after it"
            )
        expected = type(module)(copy.deepcopy(config))
        found, remedy = module.inv_freq.cpu(), "call apply_scaling, or pass the scaled config to from_pretrained"
        if found.shape != expected.inv_freq.shape or not torch.allclose(found, expected.inv_freq, rtol=1e-6, atol=0):
            raise RopeError(f"{name}.inv_freq is not the one of the config ({config.rope_parameters}): {remedy}")
        if module.attention_scaling != expected.attention_scaling:
            raise RopeError(
                f"{name}.attention_scaling is {module.attention_scaling}, the config computes "
                f"{expected.attention_scaling}: {remedy}"
            )


def _published_factor(parameters: dict[str, Any]) -> float:
    """Target length over the max_position_embeddings published: for linear vLLM multiplies by the factor itself."""
    return parameters["factor"] if parameters["rope_type"] == "linear" else 1


def published_config(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config.json says of a scaled `config`, for every runtime.

    Readable by transformers 4.57 (rope_theta, rope_scaling), by 5 (rope_parameters) and by vLLM. save_pretrained drops
    the old keys, and transformers 4 then reads the model as unscaled, hence JSON of our own. How and from where the
    base was loaded (quantization_config, _name_or_path) is left out.
    """
    parameters, target_length = _rope_parameters(config), config.max_position_embeddings
    factor = _published_factor(parameters)
    published = round(target_length / factor)
    if round(published * factor) != target_length:
        raise RopeError(
            f"target_length {target_length} is not a whole number of tokens times the base's linear factor {factor}, "
            "and could not be read back: choose another"
        )
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    content = config.to_dict() | {
        "max_position_embeddings": published,
        "rope_theta": parameters["rope_theta"],
        "rope_scaling": None if parameters["rope_type"] == "default" else scaling,
    }
    for key in ("_name_or_path", "quantization_config"):
        content.pop(key, None)
    return content


def save_base_config(config: PreTrainedConfig, folder: str | Path) -> Path:
    """Write `published_config(config)` to <folder>/base_config/config.json; returns that path."""
    path = Path(folder) / "base_config" / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(published_config(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


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
    config = AutoConfig.for_model(content.pop("model_type"), **content)
    config.max_position_embeddings = round(config.max_position_embeddings * _published_factor(_rope_parameters(config)))
    return config
