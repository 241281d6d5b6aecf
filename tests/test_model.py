import json
import shutil
from dataclasses import asdict

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from cream_peft import CREAMTrainer, load_adapter, rope
from cream_peft.model.base import load_base, load_tokenizer, lora_config
from cream_peft.model.record import AdapterError, Record
from cream_peft.tiny import TINY_ID
from cream_peft.train.recipe import parse_recipe


@pytest.fixture
def adapter(tmp_path, make_documents, make_config, lora, tiny_tokenizer):
    """A folder that a short 4-bit training run on the embedded base left, and the model it ended with."""
    trainer = CREAMTrainer(
        model=load_base(TINY_ID),
        args=make_config(context_length=256, target_length=2048, learning_rate=5e-2),
        train_dataset=make_documents(8, tokens=256),
        processing_class=tiny_tokenizer,
        peft_config=lora(),
    )
    trainer.train()
    trainer.save_model()
    return tmp_path / "run", trainer.model.eval()


def logits(model, tokens=600):
    ids = torch.arange(tokens)[None] % 385
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def test_the_base_is_nf4_with_double_quantization_and_nothing_in_fp32_that_was_not():
    model = load_base(TINY_ID, dtype="bfloat16")
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.quant_state.quant_type == "nf4" and weight.quant_state.nested
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    prepared = prepare_model_for_kbit_training(load_base(TINY_ID, dtype="bfloat16"))
    assert prepared.get_input_embeddings().weight.dtype == torch.float32  # control: what is not called here


def test_lora_takes_the_recipes_settings():
    recipe = parse_recipe(["--lora_r", "4", "--use_rslora", "--lora_target_modules", "q_proj", "v_proj"])
    config = lora_config(recipe.model)
    assert config.r == 4 and config.use_rslora and config.target_modules == {"q_proj", "v_proj"}
    assert lora_config(parse_recipe([]).model).target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_an_adapter_comes_back_with_the_logits_it_was_saved_with(adapter):
    folder, trained = adapter
    loaded, tokenizer = load_adapter(folder)
    assert torch.equal(logits(loaded), logits(trained))
    assert len(tokenizer) == 385
    unquantized, _ = load_adapter(folder, load_in_4bit=False)
    assert not torch.equal(logits(unquantized), logits(trained))


def test_plain_transformers_gives_the_same_with_base_config_and_something_else_without(adapter, tmp_path):
    folder, _ = adapter
    ours, _ = load_adapter(folder, load_in_4bit=False)
    from cream_peft.tiny import base_folder

    scaled = AutoModelForCausalLM.from_pretrained(
        base_folder(), config=AutoConfig.from_pretrained(folder, subfolder="base_config")
    )
    assert torch.allclose(logits(PeftModel.from_pretrained(scaled, folder)), logits(ours), atol=1e-5)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder()), folder)
    assert (logits(plain) - logits(ours)).abs().max() > 1e-2  # control: loaded as people load adapters


@pytest.mark.parametrize("field, value", [("vocab_size", 386), ("num_hidden_layers", 1), ("hidden_size", 64)])
def test_a_base_of_another_shape_is_refused_by_the_field(adapter, tmp_path, field, value):
    folder, _ = adapter
    config = load_base(TINY_ID, load_in_4bit=False).unscaled_config
    setattr(config, field, value)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match=field):
        load_adapter(folder, base_model=str(tmp_path / "other"))


def test_a_base_of_another_rope_is_refused(adapter, tmp_path):
    folder, _ = adapter
    config = load_base(TINY_ID, load_in_4bit=False).unscaled_config
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500_000.0}
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="rope_parameters"):
        load_adapter(folder, base_model=str(tmp_path / "other"))


@pytest.mark.parametrize("missing", ["cream.json", "base_config/config.json", "adapter_config.json"])
def test_an_incomplete_adapter_is_refused_by_the_file(adapter, missing):
    folder, _ = adapter
    (folder / missing).unlink()
    with pytest.raises(AdapterError, match=missing):
        load_adapter(folder)


