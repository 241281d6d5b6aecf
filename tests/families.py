"""Tiny random models of the families that cream_peft/families.py knows, with layers of every kind that they have."""

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Glm4Config,
    GptOssConfig,
    MixtralConfig,
    Olmo3Config,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

WINDOW, SLIDING_WINDOW = 64, 8
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": WINDOW // 4, "rope_theta": 150_000.0}
SHARED = {
    "vocab_size": 385,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": WINDOW,
    # Large, so that attention depends on the positions.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"sliding_window": SLIDING_WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA4 = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 385, "global_head_dim": 128}
PER_LAYER_TYPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 500_000.0},
    "full_attention": YARN | {"rope_theta": 500_000.0},
}
CONFIGS = {
    "gemma3": (Gemma3TextConfig, SLIDING),
    "gemma4": (Gemma4TextConfig, SLIDING | GEMMA4),
    "qwen3.5": (Qwen3_5TextConfig, LINEAR),
    "gpt-oss": (GptOssConfig, SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": YARN}),
    "olmo3": (Olmo3Config, SLIDING | {"rope_parameters": PER_LAYER_TYPE}),
    "glm4": (Glm4Config, {}),
    "qwen3-moe": (Qwen3MoeConfig, EXPERTS),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3.5-moe": (Qwen3_5MoeTextConfig, LINEAR | EXPERTS | {"shared_expert_intermediate_size": 32}),
    "qwen3-next": (Qwen3NextConfig, LINEAR | EXPERTS | {"shared_expert_intermediate_size": 32}),
}
VISION = {"hidden_size": 16, "intermediate_size": 16}
WHOLE = {
    "gemma3": (Gemma3Config, Gemma3ForConditionalGeneration, {"num_hidden_layers": 1, "num_attention_heads": 2}),
    "gemma4": (Gemma4Config, Gemma4ForConditionalGeneration, {"num_hidden_layers": 1, "num_attention_heads": 2}),
    "qwen3.5": (Qwen3_5Config, Qwen3_5ForConditionalGeneration, {"depth": 1, "num_heads": 2, "out_hidden_size": 64}),
}
"""Those that nest the decoder in text_config: the config, the model, its image part."""


def tiny(family, **changes):
    """The decoder's config of a family."""
    config_class, fields = CONFIGS[family]
    fields = SHARED | fields | changes
    if family == "olmo3":
        fields = {key: value for key, value in fields.items() if key != "head_dim"} | {"hidden_size": 128}
    return config_class(**{key: dict(value) if isinstance(value, dict) else value for key, value in fields.items()})


def whole(family):
    """An image and text model around the decoder."""
    config_class, model_class, vision = WHOLE[family]
    torch.manual_seed(0)
    return model_class(config_class(text_config=tiny(family).to_dict(), vision_config=VISION | vision)).eval()


def built(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()


def logits(model, positions):
    """Of as many tokens as positions, the same in every call; a 2-D mask keeps them one document."""
    tokens = torch.randint(3, 385, (1, len(positions)), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mask = torch.ones_like(tokens)
        return model(tokens, position_ids=torch.as_tensor(positions)[None], attention_mask=mask, use_cache=False).logits
