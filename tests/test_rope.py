"""RoPE scaling against formulas written by hand, and the traps that fail silently, each beside the case it breaks."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    Qwen2Config,
    Qwen3Config,
)

from cream_peft.rope import (
    ROPE_SCALING_TYPES,
    RopeError,
    apply_scaling,
    check_scaling,
    load_base_config,
    pretrained_window,
    save_base_config,
    scaled_config,
)

WINDOW, THETA = 4096, 10_000.0
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def small(config_class=LlamaConfig, head_size=64, **changes):
    fields = {
        "vocab_size": 64,
        "hidden_size": 2 * head_size,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": head_size,
        "max_position_embeddings": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
    }
    if config_class is Qwen2Config:
        del fields["head_dim"]
    if config_class is MistralConfig:
        fields["sliding_window"] = None
    return config_class(**(fields | changes))


def built(config, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def rotary(model):
    return next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))


def far_logits(model, distance=32_000, seed=0):
    """Logits of 16 tokens whose second half stands `distance` positions further; a 2-D mask keeps them one document."""
    tokens = torch.randint(0, 64, (1, 16), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(8), distance + torch.arange(8)])[None]
    with torch.no_grad():
        mask = torch.ones_like(tokens)
        return model(tokens, position_ids=positions, attention_mask=mask, use_cache=False).logits


def plain_frequencies(head_size, theta=THETA):
    return theta ** (-np.arange(0, head_size, 2, dtype=np.float64) / head_size)


def yarn_frequencies(head_size, factor, window=WINDOW, theta=THETA, alpha=1, beta=32):
    """The authors' released YaRN: a ramp over the pair's index, between whole pairs, from beta to alpha rotations."""

    def pair_of(rotations):
        return head_size * math.log(window / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(pair_of(beta)), 0), min(math.ceil(pair_of(alpha)), head_size - 1)
    kept = 1 - np.clip((np.arange(head_size // 2, dtype=np.float64) - low) / (high - low), 0, 1)
    frequencies = plain_frequencies(head_size, theta)
    return frequencies / factor * (1 - kept) + frequencies * kept


def by_hand(scaling, head_size, factor):
    if scaling == "linear":
        return plain_frequencies(head_size) / factor, 1.0
    if scaling == "ntk":
        return plain_frequencies(head_size, THETA * factor ** (head_size / (head_size - 2))), 1.0
    return yarn_frequencies(head_size, factor), 0.1 * math.log(factor) + 1


# The formulas


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("factor", [8, 64])
@pytest.mark.parametrize("scaling", ROPE_SCALING_TYPES)
def test_inverse_frequencies_are_those_of_the_formula_written_by_hand(scaling, factor, head_size):
    module = rotary(built(scaled_config(small(head_size=head_size), factor * WINDOW, scaling)))
    frequencies, attention_factor = by_hand(scaling, head_size, factor)
    np.testing.assert_allclose(module.inv_freq.double().numpy(), frequencies, rtol=2e-6)
    assert module.attention_scaling == pytest.approx(attention_factor, rel=1e-12)
    others = [by_hand(other, head_size, factor)[0] for other in ROPE_SCALING_TYPES if other != scaling]
    for other in [*others, plain_frequencies(head_size), by_hand(scaling, head_size, factor * 1.01)[0]]:
        assert not np.allclose(module.inv_freq.double().numpy(), other, rtol=2e-6)


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("factor", [8, 64])
def test_yarn_keeps_and_interpolates_the_pairs_that_the_paper_says(factor, head_size):
    # arXiv 2309.00071 prints the ramp over rotations r = P / wavelength: gamma = (r - 1) / (32 - 1). Its released code
    # and transformers ramp over the pair's index instead: both agree outside the ramp, and inside on the two bounds.
    ours = rotary(built(scaled_config(small(head_size=head_size), factor * WINDOW, "yarn"))).inv_freq.double().numpy()
    plain = plain_frequencies(head_size)
    rotations = WINDOW * plain / (2 * math.pi)
    gamma = np.clip((rotations - 1) / (32 - 1), 0, 1)
    paper = (1 - gamma) * plain / factor + gamma * plain
    outside = (gamma == 0) | (gamma == 1)
    outside[1:-1] &= (gamma[:-2] == gamma[1:-1]) & (gamma[1:-1] == gamma[2:])  # the code rounds the ramp to whole pairs
    assert outside.sum() > head_size // 8
    np.testing.assert_allclose(ours[outside], paper[outside], rtol=2e-6)
    assert np.all(ours <= plain * (1 + 1e-6)) and np.all(ours >= plain / factor * (1 - 1e-6))


def test_ntk_keeps_the_fastest_pair_and_divides_the_slowest_by_the_factor():
    frequencies = rotary(built(scaled_config(small(), 8 * WINDOW, "ntk"))).inv_freq.double().numpy()
    ratio = plain_frequencies(64) / frequencies
    assert ratio[0] == pytest.approx(1) and ratio[-1] == pytest.approx(8, rel=1e-5)


def test_ntk_takes_the_head_size_from_head_dim_where_the_config_has_one():
    wide_heads = small(Qwen3Config, head_size=64, head_dim=128)  # hidden_size / heads is 64, as in Qwen3-0.6B
    scaled = scaled_config(wide_heads, 8 * WINDOW, "ntk")
    assert scaled.rope_parameters["rope_theta"] == pytest.approx(THETA * 8 ** (128 / 126))
    assert "head_dim" not in small(Qwen2Config).to_dict()


def test_ntk_on_a_llama3_base_keeps_its_rope_type_and_never_speeds_a_pair_up():
    base = small(head_size=128, max_position_embeddings=131_072, rope_parameters=dict(LLAMA3))
    scaled = scaled_config(base, 2 * 131_072, "ntk")
    assert scaled.rope_parameters == LLAMA3 | {"rope_theta": pytest.approx(500_000.0 * 2 ** (128 / 126))}
    ratio = (rotary(built(base)).inv_freq / rotary(built(scaled)).inv_freq).numpy()
    assert ratio[0] == pytest.approx(1) and ratio[-1] == pytest.approx(2, rel=1e-5)
    assert ratio.min() > 1 - 1e-5
    assert ratio.max() < 3  # pairs moved along llama3's ramp are slowed by more than the factor


@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("scaling", [None, *ROPE_SCALING_TYPES])
def test_every_family_is_scaled_without_touching_the_config_given(config_class, scaling):
    base = small(config_class)
    before = base.to_dict()
    scaled = scaled_config(base, 8 * WINDOW, scaling)
    scaled.id2label[0] = "changed"
    assert base.to_dict() == before and scaled is not base
    scaled.id2label[0] = base.id2label[0]
    assert scaled.max_position_embeddings == 8 * WINDOW and pretrained_window(base) == WINDOW
    changed = {key for key, value in scaled.to_dict().items() if value != before.get(key)}
    assert changed == {"max_position_embeddings"} | ({"rope_parameters"} if scaling else set())
    frequencies = by_hand(scaling, 64, 8)[0] if scaling else plain_frequencies(64)
    np.testing.assert_allclose(rotary(built(scaled)).inv_freq.double().numpy(), frequencies, rtol=2e-6)


def test_a_target_equal_to_the_window_leaves_the_rope_unscaled():
    base = small()
    for scaling in ROPE_SCALING_TYPES:
        assert scaled_config(base, WINDOW, scaling).to_dict() == base.to_dict()


def test_no_scaling_never_lowers_the_window():
    assert scaled_config(small(), WINDOW // 2, None).max_position_embeddings == WINDOW


# A model already built


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", ROPE_SCALING_TYPES)
def test_apply_scaling_equals_loading_with_the_scaled_config_bit_for_bit(tmp_path, scaling, dtype):
    base = small(config_class=Qwen3Config)
    built(base).save_pretrained(tmp_path)
    scaled = scaled_config(base, 8 * WINDOW, scaling)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, config=scaled, dtype=dtype).eval()
    applied = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    unscaled = far_logits(applied)
    apply_scaling(applied, scaled)
    assert torch.equal(far_logits(applied), far_logits(loaded))
    assert not torch.equal(far_logits(applied), unscaled)
    assert torch.equal(rotary(applied).original_inv_freq, rotary(loaded).original_inv_freq)
    for attribute in ("rope_type", "attention_scaling", "max_seq_len_cached", "original_max_seq_len"):
        assert getattr(rotary(applied), attribute) == getattr(rotary(loaded), attribute)
    assert applied.config.rope_parameters == scaled.rope_parameters
    assert applied.config.max_position_embeddings == 8 * WINDOW
    check_scaling(applied, scaled)
    check_scaling(loaded, scaled)


def test_apply_scaling_reaches_through_a_peft_wrapper_and_every_part_sees_the_config():
    scaled = scaled_config(small(), 8 * WINDOW, "yarn")
    wrapped = get_peft_model(built(small()), LoraConfig(r=2, target_modules=["q_proj"]))
    apply_scaling(wrapped, scaled)
    assert torch.equal(far_logits(wrapped), far_logits(built(scaled)))
    model = wrapped.get_base_model()
    assert wrapped.config is model.config is model.model.config is rotary(model).config
    assert model.config.rope_parameters == scaled.rope_parameters
    assert not any(name.endswith("inv_freq") for name in wrapped.state_dict())


def test_changing_the_config_of_a_built_model_does_nothing_and_check_scaling_says_so():
    model, scaled = built(small()), scaled_config(small(), 8 * WINDOW, "linear")
    before = far_logits(model)
    model.config.rope_parameters = dict(scaled.rope_parameters)
    assert torch.equal(far_logits(model), before)  # the trap
    with pytest.raises(RopeError, match="not the one of the config"):
        check_scaling(model, scaled)
    apply_scaling(model, scaled)
    assert not torch.equal(far_logits(model), before)


def test_casting_a_model_rounds_the_frequencies_and_check_scaling_catches_it(tmp_path):
    scaled = scaled_config(small(), 8 * WINDOW, "ntk")
    model = built(scaled)
    model.save_pretrained(tmp_path)
    check_scaling(model, scaled)
    exact = rotary(model).inv_freq.clone()
    model.to(torch.bfloat16)
    assert rotary(model).inv_freq.dtype == torch.bfloat16  # the trap
    assert (torch.cos(32_767 * rotary(model).inv_freq.float()) - torch.cos(32_767 * exact)).abs().max() > 1
    with pytest.raises(RopeError, match=r"inv_freq is torch.bfloat16, not torch.float32"):
        check_scaling(model, scaled)
    apply_scaling(model, scaled)
    check_scaling(model, scaled)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and torch.equal(rotary(loaded).inv_freq, exact)
    assert torch.equal(far_logits(model), far_logits(loaded))


def test_frequencies_rounded_and_cast_back_to_fp32_are_still_caught():
    scaled = scaled_config(small(), 8 * WINDOW, "ntk")
    model = built(scaled).to(torch.bfloat16).float()
    assert rotary(model).inv_freq.dtype == torch.float32
    with pytest.raises(RopeError, match="not the one of the config"):
        check_scaling(model, scaled)


def test_a_lost_attention_factor_is_caught():
    scaled = scaled_config(small(), 8 * WINDOW, "yarn")
    model = built(scaled)
    rotary(model).attention_scaling = 1.0
    with pytest.raises(RopeError, match=r"attention_scaling is 1.0, the config computes 1.2"):
        check_scaling(model, scaled)


def test_short_distances_cannot_see_a_missing_scaling_and_long_ones_can():
    plain, scaled = built(small()), built(scaled_config(small(), 8 * WINDOW, "ntk"))

    def gap(distance):
        return (far_logits(plain, distance) - far_logits(scaled, distance)).abs().max().item()

    assert gap(8) < gap(32_000) / 4  # ntk keeps the fast pairs: contiguous tokens look the same
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        near = plain(tokens, position_ids=torch.arange(16)[None]).logits
        shifted = plain(tokens, position_ids=30_000 + torch.arange(16)[None]).logits
    torch.testing.assert_close(near, shifted, atol=1e-3, rtol=0)  # far but contiguous says nothing at all


# Traps of the config


def test_a_rope_theta_attribute_has_no_effect_and_is_refused():
    config = small()
    config.rope_theta = 8 * THETA
    np.testing.assert_allclose(rotary(built(config)).inv_freq.double().numpy(), plain_frequencies(64), rtol=2e-6)
    with pytest.raises(RopeError, match="only the second has an effect"):
        scaled_config(config, 8 * WINDOW, "ntk")


@pytest.mark.parametrize("attribute", ["rope_parameters", "rope_scaling"])
def test_assigning_the_rope_parameters_loses_rope_theta_and_is_refused(attribute):
    config = small()
    setattr(config, attribute, {"rope_type": "linear", "factor": 8.0})
    with pytest.raises((TypeError, KeyError)):
        built(config)
    with pytest.raises(RopeError, match=r"rope_theta is missing .* model_type 'llama'"):
        scaled_config(config, 8 * WINDOW, "ntk")


def test_yarn_without_the_original_window_is_another_yarn():
    ours = scaled_config(small(), 8 * WINDOW, "yarn")
    assert ours.rope_parameters["original_max_position_embeddings"] == WINDOW
    parameters = {key: value for key, value in ours.rope_parameters.items() if not key.startswith("original")}
    without = small(max_position_embeddings=8 * WINDOW, rope_parameters=parameters)
    frequencies = rotary(built(without)).inv_freq.double().numpy()
    np.testing.assert_allclose(frequencies, yarn_frequencies(64, 8, window=8 * WINDOW), rtol=2e-6)
    assert not np.allclose(frequencies, yarn_frequencies(64, 8), rtol=1e-2)
    np.testing.assert_allclose(rotary(built(ours)).inv_freq.double().numpy(), yarn_frequencies(64, 8), rtol=2e-6)


def test_yarn_leaves_the_attention_factor_to_the_runtime():
    # llama.cpp multiplies a written attention_factor by its own 0.1 ln s + 1: it would count twice.
    assert set(scaled_config(small(), 8 * WINDOW, "yarn").rope_parameters) == {
        "rope_type", "rope_theta", "factor", "original_max_position_embeddings",
    }  # fmt: skip


# Refusals


def test_an_unknown_scaling_type_is_refused_with_the_ones_allowed():
    for name in ("dynamic", "NTK", ""):
        with pytest.raises(RopeError, match=f"{name!r}: choose one of linear, ntk, yarn"):
            scaled_config(small(), 8 * WINDOW, name)


@pytest.mark.parametrize("scaling", ["linear", "yarn"])
def test_a_base_already_scaled_takes_ntk_or_its_own_type_again(scaling):
    llama3 = small(max_position_embeddings=131_072, rope_parameters=dict(LLAMA3))
    with pytest.raises(RopeError, match=f"{scaling!r} needs an unscaled base.* 'llama3': use 'ntk'"):
        scaled_config(llama3, 262_144, scaling)
    once = scaled_config(small(), 8 * WINDOW, scaling)
    other = "yarn" if scaling == "linear" else "linear"
    with pytest.raises(RopeError, match=f"has rope_type {scaling!r}: use {scaling!r} or 'ntk'"):
        scaled_config(once, 16 * WINDOW, other)
    twice = scaled_config(once, 16 * WINDOW, "ntk")
    assert twice.rope_parameters == once.rope_parameters | {"rope_theta": pytest.approx(THETA * 2 ** (64 / 62))}
    again = scaled_config(once, 16 * WINDOW, scaling)
    assert again.rope_parameters == scaled_config(small(), 16 * WINDOW, scaling).rope_parameters


def test_an_attention_factor_follows_the_factor_unless_it_is_a_choice_of_the_base():
    base = scaled_config(small(), 8 * WINDOW, "yarn")
    base.rope_parameters["attention_factor"] = 0.1 * math.log(8) + 1  # as OLMo 3 writes it
    scaled = scaled_config(base, 16 * WINDOW, "yarn")
    assert rotary(built(scaled)).attention_scaling == pytest.approx(0.1 * math.log(16) + 1)
    base.rope_parameters["attention_factor"] = 1.5
    with pytest.raises(RopeError, match="an attention factor of its own"):
        scaled_config(base, 16 * WINDOW, "yarn")


def test_a_yarn_base_whose_window_is_left_at_the_original_is_refused():
    # Qwen2.5's documented way: factor 4 added, max_position_embeddings left at 32,768.
    half_said = scaled_config(small(), 4 * WINDOW, "yarn")
    half_said.max_position_embeddings = WINDOW
    with pytest.raises(RopeError, match="reaches 16384 tokens but its max_position_embeddings is 4096"):
        scaled_config(half_said, 8 * WINDOW, "ntk")


def test_a_rope_that_changes_with_the_input_is_refused():
    parameters = {"rope_type": "dynamic", "rope_theta": THETA, "factor": 4.0}
    for scaling in (None, *ROPE_SCALING_TYPES):
        with pytest.raises(RopeError, match="rope_type 'dynamic': use a base whose rope_type is one of"):
            scaled_config(small(rope_parameters=parameters), 8 * WINDOW, scaling)


def test_a_model_without_rope_is_refused_by_its_model_type():
    with pytest.raises(RopeError, match="model_type 'gpt2' has no rope_parameters"):
        scaled_config(GPT2Config(), 8192, "linear")
    with pytest.raises(RopeError, match="GPT2LMHeadModel has no rotary embedding"):
        apply_scaling(built(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16)), small())


def test_a_family_whose_special_rope_is_not_known_here_is_refused():
    with pytest.raises(RopeError, match=r"'modernbert' .* per layer type \(full_attention, sliding_attention\)"):
        scaled_config(ModernBertConfig(), 262_144, "linear")
    with pytest.raises(RopeError, match=r"'gpt_neox' rotates a part of each head \(partial_rotary_factor 0.25\)"):
        scaled_config(GPTNeoXConfig(), 8192, "linear")


def test_a_target_below_the_window_is_refused_where_a_scaling_is_asked_for():
    with pytest.raises(RopeError, match="target_length 2048 is below the base's window of 4096 tokens"):
        scaled_config(small(), 2048, "yarn")


def test_a_config_without_a_window_is_refused():
    config = small()
    config.max_position_embeddings = 0
    with pytest.raises(RopeError, match="max_position_embeddings is 0"):
        pretrained_window(config)


def test_a_sliding_window_below_the_target_hides_the_far_tokens_and_is_refused():
    sliding = small(MistralConfig, sliding_window=8, num_hidden_layers=1)

    def last_logits(config, first_token):
        tokens = torch.arange(32)[None].clone()
        tokens[0, 0] = first_token
        with torch.no_grad():
            return built(config)(tokens).logits[0, -1]

    assert torch.equal(last_logits(sliding, 1), last_logits(sliding, 2))  # the trap: the far token is out of sight
    assert not torch.equal(last_logits(small(MistralConfig), 1), last_logits(small(MistralConfig), 2))
    for scaling in (None, "linear"):
        with pytest.raises(RopeError, match="sliding_window is 8, below target_length 32768"):
            scaled_config(sliding, 8 * WINDOW, scaling)
    assert scaled_config(small(MistralConfig, sliding_window=8 * WINDOW), 8 * WINDOW, "linear")


def test_qwen_is_refused_only_where_a_layer_really_slides():
    layers = {"sliding_window": WINDOW, "num_hidden_layers": 2}
    assert scaled_config(small(Qwen3Config, use_sliding_window=False, **layers), 8 * WINDOW, "ntk")
    assert scaled_config(small(Qwen3Config, use_sliding_window=True, max_window_layers=2, **layers), 8 * WINDOW, "ntk")
    with pytest.raises(RopeError, match="sliding_window is 4096"):
        scaled_config(small(Qwen3Config, use_sliding_window=True, max_window_layers=1, **layers), 8 * WINDOW, "ntk")


def test_the_config_of_another_model_is_refused_before_anything_changes():
    model = built(small())
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(RopeError, match="rotates 64 dimensions, the config 128"):
        apply_scaling(model, scaled_config(small(head_size=128), 8 * WINDOW, "linear"))
    assert model.config.to_dict() == before


# The published config


def as_transformers_4_reads(content):
    """Inverse frequencies from the keys that 4.57 reads: rope_theta and rope_scaling, never rope_parameters."""
    scaling, theta = content.get("rope_scaling") or {}, content.get("rope_theta", 10_000.0)
    if scaling.get("rope_type") == "linear":
        return plain_frequencies(64, theta) / scaling["factor"]
    if scaling.get("rope_type") == "yarn":
        original = scaling["original_max_position_embeddings"]
        return yarn_frequencies(64, content["max_position_embeddings"] / original, window=original, theta=theta)
    return plain_frequencies(64, theta)


def as_vllm_reads(content):
    """The maximum length: [read] vLLM 0.12 multiplies by the factor, from the original window where one is given; 0.33
    leaves yarn's alone."""
    scaling = content.get("rope_scaling") or {}
    length, factor = content["max_position_embeddings"], scaling.get("factor", 1)
    earlier = scaling.get("original_max_position_embeddings", length) * factor
    assert earlier == (length if scaling.get("rope_type") == "yarn" else length * factor)
    return earlier


