import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TARGET, WINDOW
from hub_server import Hub, Repository
from huggingface_hub import HfApi, constants
from peft import PeftModel, prepare_model_for_kbit_training
from safetensors.torch import load_file, save
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from trl import get_peft_config

from cream_peft import CREAMTrainer, cli, load_adapter, rope
from cream_peft.model import base
from cream_peft.model.adapter import open_adapter
from cream_peft.model.base import load_base
from cream_peft.model.record import AdapterError, Record
from cream_peft.model.tokenizer import load_tokenizer
from cream_peft.tiny import TINY_ID, base_folder
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


@pytest.mark.parametrize(
    ("dtype", "model_type", "on_gpu", "has_flash", "wanted"),
    [
        (torch.bfloat16, "llama", True, True, "flash_attention_2"),
        (torch.bfloat16, "llama", True, False, "sdpa"),
        (torch.bfloat16, "large heads", True, True, "sdpa"),
        (torch.float16, "a T4", True, True, "sdpa"),
        (torch.float32, "llama", True, True, "sdpa"),
        (torch.bfloat16, "llama", False, True, "sdpa"),
        (torch.bfloat16, "gpt_oss", True, True, "flex_attention"),
        (torch.bfloat16, "gpt_oss", False, True, "eager"),
    ],
)
def test_attention_is_the_fastest_that_can_run(dtype, model_type, on_gpu, has_flash, wanted, monkeypatch):
    # What transformers itself would load: not flash-attn-4, which has the same import name, and none that is too old.
    monkeypatch.setattr(base, "is_flash_attn_2_available", lambda: has_flash)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 5) if model_type == "a T4" else (8, 0))
    changes = {"head_dim": 512} if model_type == "large heads" else {}
    config = AutoConfig.for_model("gpt_oss" if model_type == "gpt_oss" else "llama", **changes)
    assert base.default_attention(dtype, config, on_gpu) == wanted


def test_lora_takes_the_recipes_settings():
    recipe = parse_recipe(["--lora_r", "4", "--use_rslora", "--lora_target_modules", "q_proj", "v_proj"])
    config = get_peft_config(recipe.model)
    assert config.r == 4 and config.use_rslora and config.target_modules == {"q_proj", "v_proj"}
    assert get_peft_config(parse_recipe([]).model).target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}


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


def test_a_cream_json_of_another_version_is_read_as_far_as_it_is_known(adapter):
    folder, _ = adapter
    written = json.loads((folder / "cream.json").read_text())
    assert written["format"] == 2
    known = Record.read(folder, "run")
    # A null takes the field's default.
    (folder / "cream.json").write_text(json.dumps(written | {"unknown": 1, "settings": None}))
    assert Record.read(folder, "run") == replace(known, settings={})
    known.write(folder)
    assert Record.read(folder, "run") == known


