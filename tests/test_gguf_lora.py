"""The adapter as a GGUF LoRA, read back with the gguf package; check_gguf_lora.py asks llama.cpp itself."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Olmo3Config, Qwen2Config, Qwen3Config

from cream_peft import cli, rope
from cream_peft.model.record import Record
from cream_peft.publish.card import write_card
from cream_peft.publish.gguf_lora import write_gguf_lora
from cream_peft.publish.serving import ServingError, llama_cpp_command, vllm_command

WINDOW, TARGET = 64, 512
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PLACES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
PLACES |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}


@pytest.fixture
def make_adapter(tmp_path):
    """An adapter with random weights, and of its base the config alone: the folders of both, and the model."""

    def make(config_class=LlamaConfig, scaling="yarn", base=(), **settings):
        torch.manual_seed(0)
        sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": WINDOW}
        config = config_class(**(sizes | dict(base)))
        config.save_pretrained(tmp_path / "base")
        rope.save_base_config(rope.scaled_config(config, TARGET, scaling), tmp_path / "run")
        chosen = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION} | settings
        model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(**chosen, task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.peft_config["default"].base_model_name_or_path = "owner/base"
        model.save_pretrained(tmp_path / "run")
        Record("owner/base", WINDOW, TARGET, scaling).write(tmp_path / "run")
        return tmp_path / "run", str(tmp_path / "base"), model

    return make


def read(file):
    """The fields of a GGUF, and its tensors."""
    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


@pytest.mark.parametrize(
    "config_class, architecture, settings",
    [
        (LlamaConfig, "llama", {}),
        (LlamaConfig, "llama", {"use_rslora": True, "alpha_pattern": {"q_proj": 32}}),
        (LlamaConfig, "llama", {"target_modules": "all-linear", "rank_pattern": {"down_proj": 2}}),
        (MistralConfig, "llama", {}),
        (Qwen2Config, "qwen2", {"target_modules": "all-linear"}),
        (Qwen3Config, "qwen3", {"lora_alpha": 0}),
    ],
    ids=["llama", "rslora", "all-linear", "mistral", "qwen2", "no-alpha"],
)
def test_llama_cpp_adds_to_each_weight_what_peft_adds(make_adapter, tmp_path, config_class, architecture, settings):
    folder, base, model = make_adapter(config_class, **settings)
    written = write_gguf_lora(folder, tmp_path / "adapter.gguf", base_model=base)
    fields, tensors = read(written.file)
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == architecture
    assert "--rope-scaling yarn" in fields["general.description"] and str(tmp_path) not in fields["general.description"]
    layers = {
        f"blk.{index}.{PLACES[name]}.weight": model.get_submodule(
            f"base_model.model.model.layers.{index}.{part}.{name}"
        )
        for index in range(2)
        for part, names in (("self_attn", ATTENTION), ("mlp", ["gate_proj", "up_proj", "down_proj"]))
        for name in names
        if part == "self_attn" or settings.get("target_modules")
    }
    assert written.layers == len(layers) and written.bytes == (tmp_path / "adapter.gguf").stat().st_size
    assert tensors.keys() == {f"{place}.lora_{part}" for place in layers for part in "ab"}
    for place, layer in layers.items():
        a, b = tensors[f"{place}.lora_a"], tensors[f"{place}.lora_b"]
        assert a.dtype == b.dtype == np.float32
        # As llama.cpp does: alpha of the file, rank of the tensor, and a scale of 1 where alpha is 0.
        added = (fields["adapter.lora.alpha"] / len(a) if fields["adapter.lora.alpha"] else 1) * b @ a
        wanted = layer.get_delta_weight("default").detach().numpy()
        if architecture == "llama" and place.split(".")[2] in ("attn_q", "attn_k"):
            # Row 2 i of a head of 8 is row i, and row 2 i + 1 is row i + 4.
            order = [head + row for head in range(0, len(b), 8) for row in (0, 4, 1, 5, 2, 6, 3, 7)]
            assert np.abs(added - wanted).max() > 0.01  # control: the order matters
            wanted = wanted[order]
        np.testing.assert_allclose(added, wanted, rtol=1e-4, atol=1e-6)
    assert settings.get("lora_alpha") == 0 or np.abs(wanted).max() > 0.01


@pytest.mark.parametrize(
    "config_class, base, scaling, flags",
    [
        (LlamaConfig, {}, "yarn", ["--rope-scaling yarn --rope-scale 8 --yarn-orig-ctx 64", "llama"]),
        (MistralConfig, {}, "linear", ["--rope-scaling linear --rope-scale 8", "llama"]),
        (Qwen3Config, {"rope_theta": 1e4}, "ntk", [f"--rope-freq-base {1e4 * 8 ** (8 / 6):.10g}", "qwen3"]),
        (Qwen2Config, {}, None, ["qwen2"]),
        (LlamaConfig, {"max_position_embeddings": TARGET}, None, []),
    ],
    ids=["yarn", "linear", "ntk", "none", "within-the-window"],
)
def test_the_line_scales_the_base_as_in_training_and_raises_its_length(
    make_adapter, config_class, base, scaling, flags
):
    folder, _, _ = make_adapter(config_class, scaling, base)
    wanted = ["llama-server -m base.gguf --lora 'my adapter.gguf' -c 512", *flags]
    if flags:
        wanted[-1] = f"--override-kv {flags[-1]}.context_length=int:512"
    record = Record("owner/base", base.get("max_position_embeddings", WINDOW), TARGET, scaling)
    assert llama_cpp_command(folder, record, "my adapter.gguf") == " \\\n  ".join(wanted)
    write_card(folder, record)
    card = (folder / "README.md").read_text()
    assert llama_cpp_command(folder, record) in card and "--gguf_lora adapter.gguf" in card


@pytest.mark.parametrize(
    "config_class, settings, said",
    [
        (LlamaConfig, {"use_dora": True}, "no DoRA (use_dora"),
        (LlamaConfig, {"modules_to_save": ["lm_head"]}, "modules that were trained whole (modules_to_save"),
        (LlamaConfig, {"target_modules": [*ATTENTION, "embed_tokens"]}, "embed_tokens is adapted"),
        (LlamaConfig, {"scaling": "ntk", "base": {"rope_parameters": LLAMA3}}, "llama3's factors"),
        (Olmo3Config, {"base": {"layer_types": ["full_attention"] * 2}}, "and the base is 'olmo3'"),
    ],
    ids=["dora", "modules_to_save", "embeddings", "llama3-ntk", "another-family"],
)
def test_what_llama_cpp_cannot_serve_as_a_lora_is_refused_and_merged(
    make_adapter, tmp_path, config_class, settings, said
):
    folder, base, _ = make_adapter(config_class, **settings)
    with pytest.raises(ServingError) as error:
        write_gguf_lora(folder, tmp_path / "adapter.gguf", base_model=base)
    assert said in str(error.value) and "merge it into the base instead" in str(error.value)
    assert not list(tmp_path.rglob("*.gguf*"))
    if "is adapted" not in said:
        write_card(folder, Record.read(folder, "it"))
        card = (folder / "README.md").read_text()
        assert "--gguf_lora" not in card and "llama.cpp and others need one model" in card


def test_llama3_takes_yarns_place_only_with_another_theta(make_adapter):
    folder, _, _ = make_adapter(scaling=None, base={"rope_parameters": LLAMA3})
    record = Record("owner/base", WINDOW, TARGET, None)
    assert "--rope" not in llama_cpp_command(folder, record)


def test_only_an_earlier_gguf_is_replaced_and_only_by_a_whole_one(make_adapter, tmp_path, monkeypatch):
    folder, base, _ = make_adapter()
    file = tmp_path / "adapter.gguf"
    file.write_text("mine")
    with pytest.raises(ServingError, match="is there and no GGUF: choose another name"):
        write_gguf_lora(folder, file, base_model=base)
    assert file.read_text() == "mine"
    with pytest.raises(ServingError, match="is a folder"):
        write_gguf_lora(folder, tmp_path, base_model=base)
    file.write_bytes(b"GGUF of before")
    with monkeypatch.context() as patched:
        patched.setattr("gguf.GGUFWriter.write_tensors_to_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_gguf_lora(folder, file, base_model=base)
    assert file.read_bytes() == b"GGUF of before" and not list(tmp_path.glob(".*"))
    assert len(read(write_gguf_lora(folder, file, base_model=base).file)[1]) == 16


def test_without_the_gguf_package_one_line_names_it(make_adapter, tmp_path, monkeypatch):
    folder, base, _ = make_adapter()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ServingError, match=r"run `pip install gguf`$"):
        write_gguf_lora(folder, tmp_path / "adapter.gguf", base_model=base)


def test_the_command_writes_it_and_prints_the_line(adapter, tmp_path, capsys):
    file, said = tmp_path / "out" / "adapter.gguf", tmp_path / "said.json"
    assert cli.main(["merge", "--adapter", str(adapter), "--gguf_lora", str(file), "--json", str(said)]) == 0
    record = Record.read(adapter, "it")
    told = llama_cpp_command(adapter, record, str(file))
    assert told in capsys.readouterr().out and json.loads(said.read_text())["command"] == told
    assert math.isclose(
        read(file)[0]["adapter.lora.alpha"], json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"]
    )
    for options in ([], ["--output", str(tmp_path / "merged"), "--gguf_lora", str(file)]):
        assert cli.main(["merge", "--adapter", str(adapter), *options]) == 2
        assert "give one of --output" in capsys.readouterr().err


def test_vllm_gets_the_rank_rounded_up_to_one_that_it_takes(make_adapter):
    folder, _, _ = make_adapter(r=20)
    assert "--max-lora-rank 32 " in vllm_command(folder, Record("owner/base", WINDOW, TARGET, "yarn"), "me/it")
