"""Each family of cream_peft/families.py on a tiny random model: what transformers computes, and the whole path."""

import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from families import (
    CONFIGS,
    SLIDING_WINDOW,
    WHOLE,
    WINDOW,
    built,
    logits,
    tiny,
    whole,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Cohere2Config

from cream_peft import load_adapter
from cream_peft.chat import Chat, ChatSettings
from cream_peft.evals.answers import scored_answers
from cream_peft.evals.prompts import Prompt
from cream_peft.families import family_of, far_parameters
from cream_peft.model.base import GIB, load_base
from cream_peft.model.check import check_adapter
from cream_peft.plan.layers import ATTENTION, cached_tokens, parameter_count
from cream_peft.plan.memory import Training
from cream_peft.publish.merge import merge_adapter
from cream_peft.rope import (
    RopeError,
    apply_scaling,
    check_scaling,
    load_base_config,
    published_config,
    save_base_config,
    scaled_config,
)
from cream_peft.tiny import base_folder
from cream_peft.tiny.documents import vocabulary
from cream_peft.train.recipe import parse_recipe
from cream_peft.train.run import run_recipe

FACTOR = 8
TARGET = FACTOR * WINDOW
FAR = [*range(16), *range(400, 416)]
SCALINGS = {
    "gemma3": ("linear", "ntk", "yarn"),
    "gemma4": ("linear", "ntk"),
    "qwen3.5": ("linear", "ntk", "yarn"),
    "gpt-oss": ("ntk", "yarn"),
    "olmo3": ("yarn",),
    "glm4": ("linear", "ntk", "yarn"),
    "qwen3-next": ("linear", "ntk", "yarn"),
    "qwen3-moe": ("yarn",),
    "mixtral": ("yarn",),
    "qwen3.5-moe": ("yarn",),
}
PAIRS = [(family, scaling) for family, scalings in SCALINGS.items() for scaling in scalings]
# Features of a head that rotate, and those by whose number their frequencies are spaced.
ROTATING = {"qwen3.5": (16, 16), "qwen3.5-moe": (16, 16), "qwen3-next": (16, 16), "glm4": (32, 32), "gemma4": (32, 128)}


def frequencies(model):
    """Of the layers that see everything, and of the sliding ones where they have their own."""
    buffers = dict(model.named_buffers())
    far = next(one for name, one in buffers.items() if name.endswith((".inv_freq", "full_attention_inv_freq")))
    return far, next((one for name, one in buffers.items() if name.endswith("sliding_attention_inv_freq")), None)


# The RoPE


@pytest.mark.parametrize(("family", "scaling"), PAIRS)
def test_a_scaled_model_has_the_logits_of_the_published_config(tmp_path, family, scaling):
    base = tiny(family)
    scaled = scaled_config(base, TARGET, scaling)
    model = built(base)
    before, (_, sliding) = logits(model, FAR), frequencies(model)
    apply_scaling(model, scaled)
    check_scaling(model, scaled)
    save_base_config(scaled, tmp_path)
    published = built(AutoConfig.from_pretrained(tmp_path, subfolder="base_config"))
    assert torch.equal(logits(model, FAR), logits(published, FAR))
    assert (before - logits(model, FAR)).abs().max() > 0.5  # the unscaled model is another one
    assert sliding is None or torch.equal(frequencies(model)[1], sliding)
    read = load_base_config(tmp_path)
    assert read.rope_parameters == scaled.rope_parameters and read.max_position_embeddings == TARGET


@pytest.mark.parametrize(("family", "scaling"), [pair for pair in PAIRS if pair[1] != "yarn"])
def test_the_pairs_that_rotate_are_slowed_as_the_formula_says(family, scaling):
    base = tiny(family)
    (plain, _), (found, _) = (frequencies(built(c)) for c in (base, scaled_config(base, TARGET, scaling)))
    rotating, spacing = ROTATING.get(family, (64, 64))
    if family != "gpt-oss":
        exponents = np.arange(0, rotating, 2) / spacing
        by_hand = far_parameters(base)["rope_theta"] ** -exponents
        np.testing.assert_allclose(plain[: rotating // 2], by_hand, rtol=2e-6)
    ratio = (plain / found)[: rotating // 2].double().numpy()
    if scaling == "linear":
        np.testing.assert_allclose(ratio, FACTOR, rtol=1e-5)
    else:
        assert ratio[0] == pytest.approx(1) and ratio[-1] == pytest.approx(FACTOR, rel=1e-5)
    assert not plain[rotating // 2 :].any() and not found[rotating // 2 :].any()  # proportional RoPE's still pairs


@pytest.mark.parametrize("family", ["gpt-oss", "olmo3"])
def test_yarn_on_a_yarn_base_is_the_yarn_of_the_whole_factor(family):
    far = far_parameters(scaled_config(tiny(family), TARGET, "yarn"))
    assert far["factor"] == 4 * FACTOR and far["original_max_position_embeddings"] * far["factor"] == TARGET
    model = built(scaled_config(tiny(family), TARGET, "yarn"))
    factors = [value for name, value in vars(model.model.rotary_emb).items() if name.endswith("attention_scaling")]
    assert max(factors) == pytest.approx(0.1 * math.log(4 * FACTOR) + 1)


def test_ntk_is_refused_by_name_where_all_layers_share_one_theta():
    with pytest.raises(RopeError, match="one theta for all layers of model_type 'olmo3': use 'yarn'"):
        scaled_config(tiny("olmo3"), TARGET, "ntk")


def in_transformers_4(family):
    return family_of(tiny(family).model_type).in_transformers_4


# What transformers 4.57 makes of the old keys: theta and scaling of the full-attention layers, and theta of the sliding
# ones. check_transformers_4.py runs it.
READERS = {
    "gemma3": lambda content: (content["rope_theta"], content["rope_scaling"], content["rope_local_base_freq"]),
    "olmo3": lambda content: (content["rope_theta"], content["rope_scaling"], content["rope_theta"]),
}


@pytest.mark.parametrize(("family", "scaling"), [pair for pair in PAIRS if in_transformers_4(pair[0])])
def test_the_published_config_says_the_same_to_transformers_4(tmp_path, family, scaling):
    scaled = scaled_config(tiny(family), TARGET, scaling)
    content = json.loads(save_base_config(scaled, tmp_path).read_text())
    far = dict(far_parameters(scaled))
    theta, old, sliding = READERS.get(family, lambda c: (c["rope_theta"], c["rope_scaling"], None))(content)
    assert {"rope_type": "default"} | (old or {}) | {"rope_theta": theta} == {
        key: value for key, value in far.items() if old or key != "partial_rotary_factor"
    }
    assert content.get("partial_rotary_factor") == far.get("partial_rotary_factor")
    # transformers 4 knows Qwen3-MoE's experts by this name alone, transformers 5 writes another.
    assert content.get("num_experts") == getattr(scaled, "num_experts", None)
    if sliding:
        assert sliding == scaled.rope_parameters["sliding_attention"]["rope_theta"]


def test_transformers_4_was_run_on_each_family_that_it_has_and_the_page_says_how_near_it_came():
    found = json.loads((ROOT / "tests/measured/transformers-4.json").read_text())
    rows = found["rows"]
    assert set(rows) == {f"{family} {scaling}" for family, scaling in PAIRS if in_transformers_4(family)}
    largest, control = max(row["difference"] for row in rows.values()), min(row["control"] for row in rows.values())
    told = f"{found['versions']['transformers 4']} has the same logits within {largest:.6f}"
    text = " ".join((ROOT / "recipes/families.md").read_text().split())
    assert largest < 5e-5 < 1 < control and told in text
    assert control - 0.1 < float(re.search(r"differ by at least ([\d.]+)", text)[1]) <= control


def test_vllm_does_not_multiply_the_window_of_gemma_3():
    # [read] vLLM multiplies max_position_embeddings by linear's factor, unless model_type has "gemma3" in it.
    for family, window in {"gemma3": TARGET, "glm4": WINDOW}.items():
        content = published_config(scaled_config(tiny(family), TARGET, "linear"))
        assert content["max_position_embeddings"] == window


def test_a_base_whose_far_layers_have_no_positions_is_refused():
    config = Cohere2Config(sliding_window=8)
    with pytest.raises(RopeError, match="'cohere2' has no positions in the layers that see the whole context"):
        scaled_config(config, 16_384, "linear")


# Sliding layers


def test_a_sliding_layer_looks_across_a_jump_by_index_and_a_long_document_has_nothing_there():
    model = built(tiny("gemma3", layer_types=["sliding_attention"] * 4, num_hidden_layers=4))
    model.model.layers = model.model.layers[:1]
    model.model.config.num_hidden_layers = 1
    tokens = torch.arange(3, 35)[None]
    changed = tokens.clone()
    changed[0, 15] += 100  # the last token before the jump

    def after(tokens, positions, index):
        mask = torch.ones_like(tokens)
        with torch.no_grad():
            return model(tokens, position_ids=positions[None], attention_mask=mask, use_cache=False).logits[0, index]

    jump = torch.tensor(FAR)
    assert not torch.equal(after(tokens, jump, 16), after(changed, jump, 16))
    beyond = 15 + SLIDING_WINDOW
    assert torch.equal(after(tokens, jump, beyond), after(changed, jump, beyond))


# The decoder of an image and text model


@pytest.mark.parametrize("family", list(WHOLE))
def test_the_decoder_alone_has_the_logits_of_the_whole_model(tmp_path, family):
    model = whole(family)
    model.save_pretrained(tmp_path)
    tokens = torch.arange(3, 35)[None]
    types = {"gemma3": "token_type_ids", "gemma4": "mm_token_type_ids"}.get(family)
    with torch.no_grad():
        wanted = model(tokens, use_cache=False, **({types: torch.zeros_like(tokens)} if types else {})).logits
        decoder = load_base(str(tmp_path), load_in_4bit=False, dtype=torch.float32).eval()
        assert torch.equal(decoder(tokens, use_cache=False).logits, wanted)
        config = AutoConfig.from_pretrained(tmp_path).text_config
        if family != "qwen3.5":  # transformers knows its names itself
            unmapped = AutoModelForCausalLM.from_pretrained(tmp_path, config=config).eval()
            assert not torch.allclose(unmapped(tokens, use_cache=False).logits, wanted, atol=0.1)  # the trap


# Planning


@pytest.mark.parametrize("family", list(CONFIGS))
def test_the_plan_counts_the_parameters_and_those_of_the_adapter_as_they_are(family):
    config, model = tiny(family), built(tiny(family))
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(one.numel() for name, one in model.named_parameters() if ".experts." in name)
    assert parameter_count(config) == total
    training = Training(context_length=WINDOW)
    assert 2 * experts < training.terms(config)["weights"] * GIB < 2 * total  # experts stay in 16 bits
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules=list(ATTENTION)))
    assert training.trained_parameters(config) == adapted.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("family", list(CONFIGS))
def test_the_plan_has_the_bytes_of_the_base_in_4_bits(tmp_path, family):
    config = tiny(family)
    built(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_base(str(tmp_path), dtype=torch.bfloat16)
    states = [one.quant_state for one in model.parameters() if hasattr(one, "quant_state")]
    tables = [(s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code) for s in states]
    assert len(states) > 8
    size = sum(one.nbytes for one in model.parameters()) + sum(one.nbytes for table in tables for one in table)
    terms = Training(context_length=WINDOW).terms(config)
    assert (terms["weights"] + terms["embeddings_and_head"]) * GIB == pytest.approx(size, rel=1e-4)


def test_a_sliding_layer_caches_its_window_and_a_linear_one_nothing():
    length = 100_000
    assert cached_tokens(tiny("gemma3"), length, 10) == 2 * length + 2 * (SLIDING_WINDOW + 10)
    assert cached_tokens(tiny("qwen3.5"), length, 10) == 2 * length
    assert cached_tokens(tiny("glm4"), length, 10) == 4 * length


# The whole path


@pytest.fixture(scope="module", params=list(CONFIGS))
def run(request, tmp_path_factory):
    """Family, folder of the base, folder of its adapter after two steps."""
    family, folder = request.param, tmp_path_factory.mktemp("family")
    model = whole(family) if family in WHOLE else built(tiny(family))
    model.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(base_folder()).save_pretrained(folder / "base")
    rows = torch.randint(3, 385, (8, 3 * WINDOW), generator=torch.Generator().manual_seed(1)).tolist()
    (folder / "documents.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    settings = {
        "model_name_or_path": folder / "base",
        "dataset_name": folder / "documents.jsonl",
        "output_dir": folder / "run",
        "target_length": TARGET,
        "rope_scaling_type": SCALINGS[family][-1],
        "load_in_4bit": "false",
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "learning_rate": 0.01,
        "save_strategy": "no",
    }
    recipe = parse_recipe([text for key, value in settings.items() for text in (f"--{key}", str(value))])
    run_recipe(recipe)
    return family, folder / "base", folder / "run"


def test_an_adapter_is_trained_loaded_and_merged(run, tmp_path):
    _, base, adapter = run
    model, _ = load_adapter(adapter, load_in_4bit=False, dtype=torch.float32)
    trained = logits(model, FAR)
    with model.disable_adapter():
        assert (logits(model, FAR) - trained).abs().max() > 1e-3
    unscaled = load_base(str(base), load_in_4bit=False, dtype=torch.float32)
    with model.disable_adapter():
        assert not torch.allclose(logits(unscaled.eval(), FAR), logits(model, FAR), atol=0.1)
    merge_adapter(adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged, FAR), trained, atol=2e-3, rtol=0)


def test_a_merged_model_is_found_whole_and_told_from_one_that_is_not(run, tmp_path):
    family, _, adapter = run
    merge_adapter(adapter, tmp_path / "merged")
    path = tmp_path / "merged/model.safetensors"
    stored = load_file(path)

    def found(**tensors):
        save_file({name: one for name, one in (stored | tensors).items() if one is not None}, path, {"format": "pt"})
        return next(row for row in check_adapter(tmp_path / "merged") if row.item == "weights")

    assert found().verdict == "ok"
    # Layers for several tokens at once, which transformers does not read.
    has_more = family in ("qwen3.5", "qwen3.5-moe", "qwen3-next")
    assert found(**{"mtp.fc.weight": torch.ones(3)}).verdict == ("ok" if has_more else "wrong")
    norm = next(name for name in stored if "layers.1." in name and "norm" in name)
    row = found(**{norm: None})
    assert (row.verdict, row.found) == ("wrong", f"{norm} is missing, and config.json asks for it: merge again")
    row = found(**{norm: torch.ones(5)})
    assert row.verdict == "wrong" and row.found.startswith(f"{norm} is [5], and config.json asks for [")
    for name in (name for name in stored if ".experts." in name):
        assert found(**{name: None}).verdict == "wrong"
        break


def test_a_document_read_in_pieces_into_the_cache_has_the_logits_of_one_pass(run):
    model, _ = load_adapter(run[2], load_in_4bit=False, dtype=torch.float32)
    tokens = torch.randint(3, 385, (1, 3 * WINDOW), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole_pass = model(tokens, use_cache=False).logits
        cache, pieces = None, []
        for piece in tokens.split([100, 91, 1], dim=1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole_pass, atol=2e-3, rtol=0)


def test_prompts_that_begin_alike_are_answered_as_each_alone(run):
    model, tokenizer = load_adapter(run[2], load_in_4bit=False, dtype=torch.float32)
    words = torch.randint(3, 385, (2 * WINDOW,), generator=torch.Generator().manual_seed(2)).tolist()
    replies = [([5, 6], [7, 8]), ([], [7, 8])]
    prompts = [Prompt("", [*words, number, number + 1], "", replies, 0.5, {}) for number in (10, 20)]
    found = list(scored_answers(model, tokenizer, prompts, answer_tokens=3, chunk_length=37))
    for prompt, (answer, losses) in zip(prompts, found, strict=True):
        tokens = list(prompt.tokens)
        with torch.no_grad():
            for (said, right), loss in zip(replies, losses, strict=True):
                rows = model(torch.tensor([[*tokens, *said, *right]]), use_cache=False).logits[0, -3:-1]
                wanted = torch.nn.functional.cross_entropy(rows, torch.tensor(right)).item()
                assert loss == pytest.approx(wanted, abs=2e-3)
            for _ in range(3):
                tokens.append(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax().item())
        if not {*tokens[-3:]} & {2, tokenizer.eos_token_id}:
            assert answer == tokenizer.decode(tokens[-3:], skip_special_tokens=True).strip()


def test_a_chat_goes_on_after_its_template_has_written_an_earlier_turn_otherwise(run):
    model, tokenizer = load_adapter(run[2], load_in_4bit=False, dtype=torch.float32)
    words = {word: number for number, word in enumerate(vocabulary())}
    tokenizer.backend_tokenizer.model = WordLevel(words, unk_token=".00")
    # As templates do that drop the thoughts of earlier turns.
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% if loop.last %}.03 {% endif %}{% endfor %}.04 "
    document = " ".join(vocabulary()[3:100])
    chat = Chat(model, tokenizer, WINDOW, TARGET, ChatSettings(document=document, max_new_tokens=4))
    for question in ("k001 k002", "k003"):
        earlier, answer = list(chat.messages), chat.ask(question, lambda text: None)
        fresh = Chat(model, tokenizer, WINDOW, TARGET, chat.settings, earlier)
        assert fresh.ask(question, lambda text: None) == answer