def test_a_cream_json_that_cannot_be_read_rightly_is_refused(adapter):
    folder, _ = adapter
    written = json.loads((folder / "cream.json").read_text())
    for content, said in (
        ({**written, "format": 3}, "format 3: upgrade cream-peft"),
        ({key: value for key, value in written.items() if key != "target_length"}, "does not say target_length"),
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


@pytest.fixture
def local_run(tmp_path, make_model, make_documents, make_config, lora, tiny_tokenizer):
    """An adapter that was trained on a local folder, tmp_path/base."""
    make_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    trainer = CREAMTrainer(
        model=str(tmp_path / "base"), args=make_config(), train_dataset=make_documents(8), peft_config=lora()
    )
    trainer.train()
    trainer.save_model()
    return tmp_path / "run"


def test_the_folder_of_a_local_base_is_remembered_beside_the_adapter(local_run, tmp_path, monkeypatch, make_model):
    monkeypatch.chdir(tmp_path)
    load_adapter(local_run, load_in_4bit=False)
    assert str(tmp_path) not in "".join(path.read_text() for path in local_run.glob("*.json"))
    # Another model in that folder by now.
    make_model(seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError, match=r"other weights .* differs"):
        load_adapter(local_run)


def test_an_adapter_of_a_local_base_that_is_gone_asks_where_it_lies(local_run, tmp_path):
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(
        AdapterError, match=r"local base, the folder 'base', no longer at .*: say where it lies with base_m"
    ):
        load_adapter(local_run)
    load_adapter(local_run, base_model=str(tmp_path / "moved"), load_in_4bit=False)
    (local_run / "base_folder.txt").unlink()
    with pytest.raises(AdapterError, match=r"local base, the folder 'base': say where"):
        load_adapter(local_run)


def test_all_models_of_a_comparison_are_found_before_the_first_is_measured(local_run, tmp_path, capsys):
    (tmp_path / "base").rename(tmp_path / "moved")
    measured = ["evaluate", "--tasks", "kv_retrieval", "--samples", "1", "--lengths", "64"]
    measured += ["--output_dir", str(tmp_path / "results"), "--compare", "cream-peft-tiny", str(local_run)]
    assert cli.main(measured) == 2
    assert "say where it lies" in capsys.readouterr().err and not (tmp_path / "results").exists()
    # Control: with the base they are all found.
    found = [*measured, "--base_model", str(tmp_path / "moved"), "--dump-prompts", str(tmp_path / "prompts")]
    assert cli.main(found) == 0 and len(list((tmp_path / "prompts").iterdir())) == 2


# Of the Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process talks to, o/base on it with other weights on branch v1, and an empty cache."""
    with Hub() as server:
        server.repositories["models/o/base"] = Repository.of_folder(base_folder())
        for name, value in {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield server


def test_the_commit_of_the_base_is_recorded_and_loaded_again(
    hub, tmp_path, monkeypatch, make_documents, make_config, lora
):
    api = HfApi(token=hub.token)
    api.create_branch("o/base", branch="v1")
    other = {name: 1.05 * tensor for name, tensor in load_file(base_folder() / "model.safetensors").items()}
    place = {"repo_id": "o/base", "revision": "v1"}
    weights = save(other, {"format": "pt"})
    commit = api.upload_file(path_or_fileobj=weights, path_in_repo="model.safetensors", **place).oid
    trainer = CREAMTrainer(
        model="o/base",
        args=make_config(context_length=256, target_length=2048, model_init_kwargs={"revision": "v1"}),
        train_dataset=make_documents(8, tokens=256),
        peft_config=lora(),
    )
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "run"
    record, peft = (json.loads((folder / name).read_text()) for name in ("cream.json", "adapter_config.json"))
    assert record["base_revision"] == peft["revision"] == commit
    card = (folder / "README.md").read_text()
    assert f'from_pretrained("o/base", revision="{commit}", config=config)' in card
    assert f"vllm serve o/base --revision {commit}" in card
    # Unasked, vLLM would look for the base's commit in the adapter's repository.
    assert "--tokenizer this-repository-or-folder --tokenizer-revision main" in card
    # The branch moves on, and is not followed.
    assert api.upload_file(path_or_fileobj=b"New.", path_in_repo="NEWS", **place).oid != commit
    loaded, _ = load_adapter(folder, load_in_4bit=False)
    assert torch.equal(logits(loaded), logits(trainer.model.eval()))
    with pytest.raises(AdapterError, match="other weights"):
        load_adapter(folder, base_model="o/base", load_in_4bit=False)  # control: main's
    hub.stop()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    loaded, _ = load_adapter(folder, load_in_4bit=False)
    assert torch.equal(logits(loaded), logits(trainer.model.eval()))
    assert load_base("o/base", load_in_4bit=False, revision="v1").config._commit_hash == commit


def test_a_tokenizer_truncates_at_the_target_and_not_at_the_window_of_its_base(local_run, tmp_path):
    length = json.loads((local_run / "tokenizer_config.json").read_text())["model_max_length"]
    assert length == TARGET
    # Of an adapter that was saved before.
    settings = json.loads((local_run / "tokenizer_config.json").read_text())
    (local_run / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": WINDOW}))
    _, tokenizer = load_adapter(local_run, load_in_4bit=False)
    text = tokenizer.decode([7] * 2 * TARGET)
    assert len(tokenizer(text).input_ids) > TARGET and len(tokenizer(text, truncation=True).input_ids) == TARGET
    # Somebody's choice stays.
    (local_run / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 4 * TARGET}))
    assert open_adapter(local_run).tokenizer().model_max_length == 4 * TARGET


def test_what_save_pretrained_leaves_out_is_said_with_the_remedy(adapter, tmp_path):
    model, _ = load_adapter(adapter[0], load_in_4bit=False)
    model.save_pretrained(tmp_path / "again")
    with pytest.raises(
        AdapterError, match=r"as save_pretrained writes it.*use the folder that `cream-peft train` left"
    ):
        load_adapter(tmp_path / "again")


QUANTIZED = [
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "awq", "bits": 4},
]


