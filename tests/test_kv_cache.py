"""The 4-bit cache: every token rounded once, as if all were quantized together, and cut back to any length."""

from dataclasses import replace

import pytest
import torch
from families import CONFIGS, tiny
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, QuantizedCache

from cream_peft.model import kv_cache
from cream_peft.model.kv_cache import KV_CACHES, AppendingHQQLayer, kv_caches, new_cache
from cream_peft.plan import fit
from cream_peft.plan.advice import advise, as_flags, plan_gpus
from cream_peft.plan.memory import Reading, Training

CONFIG = LlamaConfig(
    vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=4096,
)  # fmt: skip


def states(tokens, seed=0):
    """Keys and values [2, 1, 2, tokens, 64] that differ in size from one token to the next."""
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(2, 1, 2, tokens, 64, generator=noise) * (1 + torch.arange(tokens) % 7)[:, None]


def error(found, given):
    return ((found - given).norm() / given.norm()).item()


@pytest.fixture(autouse=True)
def hqq():
    return pytest.importorskip("hqq")


@pytest.mark.parametrize("chunks", [(1024,), (256, 768), (100, 300, 1, 1, 622), (7,) * 146 + (2,)])
def test_in_whatever_chunks_tokens_come_they_are_rounded_as_all_at_once(chunks):
    keys, values = states(1024)
    whole, layer, begin = AppendingHQQLayer(), AppendingHQQLayer(), 0
    whole.update(keys, values)
    for count in chunks:
        part = slice(begin, begin + count)
        begin += count
        found = layer.update(keys[..., part, :], values[..., part, :])
        assert layer.get_seq_length() == found[0].shape[-2] == found[1].shape[-2] == begin
        assert torch.equal(found[0][..., part, :], keys[..., part, :])  # what is new is exact
    one = torch.zeros(1, 2, 1, 64)
    for ours, all_at_once, given in zip(layer.update(one, one), whole.update(one, one), (keys, values), strict=True):
        # HQQ's solver stops by the mean error of what it is given, so that pieces may stop a step apart.
        ours, expected = error(ours[..., :-1, :], given), error(all_at_once[..., :-1, :], given)
        assert ours < 0.1 and ours == pytest.approx(expected, rel=0.1)


def test_rounding_does_not_grow_with_the_chunks_as_transformers_does():
    keys, values = states(2048)
    theirs = QuantizedCache("hqq", CONFIG, axis_key=0, axis_value=0)
    errors = {}
    for name, cache in (("ours", new_cache(CONFIG, "quantized")), ("theirs", theirs)):
        for begin in range(0, 2048, 128):
            part = slice(begin, begin + 128)
            cache.update(keys[..., part, :], values[..., part, :], 0)
        found, _ = cache.update(torch.zeros(1, 2, 1, 64), torch.zeros(1, 2, 1, 64), 0)
        errors[name] = error(found[..., :-1, :], keys)
    assert errors["ours"] < 0.1 < errors["theirs"]


def test_a_chunk_is_quantized_alone(monkeypatch):
    sizes, quantize = [], AppendingHQQLayer._quantize

    def watched(self, part, axis):
        sizes.append(part.shape[-2])
        return quantize(self, part, axis)

    monkeypatch.setattr(AppendingHQQLayer, "_quantize", watched)
    layer, (keys, values) = AppendingHQQLayer(), states(1000)
    for begin in range(0, 1000, 200):
        layer.update(keys[..., begin : begin + 200, :], values[..., begin : begin + 200, :])
    assert max(sizes) <= 256 and sum(sizes) == 2 * 896  # 104 wait for the next


@pytest.mark.parametrize("kept", [0, 1, 127, 128, 500, 639, 640, 700])
def test_it_is_cut_back_to_any_length_and_goes_on(kept):
    keys, values = states(700)
    layer = AppendingHQQLayer()
    for begin in (0, 300, 640):
        end = {0: 300, 300: 640, 640: 700}[begin]
        layer.update(keys[..., begin:end, :], values[..., begin:end, :])
    layer.crop(kept - 700)
    assert layer.get_seq_length() == kept
    more = states(200, seed=1)
    found = layer.update(*more)
    assert layer.get_seq_length() == kept + 200
    for part, given, new in zip(found, (keys, values), more, strict=True):
        assert part.shape[-2] == kept + 200 and torch.equal(part[..., kept:, :], new)
        assert kept == 0 or error(part[..., :kept, :], given[..., :kept, :]) < 0.1
    layer.crop(0)
    assert layer.get_seq_length() == kept + 200
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.update(keys, values)[0].shape[-2] == 700


def test_cutting_back_again_and_again_does_not_wear_the_tokens_out():
    keys, values = states(300)
    layer = AppendingHQQLayer()
    layer.update(keys, values)
    for turn in range(8):
        layer.update(*states(150, seed=turn))
        layer.crop(-150)
    found, _ = layer.update(*states(1))
    assert error(found[..., :-1, :], keys) < 0.1


def test_a_model_reads_in_chunks_what_it_reads_at_once():
    torch.manual_seed(0)
    model, ids = LlamaForCausalLM(CONFIG).eval(), torch.randint(512, (1, 900))
    with torch.no_grad():
        expected = model(ids).logits[0, -1]
        cache = new_cache(CONFIG, "quantized")
        for begin in range(0, 900, 250):
            logits = model(ids[:, begin : begin + 250], past_key_values=cache, use_cache=True).logits[0, -1]
    assert cache.get_seq_length() == 900
    assert error(logits, expected) < 0.05


def test_a_cache_that_this_machine_cannot_have_is_refused_with_a_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kv_cache, "is_hqq_available", lambda: False)
    for kind, line in [
        ("quantized", "pip install hqq"),
        ("offloaded", "use one of default, quantized$"),
        ("8bit", "use one of default"),
    ]:
        with pytest.raises(ValueError, match=line):
            new_cache(CONFIG, kind)


def transformers_quantizes(config):
    try:
        QuantizedCache("hqq", config)
    except ValueError:
        return False
    return True


SLIDING_ALONE = MistralConfig(sliding_window=8, num_hidden_layers=2, max_position_embeddings=8)


@pytest.mark.parametrize("config", [*map(tiny, CONFIGS), SLIDING_ALONE], ids=[*CONFIGS, "mistral"])
def test_a_base_is_planned_and_read_with_the_caches_that_it_can_have_alone(config, monkeypatch):
    kinds = KV_CACHES if transformers_quantizes(config) else ("default",)
    length = config.max_position_embeddings
    assert kv_caches(config) == kinds
    assert tuple(plan_gpus(config, Training(context_length=length)).evaluation.terms) == kinds
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (1, 80 * 2**30))
    assert fit.fitting_kv_cache(config, Reading(length=length)) == kinds[-1]
    monkeypatch.undo()
    new_cache(config, kinds[-1])
    if kinds != KV_CACHES:
        with pytest.raises(ValueError, match=r"needs full attention in all layers, and this base has (sliding|linear)"):
            new_cache(config, "quantized")


def test_what_has_no_room_is_not_sent_to_a_cache_that_its_base_cannot_have():
    reading = Reading(length=1_048_576)
    for family, has_it in (("glm4", True), ("gemma3", False), ("qwen3.5", False)):
        needed = replace(reading, kv_cache="quantized").terms(tiny(family))["total"]
        flags = as_flags(advise(tiny(family), needed, reading))
        assert flags == ("--kv_cache quantized" if has_it else "--lengths 524288"), family
