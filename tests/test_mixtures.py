"""Plans of mixture-of-experts bases: published sizes, and the bytes of tiny ones with layers of every kind."""

import pytest
import torch
from conftest import ROOT, estimate
from peft import PeftModel
from test_memory import LiveBytes, bytes_of, trainable
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from cream_peft.plan import layers
from cream_peft.plan.advice import plan_gpus
from cream_peft.plan.layers import ATTENTION, active_parameters, expert_parameters, linear_parameters, parameter_count
from cream_peft.plan.memory import Training

QWEN3_30B_A3B = {
    "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8,
}  # fmt: skip
PUBLISHED = {
    "Qwen3-30B-A3B": (Qwen3MoeConfig(**QWEN3_30B_A3B), 30_532_122_624, 3.3),
    "Mixtral-8x7B-v0.1": (MixtralConfig(), 46_702_792_704, 12.9),
    # OpenAI counts 3.6 billion active ones, without the embeddings.
    "gpt-oss-20b": (GptOssConfig(num_hidden_layers=24, num_local_experts=32), 20_914_757_184, 3.6 + 0.58),
    "Qwen3.5-35B-A3B": (Qwen3_5MoeTextConfig(), 34_660_610_688, 3.5),
}
SHARED = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
SHARED |= {"vocab_size": 2048, "head_dim": 64, "num_experts_per_tok": 3, "intermediate_size": 96}
QWEN = {"num_experts": 8, "moe_intermediate_size": 96}
LINEAR = {f"linear_num_{kind}_heads": 2 for kind in ("key", "value")}
LINEAR |= {f"linear_{kind}_head_dim": 32 for kind in ("key", "value")}
TINY = {
    "qwen3_moe": (Qwen3MoeConfig, QWEN),
    "mixtral": (MixtralConfig, {"num_local_experts": 8}),
    "gpt_oss": (GptOssConfig, {"num_local_experts": 8}),
    "qwen3_next": (Qwen3NextConfig, QWEN | LINEAR | {"shared_expert_intermediate_size": 64}),
    "qwen3_5_moe_text": (Qwen3_5MoeTextConfig, QWEN | LINEAR | {"shared_expert_intermediate_size": 64}),
}
EVERY = pytest.mark.parametrize("kind", list(TINY))


def tiny(kind, **changes):
    config_class, fields = TINY[kind]
    return config_class(**(SHARED | fields | changes))


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_a_mixture_has_the_published_number_of_parameters_and_of_active_ones(name):
    config, parameters, active = PUBLISHED[name]
    assert parameter_count(config) == parameters
    assert active_parameters(config) / 1e9 == pytest.approx(active, abs=0.06)


def test_the_page_says_how_much_of_a_mixture_is_in_4_bits():
    page = " ".join((ROOT / "recipes/families.md").read_text(encoding="utf-8").split())
    for name, said in (
        ("gpt-oss-20b", "{} of {} billion"),
        ("Qwen3-30B-A3B", "{} of {}"),
        ("Mixtral-8x7B", "{} of {}"),
    ):
        config = next(config for known, (config, *_) in PUBLISHED.items() if known.startswith(name))
        sizes = (f"{count(config) / 1e9:.2f}" for count in (linear_parameters, parameter_count))
        assert f"of {name} {said.format(*sizes)}" in page


@EVERY
def test_the_experts_of_a_mixture_are_counted_as_the_real_model_has_them(kind):
    config = tiny(kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    assert expert_parameters(config) == experts > 0
    assert active_parameters(config) == sum(one.numel() for one in model.parameters()) - experts * 5 // 8


@EVERY
@pytest.mark.parametrize("four_bit", [True, False])
def test_only_the_linears_of_a_mixture_are_in_4_bits_and_the_plan_has_its_bytes(tmp_path, kind, four_bit):
    config = tiny(kind)
    model = trainable(tmp_path, config, four_bit=four_bit)
    assert isinstance(model, PeftModel)
    embeddings = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    weights = adapter = in_4bit = 0
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        assert state is None or ".experts." not in name
        if parameter.requires_grad:
            adapter += parameter.nbytes
        elif parameter not in embeddings:
            weights += parameter.nbytes
        if state is not None:
            in_4bit += state.shape.numel()
            tensors = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            weights += sum(tensor.nbytes for tensor in tensors)
    terms = estimate(config, context_length=64, load_in_4bit=four_bit, target_modules=ATTENTION)
    assert bytes_of(terms, "weights") == pytest.approx(weights, rel=1e-4)
    assert bytes_of(terms, "adapter") == pytest.approx(adapter)
    planned = plan_gpus(config, Training(context_length=64, load_in_4bit=four_bit)).base
    assert planned.in_4bit == in_4bit and 4 * planned.trained == adapter
    linear = [kind for kind in getattr(config, "layer_types", None) or [] if kind == "linear_attention"]
    assert planned.adapted_layers == 4 - len(linear)
    assert planned.line().endswith(f"on q_proj, k_proj, v_proj, o_proj of {planned.adapted_layers} layers")


def feed_forward_features(config, tokens=512):
    """Features of a token that transformers' feed-forward keeps for the backward pass, that are there at a time in the
    backward pass beside them, and that are there at a time without gradients; bf16, frozen weights."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    assert model.config._experts_implementation == "grouped_mm"
    own = {parameter.untyped_storage().data_ptr() for parameter in model.requires_grad_(False).parameters()}
    feed_forward, kept = model.model.layers[0].mlp, {}
    inputs = torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    own.add(inputs.untyped_storage().data_ptr())

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            output = feed_forward(inputs)
        return output[0] if isinstance(output, tuple) else output

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    with LiveBytes() as backward:
        output.backward(torch.ones_like(output))
    with LiveBytes() as forward, torch.no_grad():
        run()
    return [size / (2 * tokens) for size in (sum(kept.values()), backward.peak, forward.peak)]


@EVERY
@pytest.mark.parametrize(("hidden", "width"), [(256, 96), (256, 192), (384, 512)])
def test_what_the_experts_of_a_mixture_keep_and_take_is_planned(kind, hidden, width):
    changes = {"hidden_size": hidden, "num_experts_per_tok": 4}
    changes["moe_intermediate_size" if "qwen" in kind else "intermediate_size"] = width
    config = tiny(kind, **changes)
    kept, backward, forward = feed_forward_features(config)
    assert layers.kept_width(config) == pytest.approx(kept, rel=0.1)
    # Beside it the plan has the residual's.
    assert hidden + layers.passing_width(config, 3) == pytest.approx(backward, rel=0.2)
    assert hidden + layers.running_width(config) == pytest.approx(forward, rel=0.2)
