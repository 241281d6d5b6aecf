"""What `cream-peft check` says of adapters that are right, that are loaded wrong, and that are wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cream_peft import cli, load_adapter, rope
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
    assert len(rows) == 6 and all("".join(row["found"].split()) in unwrapped for row in rows)
    assert all(row["item"] in printed for row in rows) and max(map(len, printed.splitlines())) <= 120


def test_a_merged_model_is_no_base_and_is_checked_for_what_it_is(adapter, tmp_path):
    merge_adapter(adapter, tmp_path / "merged")
    with pytest.raises(AdapterError, match="max_position_embeddings is 2048, trained with 256"):
        load_adapter(adapter, base_model=str(tmp_path / "merged"))
    assert verdicts(tmp_path / "merged") == {"kind": "ok", "extended": "ok", "RoPE": "ok", "plain load": "ok"}
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    (tmp_path / "merged" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    assert verdicts(tmp_path / "merged") == {"RoPE": "wrong"}


def test_another_base_of_the_same_shape_is_refused_by_its_weights(adapter, tmp_path):
    other = Path(shutil.copytree(base_folder(), tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    for dtype in (torch.bfloat16, torch.float16):
        # Control: the same weights, rounded, are taken for what they are.
        save_file({name: t.to(dtype) for name, t in weights.items()}, other / "model.safetensors", {"format": "pt"})
        load_adapter(adapter, base_model=str(other), load_in_4bit=False)
    generator = torch.Generator().manual_seed(0)
    moved = {name: t + 0.02 * t.std() * torch.randn(t.shape, generator=generator) for name, t in weights.items()}
    save_file(moved, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match="other weights than the base this adapter was trained on"):
        load_adapter(adapter, base_model=str(other))
