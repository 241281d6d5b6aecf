"""What `cream-peft check` says of adapters that are right, that are loaded wrong, and that are wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cream_peft import cli, load_adapter, rope
from cream_peft.model.adapter import open_adapter
from cream_peft.model.check import check_adapter
from cream_peft.model.record import AdapterError
from cream_peft.publish.merge import merge_adapter
from cream_peft.tiny import base_folder
from cream_peft.train.recipe import parse_recipe
from cream_peft.train.run import run_recipe


def verdicts(folder, **options):
    return {row.item: row.verdict for row in check_adapter(folder, **options)}


def test_a_plain_peft_load_is_a_trap_and_check_says_what_it_gives(adapter):
    rows = {row.item: row for row in check_adapter(adapter)}
    assert {row.verdict for item, row in rows.items() if item != "plain PEFT load"} == {"ok"}
    trap = rows["plain PEFT load"]
    assert trap.verdict == "trap" and "UNSCALED" in trap.found and "load_adapter" in trap.found
    # Control: it is what PEFT really gives, without a word, and another model on long inputs.
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder()), str(adapter)).eval()
    with pytest.raises(rope.RopeError, match="inv_freq is not the one"):
        rope.check_scaling(plain, rope.load_base_config(adapter))
    right, _ = load_adapter(adapter, load_in_4bit=False)
    rope.check_scaling(right, rope.load_base_config(adapter))
    ids = torch.arange(1, 1200).remainder(300)[None]
    with torch.no_grad():
        assert (right(ids).logits - plain(ids).logits)[0, -1].abs().max() > 0.1


def test_a_base_that_is_not_scaled_loses_nothing_by_a_plain_load(tmp_path):
    folder = tmp_path / "run"
    run_recipe(parse_recipe(["--max_steps", "1", "--rope_scaling_type", "none", "--output_dir", str(folder)]))
    assert verdicts(folder)["plain PEFT load"] == "ok"


def test_an_adapter_that_plain_peft_saved_is_explained(adapter):
    (adapter / "cream.json").unlink()
    with pytest.raises(AdapterError, match=r"has no cream.json.*does not say how its base was scaled"):
        check_adapter(adapter)


def test_an_adapter_that_never_trained_or_is_damaged_is_found(adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    for value, said in ((0.0, "never trained"), (float("nan"), "not finite")):
        for name in weights:
            if "lora_B" in name:
                weights[name].fill_(value)
        save_file(weights, adapter / "adapter_model.safetensors")
        row = next(row for row in check_adapter(adapter) if row.item == "adapter weights")
        assert row.verdict == "wrong" and said in row.found


def test_files_that_hold_tokens_are_found_and_the_command_fails(adapter, capsys):
    (adapter / "training_args.bin").write_bytes(b"token")
    assert cli.main(["check", "--adapter", str(adapter)]) == 2
    said = capsys.readouterr()
    assert "training_args.bin may hold tokens" in said.out and "is not right: other files" in said.err


def test_the_table_is_also_json(adapter, tmp_path, capsys):
    assert cli.main(["check", "--adapter", str(adapter), "--json", str(tmp_path / "check.json")]) == 0
    rows, printed = json.loads((tmp_path / "check.json").read_text()), capsys.readouterr().out
    unwrapped = "".join(printed.split())
    assert len(rows) == 7 and all("".join(row["found"].split()) in unwrapped for row in rows)
    assert all(row["item"] in printed for row in rows) and max(map(len, printed.splitlines())) <= 120


def test_a_merged_model_is_no_base_and_is_checked_for_what_it_is(adapter, tmp_path):
    merge_adapter(adapter, tmp_path / "merged")
    with pytest.raises(AdapterError, match="max_position_embeddings is 2048, trained with 256"):
        load_adapter(adapter, base_model=str(tmp_path / "merged"))
    items = ("kind", "extended", "RoPE", "weights", "tokenizer", "plain load")
    assert verdicts(tmp_path / "merged") == dict.fromkeys(items, "ok")
    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    save_file({name.replace("q_proj", "query"): tensor for name, tensor in tensors.items()}, file, {"format": "pt"})
    assert verdicts(tmp_path / "merged")["weights"] == "wrong"
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    (tmp_path / "merged" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    assert verdicts(tmp_path / "merged") == {"RoPE": "wrong"}


@pytest.fixture
def other_base(tmp_path):
    """A copy of the embedded base, and a function that changes its weights."""
    other = Path(shutil.copytree(base_folder(), tmp_path / "other"))

    def change(function):
        weights = load_file(base_folder() / "model.safetensors")
        changed = {name: function(name, tensor).contiguous() for name, tensor in weights.items()}
        save_file(changed, other / "model.safetensors", {"format": "pt"})
        return str(other)

    return change


def shifted(part, scale=0.02):
    """A change of the tensors that have `part` in their names, as training them makes."""
    generator = torch.Generator().manual_seed(0)

    def change(name, tensor):
        noise = torch.randn(tensor.shape, generator=generator) * tensor.abs().mean()
        return tensor + scale * noise if part in name else tensor

    return change


KINDS = ("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS += ("input_layernorm", "post_attention_layernorm", "model.norm", "lm_head")


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_differs_in_one_kind_of_layer_is_refused_by_it(adapter, other_base, kind):
    other = other_base(shifted(kind))
    for in_4bit in (True, False):
        with pytest.raises(AdapterError, match=rf"{kind}\S* differs.*right one"):
            load_adapter(adapter, base_model=other, load_in_4bit=in_4bit)
    with pytest.raises(AdapterError, match=rf"{kind}\S* differs"):
        merge_adapter(adapter, Path(other).parent / "merged", base_model=other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_rounded_is_taken_for_what_it_is(adapter, other_base, dtype):
    other = other_base(lambda name, tensor: tensor.to(dtype))
    for in_4bit in (True, False):
        load_adapter(adapter, base_model=other, load_in_4bit=in_4bit)


def test_a_base_of_which_no_safetensors_are_here_is_compared_when_it_is_loaded(adapter, other_base, monkeypatch):
    other = other_base(shifted("embed_tokens"))
    monkeypatch.setattr("cream_peft.model.adapter.weight_files", lambda folder: {})
    open_adapter(adapter, base_model=other)
    with pytest.raises(AdapterError, match="embed_tokens"):
        load_adapter(adapter, base_model=other)


def test_a_checkpoint_is_right_with_its_optimizer_beside_it(tmp_path):
    folder = tmp_path / "run"
    steps = ["--max_steps", "2", "--save_strategy", "steps", "--save_steps", "2"]
    run_recipe(parse_recipe([*steps, "--output_dir", str(folder)]))
    assert (folder / "checkpoint-2" / "optimizer.pt").is_file()
    assert set(verdicts(folder / "checkpoint-2").values()) == {"ok", "trap"}


@pytest.mark.parametrize("name", ["cream-peft-tiny", str(base_folder())])
def test_a_base_is_called_a_base(name, capsys):
    assert cli.main(["check", "--adapter", name]) == 2
    assert "is a base, not an adapter: `cream-peft train` makes" in capsys.readouterr().err


def test_ntk_is_called_ntk(adapter):
    rows = {row.item: row.found for row in check_adapter(adapter)}
    assert rows["RoPE trained with"].startswith("ntk, theta 91,896")
    assert "default, theta 10,000" in rows["plain PEFT load"]  # control: the base's own


def test_a_tokenizer_with_ids_that_the_embeddings_lack_is_wrong(adapter):
    assert verdicts(adapter)["tokenizer"] == "ok"
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(adapter)
    row = next(row for row in check_adapter(adapter) if row.item == "tokenizer")
    assert row.verdict == "wrong" and "largest id, 385, is outside the vocabulary of 385" in row.found
    for damaged in ("{}", json.dumps(json.loads((adapter / "tokenizer.json").read_text()) | {"model": 3})):
        (adapter / "tokenizer.json").write_text(damaged)
        row = next(row for row in check_adapter(adapter) if row.item == "tokenizer")
        assert row.verdict == "wrong" and "--debug" not in row.found