@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("scaling", [None, *ROPE_SCALING_TYPES])
def test_the_published_config_gives_the_same_rope_to_every_reader(tmp_path, scaling, config_class):
    scaled = scaled_config(small(config_class), 8 * WINDOW, scaling)
    path = save_base_config(scaled, tmp_path)
    assert path == tmp_path / "base_config" / "config.json"
    content = json.loads(path.read_text())
    assert content["rope_theta"] == content["rope_parameters"]["rope_theta"]
    assert (content["rope_scaling"] or {}).get("rope_type", "default") == content["rope_parameters"]["rope_type"]
    frequencies = rotary(built(scaled)).inv_freq
    np.testing.assert_allclose(as_transformers_4_reads(content), frequencies.double().numpy(), rtol=2e-6)
    assert as_vllm_reads(content) == 8 * WINDOW
    plainly_read = built(AutoConfig.from_pretrained(tmp_path, subfolder="base_config"))
    assert torch.equal(rotary(plainly_read).inv_freq, frequencies)
    assert rotary(plainly_read).attention_scaling == rotary(built(scaled)).attention_scaling


def test_save_pretrained_alone_is_read_as_unscaled_by_transformers_4(tmp_path):
    scaled = scaled_config(small(), 8 * WINDOW, "linear")
    scaled.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert "rope_theta" not in content and "rope_scaling" not in content
    np.testing.assert_allclose(as_transformers_4_reads(content), plain_frequencies(64))