def test_the_folder_holds_what_the_card_says_and_survives_a_move(adapter, tmp_path):
    folder, trained = adapter
    shutil.move(folder, tmp_path / "moved")
    loaded, _ = load_adapter(tmp_path / "moved")
    assert torch.equal(logits(loaded), logits(trained))
    card = (tmp_path / "moved" / "README.md").read_text()
    assert "256 to 2,048 tokens" in card and "Nothing was measured yet" in card
    assert json.loads((tmp_path / "moved" / "cream.json").read_text())["base_model"] == TINY_ID
    # transformers 4 knows no TokenizersBackend, which is what 5 writes.
    settings = json.loads((tmp_path / "moved" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


# A cream.json of before it had a format, shortened.
FORMAT_1 = {
    "base_model": TINY_ID, "base_is_local": False, "base_revision": None, "base_fingerprint": [0.5, -0.25],
    "pretrained_window": 256, "target_length": 2048, "rope_scaling_type": "ntk", "load_in_4bit": True,
    "positions": {
        "strategy": "cream", "context_length": 256, "factor": 8.0, "sigma": 3.0, "seed": 0, "short_documents": "shrink",
        "redrawn": 1, "unlabelled": 0,
    },
    "license": None, "steps": 2, "first_step": 0, "seconds": 1.5, "peak_gib": None, "machine": "CPU", "seed": 0,
    "versions": {"cream_peft": "0.1.0"}, "recipe": {"dataset_name": "owner/documents"},
}  # fmt: skip


def test_a_cream_json_of_before_it_had_a_format_is_read(adapter):
    folder, _ = adapter
    written = json.loads((folder / "cream.json").read_text())
    assert written["format"] == 2 and written.keys() >= FORMAT_1.keys()
    (folder / "cream.json").write_text(json.dumps(FORMAT_1))
    record = Record.read(folder, "run")
    found = asdict(record)
    # A null takes the field's default.
    assert {key: found[key] for key in FORMAT_1} == FORMAT_1 and record.positions.redrawn == 1
    assert (record.merged, record.dtype, record.adapter_sha256, record.format) == (False, None, None, 2)
    record.write(folder)
    assert Record.read(folder, "run") == record
    # A merged model of before.
    (folder / "cream.json").write_text(json.dumps(FORMAT_1 | {"merged": True, "dtype": "float32", "unknown": 1}))
    assert Record.read(folder, "run").merged


def test_a_cream_json_that_cannot_be_read_rightly_is_refused(adapter):
    folder, _ = adapter
    for content, said in (
        ({**FORMAT_1, "format": 3}, "format 3: upgrade cream-peft"),
        ({key: value for key, value in FORMAT_1.items() if key != "target_length"}, "does not say target_length"),
    ):
        (folder / "cream.json").write_text(json.dumps(content))
        with pytest.raises(AdapterError, match=said):
            load_adapter(folder)


def test_what_is_published_holds_no_token_and_no_local_path(tmp_path, monkeypatch):
    (tmp_path / "data" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    given = {
        "hub_token": "hf_x", "model_init_kwargs": {"token": "hf_x", "eos_token": "</s>"}, "dataset_name": "data/mine",
        "paths": [str(tmp_path / "a"), "~/b", "./c"], "text": "/not\na path", "model_name_or_path": "owner/base",
    }  # fmt: skip
    Record(TINY_ID, 256, 2048, None, recipe=given).write(tmp_path)
    assert json.loads((tmp_path / "cream.json").read_text())["recipe"] == {
        "model_init_kwargs": {"eos_token": "</s>"}, "dataset_name": "mine", "paths": ["a", "b", "c"],
        "text": "/not\na path", "model_name_or_path": "owner/base",
    }  # fmt: skip


def test_the_scaled_base_is_checked_after_loading(monkeypatch):
    monkeypatch.setattr(rope, "scaled_config", lambda config, *rest: config)
    load_base(TINY_ID, load_in_4bit=False)  # control: nothing to find
    model = load_base(TINY_ID, load_in_4bit=False, dtype="bfloat16")
    model.to(torch.bfloat16)
    with pytest.raises(rope.RopeError, match="inv_freq"):
        rope.check_scaling(model, model.config)


def test_the_tokenizer_gets_a_pad_token_without_growing():
    tokenizer = load_tokenizer(TINY_ID)
    assert tokenizer.pad_token is not None and len(tokenizer) == 385


def test_an_adapter_of_a_local_base_asks_where_the_base_lies(
    tmp_path, monkeypatch, make_model, make_documents, make_config, lora, tiny_tokenizer
):
    make_model().save_pretrained(tmp_path / "base")
    trainer = CREAMTrainer(
        model=str(tmp_path / "base"), args=make_config(), train_dataset=make_documents(8),
        processing_class=tiny_tokenizer, peft_config=lora(),
    )  # fmt: skip
    trainer.save_model()
    monkeypatch.chdir(tmp_path)  # where a folder of that name happens to lie
    with pytest.raises(AdapterError, match="trained on a local base, the folder 'base'"):
        load_adapter(tmp_path / "run")
    load_adapter(tmp_path / "run", base_model=str(tmp_path / "base"), load_in_4bit=False)