@pytest.mark.parametrize("settings", QUANTIZED, ids=lambda settings: settings["quant_method"])
def test_a_base_that_is_quantized_already_is_refused_with_the_remedy(adapter, tmp_path, capsys, settings):
    base = Path(shutil.copytree(base_folder(), tmp_path / "base-4bit"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    for command in (
        ["train", "--model_name_or_path", str(base), "--output_dir", str(tmp_path / "new")],
        ["evaluate", "--compare", str(base), "--output_dir", str(tmp_path / "results")],
        ["check", "--adapter", str(adapter[0]), "--base_model", str(base)],
        ["chat", "--adapter", str(adapter[0]), "--base_model", str(base)],
    ):
        assert cli.main(command) == 2
        said = capsys.readouterr().err
        assert f"quantized already ({settings['quant_method']}): use the 16-bit model" in said and said.count("\n") == 1
    with pytest.raises(ValueError, match="quantized already"):
        load_base(str(base))
    assert not (tmp_path / "new").exists() and not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("runs/tiyn", "no such folder (there is a folder runs here"),
        ("./tiyn", "no such folder"),
        ("../tiyn", "no such folder"),
        ("/nowhere/none/tiyn", "no such folder"),
        ("a/b/c", "no such folder"),
    ],
)
def test_a_folder_that_is_not_there_is_said_without_asking_the_hub(tmp_path, monkeypatch, hub, capsys, name, said):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for command in ("check", "merge", "chat", "evaluate", "lm-eval"):
        options = {"merge": ["--output", "merged"], "lm-eval": ["--tasks", "mmlu"]}.get(command, [])
        option = "--compare" if command == "evaluate" else "--adapter"
        assert cli.main([command, option, name, *options]) == 2
        assert f"{name}: {said}" in capsys.readouterr().err
    assert cli.main(["train", "--model_name_or_path", name, "--output_dir", "new"]) == 2
    assert said in capsys.readouterr().err
    assert hub.requests == []
    # Control: what may be a Hub id is asked for there.
    assert cli.main(["check", "--adapter", "owner/tiyn"]) == 2 and hub.requests != []


def test_what_python_gets_for_a_wrong_name_is_one_error(hub):
    for name, said in (
        ("owner/tiyn", "neither on this disk nor on the Hub"),
        ("tiyn", "a Hub id is owner/name"),
        ("~/tiyn", "no such folder; ~ is not read here"),
    ):
        with pytest.raises(AdapterError, match=said) as raised:
            load_adapter(name)
        assert raised.value.__cause__ is None
        assert raised.value.__suppress_context__ or raised.value.__context__ is None


def test_python_prints_nothing_but_the_error(tmp_path):
    program = f"from cream_peft import load_adapter; load_adapter({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1 and done.stdout == ""
    first, *_, last = done.stderr.splitlines()
    assert first.startswith("Traceback") and "has no adapter_config.json" in last
    assert done.stderr.count("Traceback") == 1