def test_linear_publishes_the_pretrained_window_and_the_others_the_target(tmp_path):
    for scaling, published in [("linear", WINDOW), ("ntk", 8 * WINDOW), ("yarn", 8 * WINDOW), (None, 8 * WINDOW)]:
        scaled = scaled_config(small(), 8 * WINDOW, scaling)
        content = json.loads(save_base_config(scaled, tmp_path).read_text())
        assert content["max_position_embeddings"] == published
    linear = scaled_config(small(), 8 * WINDOW, "linear").to_dict() | {"max_position_embeddings": 8 * WINDOW}
    assert as_vllm_reads(linear | {"rope_scaling": linear["rope_parameters"]}) == 64 * WINDOW  # unguarded


@pytest.mark.parametrize("target", [8 * WINDOW, 10_000, 33_333])
@pytest.mark.parametrize("scaling", [None, *ROPE_SCALING_TYPES])
def test_what_was_published_reads_back_as_the_scaled_config(tmp_path, scaling, target):
    scaled = scaled_config(small(Qwen3Config, tie_word_embeddings=True), target, scaling)
    path = save_base_config(scaled, tmp_path)
    for given in (tmp_path, tmp_path / "base_config", path, str(path)):
        read = load_base_config(given)
        assert read.max_position_embeddings == target
        assert read.to_dict() == scaled.to_dict()


def test_the_published_config_says_nothing_of_how_the_base_was_loaded(tmp_path):
    built(small()).save_pretrained(tmp_path / "my base")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "my base").config
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert str(tmp_path) in json.dumps(config.to_dict())  # the trap
    text = save_base_config(scaled_config(config, 8 * WINDOW, "yarn"), tmp_path).read_text()
    assert str(tmp_path) not in text and "load_in_4bit" not in text
    assert json.loads(text)["architectures"] == ["LlamaForCausalLM"]
    assert str(tmp_path) not in json.dumps(load_base_config(tmp_path).to_dict())


def test_a_window_that_could_not_be_read_back_is_refused(tmp_path):
    scaled = scaled_config(small(), 8 * WINDOW, "linear")
    scaled.max_position_embeddings += 3
    with pytest.raises(RopeError, match=r"not a whole number of tokens times the base.s linear factor 8"):
        save_base_config(scaled, tmp_path)


def test_a_folder_without_a_base_config_is_named(tmp_path):
    with pytest.raises(RopeError, match=r"no base config at .*: expected .*base_config"):
        load_base_config(tmp_path)
