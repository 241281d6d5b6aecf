"""Push and pull against a Hub of our own, with every way in which the real one says no."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from hub_server import Hub, Repository
from huggingface_hub import HfApi, ModelCard, constants
from killing import killed
from safetensors.torch import load_file, save_file

from cream_peft import CREAMTrainer, cli, load_adapter
from cream_peft.evals.models import open_models
from cream_peft.evals.results import Results
from cream_peft.model.base import load_base
from cream_peft.model.check import check_adapter
from cream_peft.model.record import BASE_FOLDER, AdapterError, Record, adapter_sha256
from cream_peft.model.secrets import find_secret, public_name
from cream_peft.publish.card import metadata, write_card
from cream_peft.publish.files import RESUMED_FROM, files_in
from cream_peft.publish.licenses import LICENSES
from cream_peft.publish.merge import MergeError, merge_adapter
from cream_peft.publish.push import PushError, create_repository, push_folder
from cream_peft.publish.serving import vllm_command
from cream_peft.tiny import TINY_ID, base_folder
from cream_peft.train.recipe import RecipeError, parse_recipe
from cream_peft.train.run import run_recipe

REPO = "someone/adapter"
COMPLETE = {"adapter_model.safetensors", "adapter_config.json", "base_config/config.json", "cream.json", "README.md"}
COMPLETE |= {"tokenizer.json", "tokenizer_config.json"}
CALLS = ("create", "validate-yaml", "preupload", "lfs-batch", "put", "verify", "commit")
FAULTS = (401, 403, 404, 409, 412, 429, 500, 503, "drop-early", "half", "drop", "lost")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that the client in this process talks to, a cache of its own, and no waiting."""
    with Hub() as server:
        page = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", page)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


def files(hub, repo=REPO, branch="main"):
    repository = hub.repositories.get(f"models/{repo}")
    return dict(repository.at(branch).files) if repository else {}


def change(folder, **changes):
    """Change what cream.json says, which then goes with the weights as they are."""
    record = Record.read(folder, "")
    changes = {"adapter_sha256": adapter_sha256(folder) or record.adapter_sha256} | changes
    replace(record, **changes).write(folder)


def results_of(folder, sha256, label="CREAM", value=0.75):
    """A results file of `cream-peft evaluate`; `sha256` names the adapter measured, None a base."""
    cell = {"task": "recall", "metric": "accuracy", "value": value, "samples": 20, "seconds": 1}
    settings = {"label": label, "pretrained_window": 256, "machine": "CPU"}
    content = {
        "model": "cream-peft-tiny",
        "adapter": None,
        "versions": {},
        "seed": 7,
        "settings": settings | ({"adapter_sha256": sha256} if sha256 else {}),
        "cells": [cell | {"length": length, "depth": depth} for length in (256, 2048) for depth in (0.25, 0.75)],
    }
    path = folder / f"{label}.json"
    path.write_text(json.dumps(content))
    return path


def test_a_push_is_one_commit_of_a_complete_adapter_without_token_or_local_path(hub, adapter):
    (adapter / "training_args.bin").write_bytes(hub.token.encode())
    (adapter / "notes.txt").write_text("mine")
    push_folder(adapter, REPO)
    repository = hub.repositories[f"models/{REPO}"]
    assert len(repository.commits) == 2  # the Hub's own first one, and ours
    assert set(files(hub)) == COMPLETE | {".gitattributes"}
    for secret in (hub.token, str(adapter), str(Path.home())):
        assert not hub.carrying(secret)
    assert hub.carrying("cream-peft-tiny")  # control: the search does find what was sent


def test_a_dry_run_leaves_what_a_push_would_publish_and_needs_no_account(hub, adapter, tmp_path, monkeypatch, capsys):
    results = results_of(tmp_path, adapter_sha256(adapter))
    push = ["push", "--adapter", str(adapter), "--repo", REPO, "--results", str(results)]
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    staged = tmp_path / "staged"
    assert cli.main([*push, "--dry_run", str(staged)]) == 0
    assert not hub.repositories
    assert f"Nothing was sent. What {REPO} would get is in {staged}" in capsys.readouterr().out
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # A folder that is there is not written over.
    assert cli.main([*push, "--dry_run", str(staged)]) == 2
    assert cli.main(push) == 0
    found = {path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file()}
    assert found | {".gitattributes"} == set(files(hub))
    assert (staged / "README.md").read_bytes() == files(hub)["README.md"]


def test_a_file_with_the_token_or_a_local_path_is_not_published(hub, adapter):
    for secret in (hub.token, str(adapter)):
        path = adapter / "adapter_config.json"
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | {"note": f"see {secret}/x"}))
        with pytest.raises(PushError, match=r"adapter_config.json of .* holds (your token|a path of this machine)"):
            push_folder(adapter, REPO)
        assert set(files(hub)) <= {".gitattributes"} and not hub.carrying(secret)
        path.write_text(before)


def test_what_is_pushed_is_pulled_by_a_fresh_process_with_equal_logits(hub, adapter, tmp_path):
    from cream_peft import load_adapter

    push_folder(adapter, REPO, private=True)
    script = f"""
import torch
from cream_peft import load_adapter
model, tokenizer = load_adapter("{REPO}", load_in_4bit=False)
ids = torch.arange(1, 600).remainder(300)[None]
torch.save(model(ids).logits, "logits.pt")
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": hub.token}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, timeout=300)
    model, _ = load_adapter(adapter, load_in_4bit=False)
    ids = torch.arange(1, 600).remainder(300)[None]
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(ids).logits)
    del environment["HF_TOKEN"]
    anonymous = environment | {"HF_HOME": str(tmp_path / "other")}
    refused = subprocess.run(
        [sys.executable, "-m", "cream_peft.cli", "check", "--adapter", REPO],
        cwd=tmp_path, env=anonymous, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert refused.returncode == 2 and "neither on this disk nor on the Hub" in refused.stderr


def test_pushing_again_sends_no_weights_and_makes_no_empty_commit(hub, adapter):
    push_folder(adapter, REPO)
    push_folder(adapter, REPO)
    assert len(hub.repositories[f"models/{REPO}"].commits) == 2
    assert hub.received == {adapter_sha256(adapter): 1}


def test_a_branch_is_created_and_main_stays(hub, adapter):
    push_folder(adapter, REPO, revision="v2")
    assert set(files(hub, branch="v2")) >= COMPLETE and set(files(hub)) == {".gitattributes"}


def test_a_public_repository_is_not_taken_for_a_private_one(hub, adapter):
    push_folder(adapter, REPO)
    change(adapter, seed=99)
    with pytest.raises(PushError, match="exists and is public"):
        push_folder(adapter, REPO, private=True)
    assert b'"seed": 99' not in files(hub)["cream.json"]


def test_the_base_of_a_local_folder_must_be_named_by_its_hub_id(hub, adapter):
    change(adapter, base_model="my-base", base_is_local=True)
    with pytest.raises(PushError, match="trained on a local base, the folder 'my-base'"):
        push_folder(adapter, REPO)
    before = {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()}
    for wrong, said in (("owner/bsae", "owner/bsae is not on the Hub"), ("not an id", "is not a Hub id")):
        with pytest.raises(PushError, match=said):
            push_folder(adapter, REPO, base_model_id=wrong)
    assert f"models/{REPO}" not in hub.repositories  # nothing was made for a push that was refused
    hub.repositories["models/owner/base"] = Repository.of_folder(base_folder())
    push_folder(adapter, REPO, base_model_id="owner/base")
    assert before == {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()}
    sent = files(hub)
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == "owner/base"
    assert json.loads(sent["cream.json"])["base_model"] == "owner/base" and b"my-base" not in sent["README.md"]


def test_a_dry_run_of_an_adapter_of_a_local_base_reads_that_folder_and_not_the_hub(hub, adapter, tmp_path, monkeypatch):
    change(adapter, base_model="my-base", base_is_local=True)
    (adapter / BASE_FOLDER).write_text(f"{base_folder()}\n")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="trained on a local base"):
        push_folder(adapter, REPO, dry_run=tmp_path / "refused")
    staged = tmp_path / "staged"
    push_folder(adapter, REPO, base_model_id="owner/base", dry_run=staged)
    assert Record.read(staged, "staged").base_model == "owner/base" and staged.stat().st_mode & 0o777 == 0o755
    assert not (staged / BASE_FOLDER).exists() and not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ("cream", "cream positions (CREAM, [arXiv 2406.07138](https://arxiv.org/abs/2406.07138)) and"),
        ("pose", "pose positions (PoSE, [arXiv 2309.10400](https://arxiv.org/abs/2309.10400)) and"),
        ("contiguous", "contiguous positions and"),
        ("mine", "mine positions and"),
    ],
)
def test_a_card_names_the_paper_of_its_own_strategy_and_the_tasks_that_were_asked(adapter, tmp_path, strategy, said):
    record = Record.read(adapter, "adapter")
    record = replace(record, positions=replace(record.positions, strategy=strategy))
    results = {"a": Results.read(results_of(tmp_path, adapter_sha256(adapter)))}
    write_card(adapter, record, None, results)
    card = ModelCard.load(adapter / "README.md")
    assert said in card.content and card.content.count("arXiv") == ("arXiv" in said)
    assert ("cream" in card.data.tags) == (strategy == "cream")
    assert "Measured up to 2,048 tokens, with recall. Nothing else was measured." in card.content


def test_the_card_has_what_was_measured_and_says_where_nothing_was(hub, adapter, tmp_path):
    push_folder(adapter, REPO)
    assert b"Nothing was measured yet." in files(hub)["README.md"]
    assert ModelCard(files(hub)["README.md"].decode()).data.eval_results is None
    base, own = results_of(tmp_path, None, "untouched", 0.25), results_of(tmp_path, adapter_sha256(adapter))
    push_folder(adapter, REPO, results=[base, own])
    sent = files(hub)
    card = ModelCard(sent["README.md"].decode())
    assert "At each length: recall 40 questions; seed 7; CPU." in card.content
    # Each task's questions are counted apart.
    content = json.loads(own.read_text())
    content["cells"] += [cell | {"task": "needle", "samples": 3} for cell in content["cells"]]
    (tmp_path / "two.json").write_text(json.dumps(content))
    push_folder(adapter, REPO, results=[tmp_path / "two.json"])
    assert b"At each length: needle 6 questions, recall 40 questions; seed 7" in files(hub)["README.md"]
    assert "| untouched | 0.25 | 0.25 |\n| CREAM | 0.75 | 0.75 |" in card.content
    assert "![recall by length and by depth](results/recall.png)" in card.content
    assert sent["results/recall.png"].startswith(b"\x89PNG") and "results/CREAM.json" in sent
    # The base's figures are in the table only.
    measured = {(r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results}
    assert measured == {("recall, 256 tokens", "accuracy", 0.75), ("recall, 2,048 tokens", "accuracy", 0.75)}
    assert f'load_adapter("{REPO}")' in card.content and "`results/*.json`" in card.content
    assert card.data.license == "apache-2.0" and card.data.library_name == "peft"
    card.validate()
    # What was trained stays as it was: what is published is made in a copy.
    assert not (adapter / "results").exists() and "Nothing was measured yet" in (adapter / "README.md").read_text()


def test_the_card_of_a_branch_reads_that_branch(hub, adapter, tmp_path):
    push_folder(adapter, REPO)
    change(adapter, seed=99)
    push_folder(adapter, REPO, revision="v2")
    merge_adapter(adapter, tmp_path / "merged")
    push_folder(tmp_path / "merged", f"{REPO}-merged", revision="v2")
    for repo, load in ((REPO, "load_adapter"), (f"{REPO}-merged", "from_pretrained")):
        card, name = files(hub, repo, "v2")["README.md"].decode(), repo.split("/")[1]
        assert f"hf download {repo} --revision v2 --local-dir {name}\n" in card and f'{load}("{name}")' in card
        # The folder is what every other line reads.
        assert card.count(repo) == 1 and f'"{repo}"' not in card
    assert f'load_adapter("{REPO}")' in files(hub)["README.md"].decode()
    push_folder(adapter, REPO, revision="main")
    assert "hf download" not in files(hub)["README.md"].decode()


def test_the_card_tells_apart_what_was_asked_with_other_settings(hub, adapter, tmp_path):
    base, own = results_of(tmp_path, None, "base"), results_of(tmp_path, adapter_sha256(adapter))
    base.write_text(base.read_text().replace('"seed": 7', '"seed": 8'))
    again = results_of(tmp_path, adapter_sha256(adapter), "16-bit", 0.5)
    push_folder(adapter, REPO, results=[base, own, again])
    card = ModelCard(files(hub)["README.md"].decode())
    assert "base, at each length: recall 40 questions; seed 8; CPU.\n" in card.content
    assert "CREAM, 16-bit, at each length: recall 40 questions; seed 7; CPU.\n" in card.content
    measured = {(result.dataset_config, result.metric_value) for result in card.data.eval_results}
    assert {("256 tokens, CREAM", 0.75), ("256 tokens, 16-bit", 0.5)} <= measured


def test_the_card_says_in_which_options_the_models_were_asked_differently(hub, adapter, tmp_path):
    def told(**of_base):
        base, own = results_of(tmp_path, None, "base"), results_of(tmp_path, adapter_sha256(adapter))
        for path, options in ((base, of_base), (own, {"style": "chat", "haystack_sha256": "b" * 64})):
            content = json.loads(path.read_text())
            content["settings"] |= {"options": {"recall": options}, "load_in_4bit": True}
            path.write_text(json.dumps(content))
        push_folder(adapter, REPO, results=[base, own])
        return files(hub)["README.md"].decode()

    assert "At each length: recall 40 questions; seed 7; CPU.\n" in told(style="chat", haystack_sha256="b" * 64)
    card = told(haystack_sha256="a" * 64)
    for label, said in (("base", f"haystack_sha256 {'a' * 16}; recall style default."),
                        ("CREAM", f"haystack_sha256 {'b' * 16}; recall style chat.")):  # fmt: skip
        assert f"{label}, at each length: recall 40 questions; seed 7; CPU; recall {said}\n" in card


@pytest.mark.parametrize("measured, said", [(True, None), (False, "CREAM: measured with an unquantized base, and")])
def test_the_card_says_where_the_figures_are_of_a_base_in_other_bits(hub, adapter, tmp_path, measured, said):
    own = results_of(tmp_path, adapter_sha256(adapter))
    content = json.loads(own.read_text())
    content["settings"]["load_in_4bit"] = measured
    own.write_text(json.dumps(content))
    push_folder(adapter, REPO, results=[own])
    card = files(hub)["README.md"].decode()
    assert (f"\n{said} trained on a 4-bit one.\n" in card) if said else "measured with" not in card


def test_the_card_of_the_embedded_model_has_words_that_its_tokenizer_knows(adapter, tiny_tokenizer):
    text = re.search(r'tokenizer\("(.*?)"', (adapter / "README.md").read_text())[1]
    assert len(tiny_tokenizer(text).input_ids) == 3


def test_the_card_of_a_further_training_has_the_stages_before_it(hub, adapter):
    earlier = Record.read(adapter, "").as_stage()
    change(adapter, stages=[earlier, earlier | {"position_strategy": "pose", "steps": 7}])
    push_folder(adapter, REPO)
    said = "trained 2 steps for 2048 tokens with cream positions, then 7 steps for 2048 tokens with pose positions; the"
    assert said in files(hub)["README.md"].decode()


@pytest.mark.parametrize("merged", [False, True])
def test_with_merged_both_cards_have_what_was_measured(hub, adapter, tmp_path, merged):
    results = results_of(tmp_path, adapter_sha256(adapter))
    push = ["push", "--adapter", str(adapter), "--repo", REPO, "--results", str(results), "--with-merged"]
    assert cli.main(push) == 0
    card = files(hub, REPO + "-merged" * merged)["README.md"].decode()
    assert "At each length: recall 40 questions; seed 7; CPU." in card and "Nothing was measured" not in card


@pytest.mark.parametrize(
    "field, value",
    [
        ("modules_to_save", ["norm"]),
        ("use_dora", True),
        ("alpha_pattern", {"0.self_attn.q_proj": 256}),
        ("rank_pattern", {"0.self_attn.q_proj": 4}),
    ],
)
def test_what_vllm_does_not_take_as_an_adapter_is_served_merged(adapter, field, value):
    record = Record("owner/base", pretrained_window=256, target_length=2048, rope_scaling_type="linear")
    assert "--enable-lora --max-lora-rank" in vllm_command(adapter, record, REPO)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    told = vllm_command(adapter, record, REPO)
    assert f"no adapter with {field}" in told and told.endswith("vllm serve merged --max-model-len 2048")


def test_results_of_another_training_do_not_speak_for_this_adapter(hub, adapter, tmp_path):
    with pytest.raises(PushError, match="none of the results was measured on the adapter"):
        push_folder(adapter, REPO, results=[results_of(tmp_path, "0" * 64)])
    (tmp_path / "other").mkdir()
    same_label = [results_of(tmp_path, adapter_sha256(adapter)), results_of(tmp_path / "other", "0" * 64)]
    with pytest.raises(PushError, match="two results have the label 'CREAM'"):
        push_folder(adapter, REPO, results=same_label)
    same_file = [results_of(tmp_path, adapter_sha256(adapter), label) for label in ("at 4K", "at-4K")]
    with pytest.raises(PushError, match="the label 'at-4K', or one file for it"):
        push_folder(adapter, REPO, results=same_file)
    # Beside its own it is a comparison: in the table, not in the metadata.
    push_folder(adapter, REPO, results=[same_label[0], results_of(tmp_path, "0" * 64, "PoSE", 0.5)])
    card = ModelCard(files(hub)["README.md"].decode())
    assert "| PoSE | 0.50 | 0.50 |" in card.content
    assert {result.metric_value for result in card.data.eval_results} == {0.75}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "cream.json"])
def test_a_damaged_adapter_is_not_published(hub, adapter, name):
    content = (adapter / name).read_bytes()
    (adapter / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(AdapterError, match=f"{name} of .* is missing or damaged"):
        push_folder(adapter, REPO)
    assert not hub.repositories


def test_other_weights_under_the_same_hub_id_are_refused_and_a_cached_base_is_measured_offline(
    hub, tmp_path, monkeypatch, capsys
):
    def evaluate(*lengths):
        options = ["--compare", "b=org/base", "--tasks", "recall", "--samples", "1", "--lengths", *lengths]
        return cli.main(["evaluate", *options, "--output_dir", str(tmp_path / "e")])

    api = HfApi()
    api.create_repo("org/base")
    first = api.upload_folder(repo_id="org/base", folder_path=base_folder()).oid
    assert evaluate("256") == 0
    found = Results.read(tmp_path / "e/b.json")
    assert found.settings.base_revision == first and found.adapter is None
    with monkeypatch.context() as patched:
        patched.setattr(constants, "HF_HUB_OFFLINE", True)
        assert evaluate("384") == 0
    weights = load_file(base_folder() / "model.safetensors")
    save_file({name: weight * 2 for name, weight in weights.items()}, tmp_path / "other.safetensors")
    other = tmp_path / "other.safetensors"
    api.upload_file(path_or_fileobj=other, path_in_repo="model.safetensors", repo_id="org/base")
    assert evaluate("512") == 2
    assert "was measured with other settings, base_revision" in capsys.readouterr().err
    assert {cell.length for cell in Results.read(tmp_path / "e/b.json").cells} == {256, 384}


def test_a_merged_model_and_an_adapter_do_not_share_a_repository(hub, adapter, tmp_path):
    merge_adapter(adapter, tmp_path / "merged")
    push_folder(adapter, REPO)
    with pytest.raises(PushError, match="holds the other kind"):
        push_folder(tmp_path / "merged", REPO)
    assert set(files(hub)) == COMPLETE | {".gitattributes"}
    push_folder(tmp_path / "merged", f"{REPO}-merged")
    sent = files(hub, f"{REPO}-merged")
    assert {"config.json", "model.safetensors", "cream.json", "README.md", "tokenizer.json"} <= set(sent)
    assert b"A merged model" in sent["README.md"]
    # By its id it is what it is by its folder; of its weights, which are not downloaded, the files are looked for.
    here, there = (open_models([f"m={name}"])[0] for name in (tmp_path / "merged", f"{REPO}-merged"))
    assert there.settings == here.settings and there.settings.adapter_sha256 == adapter_sha256(adapter)
    verdicts = {one.item: one.verdict for one in check_adapter(f"{REPO}-merged")}
    assert verdicts["weights"] == "not read" and not {"wrong", "trap"} & set(verdicts.values())
    HfApi().delete_file("model.safetensors", f"{REPO}-merged")
    assert [one.found for one in check_adapter(f"{REPO}-merged") if one.verdict == "wrong"] == [
        "model.safetensors is not there: publish the model again"
    ]
    (tmp_path / "merged" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(AdapterError, match=r"model.safetensors of .* is missing or damaged"):
        push_folder(tmp_path / "merged", f"{REPO}-merged")


def test_the_command_prints_the_line_that_names_the_repository_and_the_remedy(hub, adapter, capsys):
    for status, said in ((401, "does not accept the token for someone/adapter"), (403, "may not write"), (503, "503")):
        hub.fail("create", status, times=None)
        assert cli.main(["push", "--adapter", str(adapter), "--repo", REPO]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("error: ") and said in line and REPO in line
        hub.recover()
    assert cli.main(["push", "--adapter", str(adapter), "--repo", "adapter"]) == 2
    assert "'adapter' is not a Hub id: write user/name" in capsys.readouterr().err
    assert cli.main(["push", "--adapter", str(adapter), "--repo", REPO, "--with-merged"]) == 0
    assert capsys.readouterr().out.count("Published: ") == 2 and set(hub.repositories) == {
        f"models/{REPO}", f"models/{REPO}-merged",
    }  # fmt: skip


def test_the_card_takes_licence_base_and_data_from_the_recipe(hub, adapter):
    recipe = {"dataset_name": "owner/documents"}
    changes = {"base_model": "meta-llama/Llama-2-7b-hf", "license": "llama2", "recipe": recipe}
    change(adapter, **changes)
    push_folder(adapter, REPO)
    data = ModelCard(files(hub)["README.md"].decode()).data
    assert (data.base_model, data.license, data.datasets) == ("meta-llama/Llama-2-7b-hf", "llama2", ["owner/documents"])
    # Without one in the recipe it is the base's own, read from its card.
    card = Repository({"README.md": files(hub)["README.md"]}).files
    base = Repository.of_folder(base_folder()).files
    hub.repositories["models/meta-llama/Llama-2-7b-hf"] = Repository({**base, **card})
    change(adapter, **changes | {"license": None})
    push_folder(adapter, "someone/other")
    assert ModelCard(files(hub, "someone/other")["README.md"].decode()).data.license == "llama2"


def is_published(hub, adapter, call, fault, times):
    """Whether a push gets through, after making sure that nothing is lost, half-published or sent twice for nothing."""
    hub.repositories.clear()
    hub.received.clear()
    hub.fail(call, fault, times)
    published = True
    try:
        push_folder(adapter, REPO)
    except PushError as error:
        published = False
        assert REPO in str(error) and "\n" not in str(error) and len(str(error)) < 250
        # "lost": the commit was made, and only the answer is missing.
        assert set(files(hub)) in (set(), {".gitattributes"}, COMPLETE | {".gitattributes"})
    hub.recover()
    push_folder(adapter, REPO)
    assert set(files(hub)) == COMPLETE | {".gitattributes"}
    assert len(hub.repositories[f"models/{REPO}"].commits) == 2
    # Only a large file whose receipt was lost is sent again, by the client itself.
    assert hub.received[adapter_sha256(adapter)] == 1 or (call, fault) == ("put", "lost")
    return published


@pytest.mark.parametrize("call", CALLS)
def test_after_a_passing_fault_of_any_call_a_push_gets_through(hub, adapter, call):
    assert all(is_published(hub, adapter, call, fault, 1) for fault in (503, "lost"))


@pytest.mark.slow
def test_after_every_fault_a_push_gets_through_or_says_why_in_one_line_and_the_next_completes_it(hub, adapter):
    lines = ["| call | once: published | once: one line | for ever: published | for ever: one line |", "|---" * 5 + "|"]
    for call in CALLS:
        cells = []
        for times in (1, None):
            came_through = {fault: is_published(hub, adapter, call, fault, times) for fault in FAULTS}
            for wanted in (True, False):
                cells.append(", ".join(str(fault) for fault, published in came_through.items() if published == wanted))
        lines.append(f"| {call} | " + " | ".join(cell or "none" for cell in cells) + " |")
    table = "\n".join(lines)
    assert table in (Path(__file__).parent / "README.md").read_text(), f"tests/README.md should say\n{table}"


def test_with_xet_on_the_client_asks_for_xet_and_the_remedy_is_named(hub, adapter, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(PushError, match="HF_HUB_DISABLE_XET=1"):
        push_folder(adapter, REPO)
    assert any("xet-write-token" in request for request in hub.requests)
    assert not any("lfs" in request for request in hub.requests)
    assert set(files(hub)) == {".gitattributes"}


def train_and_push(folder, *extra):
    arguments = ["--output_dir", str(folder), "--max_steps", "4", "--save_steps", "2", "--push_to_hub", "true"]
    arguments += ["--max_documents", "64"]
    return run_recipe(parse_recipe([*arguments, "--hub_model_id", REPO, "--hub_token", "hf_test_token", *extra]))


@pytest.mark.parametrize(
    ("strategy", "commits", "below"),
    [("end", 1, set()), ("every_save", 3, set()), ("checkpoint", 3, {"last-checkpoint"}),
     ("all_checkpoints", 3, {"checkpoint-2", "checkpoint-4"})],
)  # fmt: skip
def test_every_hub_strategy_keeps_the_root_complete(hub, tmp_path, strategy, commits, below):
    train_and_push(tmp_path / "run", "--hub_strategy", strategy)
    repository = hub.repositories[f"models/{REPO}"]
    _, *ours = repository.commits.values()
    assert 1 <= len(ours) <= commits
    for commit in ours:
        assert set(commit.files) >= COMPLETE and not any("training_args" in name for name in commit.files)
    assert {name.split("/")[0] for name in files(hub) if "checkpoint" in name} == below
    for secret in (hub.token, str(tmp_path), str(Path.home()) + "/"):
        assert not hub.carrying(secret)
    assert f'load_adapter("{REPO}")' in files(hub)["README.md"].decode()


def test_all_that_fsdp_and_deepspeed_resume_from_goes_along(tmp_path):
    wanted = {"pytorch_model_fsdp.bin", "pytorch_model_fsdp_0/__0_0.distcp", "optimizer.bin", "optimizer_0/.metadata"}
    wanted |= {"global_step4/zero_pp_rank_0_optim_states.pt", "zero_to_fp32.py", "rng_state_1.pth", "latest"}
    for name in wanted | {"training_args.bin", "events.out"}:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert set(files_in(tmp_path, RESUMED_FROM)) == wanted


def test_training_goes_on_from_the_checkpoint_on_the_hub(hub, tmp_path):
    train_and_push(tmp_path / "whole", "--save_steps", "2")
    train_and_push(tmp_path / "half", "--hub_strategy", "checkpoint", "--save_steps", "2", "--save_total_limit", "1")
    # As after a kill: only what the Hub had after step 2 is left.
    commits = hub.repositories[f"models/{REPO}"].commits.values()
    earlier = next(commit for commit in commits if "last-checkpoint/trainer_state.json" in commit.files)
    assert earlier.message.endswith("step 2")
    for name, content in earlier.files.items():
        if name.startswith("last-checkpoint/"):
            path = tmp_path / "pulled" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    checkpoint = str(tmp_path / "pulled" / "last-checkpoint")
    train_and_push(tmp_path / "resumed", "--resume_from_checkpoint", checkpoint)
    assert adapter_sha256(tmp_path / "resumed") == adapter_sha256(tmp_path / "whole")


def test_a_failed_push_of_a_checkpoint_does_not_stop_training_and_the_last_one_completes(hub, tmp_path, caplog):
    caplog.set_level("WARNING", logger="cream_peft")
    hub.fail("commit", 503, times=3)  # as often as one push tries
    train_and_push(tmp_path / "run", "--hub_strategy", "every_save")
    assert "step 2 was not published: the Hub answers 503" in caplog.text
    assert set(files(hub)) >= COMPLETE


def test_a_failed_last_push_says_where_the_adapter_is_and_how_to_publish_it(hub, tmp_path):
    hub.fail("commit", 403, times=None)
    with pytest.raises(PushError) as caught:
        train_and_push(tmp_path / "run")
    said = str(caught.value)
    assert f"the adapter is saved in {tmp_path / 'run'}" in said
    assert f"`cream-peft push --adapter {tmp_path / 'run'} --repo {REPO}`" in said
    hub.recover()
    push_folder(tmp_path / "run", REPO)
    assert set(files(hub)) >= COMPLETE


def test_what_could_not_be_published_is_not_trained(hub, tmp_path, monkeypatch):
    local = Path(shutil.copytree(base_folder(), tmp_path / "my-base"))
    with pytest.raises(PushError, match="push_to_hub with a local base, 'my-base'"):
        train_and_push(tmp_path / "run", "--model_name_or_path", str(local), "--dataset_name", "cream-peft-tiny")
    hub.fail("create", 403, times=None)
    with pytest.raises(PushError, match=r"may not write to someone/adapter \(403\)"):
        train_and_push(tmp_path / "run")
    assert not (tmp_path / "run" / "cream.json").exists()


def test_a_folder_right_below_the_root_is_a_path_and_a_word_with_a_slash_is_not(tmp_path):
    root = Path(*tmp_path.parts[:2])
    assert public_name(str(root)) == root.name and public_name(str(tmp_path / "x")) == "x"
    assert [public_name(text) for text in ("/no_think", "/", "user/name")] == ["/no_think", "/", "user/name"]


def test_only_the_creation_takes_a_key_error_for_a_busy_repository(monkeypatch):
    def lose(*_, **__):
        raise KeyError("url")

    monkeypatch.setattr("cream_peft.publish.push.RETRY_AFTER", ())
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lose)
    with pytest.raises(PushError, match=r"being changed by another operation \(409\)"):
        create_repository("user/name", token="hf_x")
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: type("Url", (), {"repo_id": "user/name"}))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lose)
    with pytest.raises(KeyError):
        create_repository("user/name", private=True, token="hf_x")


def test_a_push_deletes_what_an_earlier_one_left_and_nothing_of_anybody_else(hub, adapter, tmp_path):
    mine = ("LICENSE", "images/a.png", "results/notes.json", "results/a.png", "a/vocab.json", "tokenizer.bak")
    old = (
        "chat_template.jinja",
        "additional_chat_templates/rag.jinja",
        "vocab.txt",
        "model-00001-of-00002.safetensors",
    )
    push_folder(adapter, REPO, results=[results_of(tmp_path, adapter_sha256(adapter))])
    assert {"results/CREAM.json", "results/recall.png"} <= set(files(hub))
    hub.repositories[f"models/{REPO}"] = Repository(files(hub) | dict.fromkeys((*mine, *old), b"mine"))
    push_folder(adapter, REPO)
    assert set(files(hub)) == COMPLETE | {".gitattributes", *mine}
    assert len(hub.repositories[f"models/{REPO}"].commits) == 2


def test_a_model_that_somebody_else_published_is_not_deleted(hub, adapter, capsys):
    there = {"model.safetensors": b"theirs", "README.md": b"Their card."}
    hub.repositories[f"models/{REPO}"] = Repository(there)
    assert cli.main(["push", "--adapter", str(adapter), "--repo", REPO]) == 2
    said = "someone/adapter holds model.safetensors, which cream-peft did not publish: choose another"
    assert said in capsys.readouterr().err and files(hub) == there


def test_a_merge_in_one_file_and_then_in_shards_is_loaded_as_the_second(hub, adapter, tmp_path):
    merged = tmp_path / "merged"
    merge_adapter(adapter, merged, dtype="float16")
    push_folder(merged, REPO)
    merge_adapter(adapter, merged, max_shard_size="500KB")
    hub.fail("commit", "lost")
    push_folder(merged, REPO)
    local = {path.name for path in merged.iterdir()}
    assert set(files(hub)) == local | {".gitattributes"} and "model.safetensors" not in local
    merge_adapter(adapter, merged)
    push_folder(merged, REPO)
    assert set(files(hub)) == {path.name for path in merged.iterdir()} | {".gitattributes"}


def test_what_an_old_checkpoint_left_below_its_folder_is_deleted(hub, adapter):
    for name in ("rng_state.pth", "rng_state_1.pth"):
        (adapter / name).write_bytes(b"state")
    push_folder(adapter, REPO, checkpoint_in_repo="last-checkpoint")
    (adapter / "rng_state_1.pth").unlink()
    hub.repositories[f"models/{REPO}"] = Repository(files(hub) | {"last-checkpoint/old": b"", "checkpoint-2/old": b""})
    push_folder(adapter, REPO, checkpoint_in_repo="last-checkpoint")
    below = {name for name in files(hub) if "checkpoint" in name}
    complete = {f"last-checkpoint/{name}" for name in COMPLETE - {"README.md"} | {"rng_state.pth"}}
    assert below == complete | {"checkpoint-2/old"}


def test_a_change_on_the_hub_in_the_middle_of_a_push_is_seen(hub, adapter, monkeypatch):
    push_folder(adapter, REPO)
    change(adapter, seed=99)
    post, repository = HfApi.preupload_lfs_files, hub.repositories[f"models/{REPO}"]

    def change_on_the_hub(*arguments, **keywords):
        monkeypatch.setattr(HfApi, "preupload_lfs_files", post)
        repository._add("main", files(hub) | {"vocab.txt": b"late"}, "of somebody else")
        return post(*arguments, **keywords)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", change_on_the_hub)
    push_folder(adapter, REPO)
    assert "vocab.txt" not in files(hub) and b'"seed": 99' in files(hub)["cream.json"]


@pytest.mark.parametrize(
    ("name", "is_folder"), [("chat_template.jinja", False), ("tokenizer_config.json", False), ("base_config", True)]
)
def test_a_link_out_of_the_folder_is_refused(hub, adapter, tmp_path, name, is_folder):
    (tmp_path / "id_rsa").write_text('{"mine": 1}')
    secret = (
        Path(shutil.copytree(adapter / "base_config", tmp_path / "elsewhere")) if is_folder else tmp_path / "id_rsa"
    )
    if is_folder:
        shutil.rmtree(adapter / name)
    (adapter / name).unlink(missing_ok=True) if not is_folder else None
    (adapter / name).symlink_to(secret)
    with pytest.raises(PushError, match=f"{name} of .* is a link to {secret}: put the file or folder itself"):
        push_folder(adapter, REPO)
    assert not hub.repositories


def test_weights_on_another_disk_and_a_snapshot_of_the_cache_are_published(hub, adapter, tmp_path):
    snapshot = tmp_path / "cache" / "snapshots" / "abc"
    (tmp_path / "cache" / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in adapter.rglob("*") if path.is_file())):
        (snapshot / path.relative_to(adapter)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "cache" / "blobs" / str(number))
        (snapshot / path.relative_to(adapter)).symlink_to(tmp_path / "cache" / "blobs" / str(number))
    push_folder(snapshot, REPO)
    assert set(files(hub)) == COMPLETE | {".gitattributes"}
    weights = (adapter / "adapter_model.safetensors").rename(tmp_path / "weights.safetensors")
    (adapter / "adapter_model.safetensors").symlink_to(weights)
    push_folder(adapter, "someone/other")
    assert files(hub, "someone/other")["adapter_model.safetensors"] == weights.read_bytes()


def test_only_known_names_at_their_places_are_published(hub, adapter, tmp_path):
    extra = [
        "tokenizer_more/.env",
        "checkpoint-9/chat_template.jinja",
        "x.jinja",
        "tokenizer.bak",
        "base_config/b.json",
    ]
    for name in [*extra, "results/deep/a.json", "results/customers.json", "results/a.png", "modelx.safetensors.txt"]:
        (adapter / name).parent.mkdir(parents=True, exist_ok=True)
        (adapter / name).write_text("{}")
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    push_folder(adapter, REPO, checkpoint_in_repo="last-checkpoint")
    root = COMPLETE | {"chat_template.jinja"}
    below = {f"last-checkpoint/{name}" for name in root - {"README.md"}}
    assert set(files(hub)) == root | below | {".gitattributes"}


SECRETS = ["hf_" + "aB3" * 11, "sk-" + "a" * 48, "sk-proj-" + "a_B-" * 9, "sk-ant-api03-" + "x" * 30]
SECRETS += ["ghp_" + "a1" * 18]
SECRETS += ["github_pat_" + "a_" * 20, "AKIA" + "Z" * 16, "xoxb-1234567890-abc", "glpat-" + "a-b_c" * 4]
SECRETS += ["-----BEGIN OPENSSH PRIVATE KEY-----", "file://{here}/x", "{here}/gone.jsonl", "/h\u00f6me/user/x"]


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_in_any_text_file_is_not_published(adapter, secret, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/h\u00f6me/user")
    secret = secret.format(here=tmp_path)
    for name in ("tokenizer_config.json", "chat_template.jinja", "cream.json"):
        for content in (json.dumps({"note": f"see {secret}"}), f'{{"note": "see {secret}"}}'):
            assert find_secret(name, content.encode(), None, adapter), content
    if not secret.startswith(("/", "file")):
        assert find_secret("tokenizer.json", json.dumps({secret: 1}).encode(), None, adapter)


def test_what_only_looks_like_a_secret_is_published(adapter, monkeypatch):
    monkeypatch.setenv("HOME", "/root")
    vocabulary = [
        "/root/",
        "/root",
        "sk-",
        "sk-learn",
        "hf_",
        "AKIA",
        "/usr/bin/",
        "ghp_",
        "xoxb-",
        "-----BEGIN",
        "/home/",
    ]
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        content = json.dumps({"vocab": dict.fromkeys(vocabulary, 1), "merges": [f"{a} {a}" for a in vocabulary]})
        assert find_secret(name, content.encode(), "hf_mine", adapter) is None
        assert find_secret(name, content.replace("/usr/bin", f"{Path.home()}/me/x").encode(), None, adapter)  # control
    for file in base_folder().iterdir():
        content = file.read_bytes() if file.suffix == ".json" else b""
        assert find_secret(file.name, content, "hf_mine", adapter) is None
    for text in ("https://huggingface.co/tmp/x", "hf_hub_download_the_whole_repository", "#!/usr/bin/env", "a/tmp/b"):
        assert find_secret("chat_template.jinja", text.encode(), None, adapter) is None


def test_a_token_in_the_head_of_the_weights_is_found(hub, adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(weights, adapter / "adapter_model.safetensors", {"note": hub.token})
    change(adapter, adapter_sha256=adapter_sha256(adapter))
    with pytest.raises(PushError, match=r"adapter_model.safetensors of .* holds your token: remove it"):
        push_folder(adapter, REPO)
    assert not hub.repositories


@pytest.mark.parametrize(
    ("value", "said"), [(0.0, "adapter weights: lora_B is zero"), (float("nan"), "adapter weights: .* not finite")]
)
def test_an_adapter_that_never_trained_or_is_damaged_is_neither_pushed_nor_merged(hub, adapter, tmp_path, value, said):
    weights = load_file(adapter / "adapter_model.safetensors")
    for name in weights:
        if "lora_B" in name:
            weights[name].fill_(value)
    save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(PushError, match=f"is not published, it is not right: {said}"):
        push_folder(adapter, REPO)
    with pytest.raises(MergeError, match=f"cannot be merged: {said.split(': ')[1]}"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not hub.repositories and not (tmp_path / "merged").exists()


def test_an_adapter_of_another_base_is_not_published_and_one_of_an_unreadable_base_is(hub, adapter, caplog):
    config = json.loads((base_folder() / "config.json").read_text()) | {"hidden_size": 4096}
    hub.repositories["models/owner/base"] = Repository({"config.json": json.dumps(config).encode()})
    change(adapter, base_model="owner/base")
    with pytest.raises(AdapterError, match="owner/base is not the base this adapter was trained on: its hidden_size"):
        push_folder(adapter, REPO)
    assert f"models/{REPO}" not in hub.repositories
    hub.repositories["models/owner/gated"] = Repository(refusal=(403, "GatedRepo", "Access is restricted"))
    change(adapter, base_model="owner/gated")
    push_folder(adapter, REPO)
    assert "is not held against its base: owner/gated is gated" in caplog.text and set(files(hub)) >= COMPLETE
    # What needs no base is checked all the same.
    tokenizer = (adapter / "tokenizer.json").read_text()
    (adapter / "tokenizer.json").write_text("{}")
    with pytest.raises(PushError, match="it is not right: tokenizer:"):
        push_folder(adapter, REPO)
    (adapter / "tokenizer.json").write_text(tokenizer)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(PushError, match=r"cream.json: was written for other weights"):
        push_folder(adapter, REPO)
    save_file({name: 0 * value for name, value in weights.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(PushError, match="lora_B is zero"):
        push_folder(adapter, REPO)
    save_file({name: value[:1] for name, value in weights.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="has another shape"):
        push_folder(adapter, REPO)


def test_a_tokenizer_of_any_kind_of_files_comes_back_as_it_was_sent(hub, adapter):
    (adapter / "tokenizer.json").unlink()
    letters = {chr(number): number - 32 for number in range(33, 127)} | {"hi": 95}
    (adapter / "vocab.json").write_text(json.dumps(letters))
    (adapter / "merges.txt").write_text("#version: 0.2\nh i\n")
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "!"}
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings))
    push_folder(adapter, REPO)
    sent, back = (load_adapter(where, load_in_4bit=False)[1] for where in (adapter, REPO))
    assert back("hi").input_ids == sent("hi").input_ids != []


def test_a_merged_model_with_another_window_is_not_published(hub, adapter, tmp_path):
    merge_adapter(adapter, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    (tmp_path / "merged" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    with pytest.raises(PushError, match=r"it is not right: RoPE: .* is not that of the merge"):
        push_folder(tmp_path / "merged", REPO)
    assert not hub.repositories


def test_a_licence_that_is_none_of_the_hubs_is_refused_before_anything_is_trained_or_sent(
    hub, adapter, tmp_path, capsys
):
    assert {"llama2", "apache-2.0", "gemma", "openrail++", "other"} <= set(LICENSES) and len(LICENSES) == 83
    said = "license='Apache 2.0' is none of the Hub's names"
    with pytest.raises(RecipeError, match=f"{said} .*: did you mean 'apache-2.0'"):
        parse_recipe(["--license", "Apache 2.0"])
    push = ["push", "--adapter", str(adapter), "--repo", REPO]
    assert cli.main([*push, "--license", "Apache 2.0"]) == 2 and said in capsys.readouterr().err
    change(adapter, license="Apache 2.0")  # trained before
    assert cli.main(push) == 2 and said in capsys.readouterr().err and not hub.repositories
    assert cli.main([*push, "--license", "mit"]) == 0
    assert ModelCard(files(hub)["README.md"].decode()).data.license == "mit"


def test_a_card_that_the_hub_refuses_is_not_trained_for(hub, tmp_path, monkeypatch):
    # As if the Hub no longer knew it.
    monkeypatch.setattr("hub_protocol.LICENSES", ["mit"] * 100)
    wanted = r"the Hub refuses the card of someone/adapter: \"license\" must be one of \[\.\.\.\]: mend license$"
    with pytest.raises(PushError, match=wanted):
        train_and_push(tmp_path / "run", "--license", "llama4")
    assert not hub.repositories and not (tmp_path / "run" / "cream.json").exists()


def test_a_card_that_the_hub_begins_to_refuse_does_not_stop_training(hub, tmp_path, caplog, monkeypatch):
    def begin(*arguments, **keywords):
        monkeypatch.setattr("hub_protocol.LICENSES", ["mit"] * 100)
        return create_repository(*arguments, **keywords)

    monkeypatch.setattr("cream_peft.publish.push.create_repository", begin)
    with pytest.raises(PushError, match=r"the adapter is saved in .* the Hub refuses the card .*license"):
        train_and_push(tmp_path / "run", "--hub_strategy", "every_save")
    assert 'step 2 was not published: the Hub refuses the card of someone/adapter: "license" must be' in caplog.text
    assert (tmp_path / "run" / "cream.json").exists()


NOTE, BELOW = f"> A note of **mine** with {{{{ braces }}}} on {Path.home()}/x.", "## Thanks\n\nTo you.\n\n- one"


def written_on(card):
    """The card with what a person writes on it, on the Hub's page."""
    head, text = card.split("---\n\n", 1)
    head = head.replace("tags:\n", "language: de\nextra_gated_prompt: Be nice\ntags:\n- mine\n")
    return f"{head}---\n\n{NOTE}\n\n{text}\n\n{BELOW}\n"


def test_what_a_person_wrote_on_the_card_stays_and_ours_is_new(hub, adapter):
    push_folder(adapter, REPO)
    edited = written_on(files(hub)["README.md"].decode())
    hub.repositories[f"models/{REPO}"] = Repository(files(hub) | {"README.md": edited.replace("\n", "\r\n").encode()})
    change(adapter, seed=99)
    push_folder(adapter, REPO)
    push_folder(adapter, REPO)
    text = files(hub)["README.md"].decode()
    card = ModelCard(text)
    assert text.count(NOTE) == text.count(BELOW) == text.count("seed 99") == 1 and "seed 0," not in text
    assert text.index(NOTE) < text.index("# adapter") < text.index(BELOW)
    assert card.data.language == "de" and card.data.extra_gated_prompt == "Be nice"
    assert card.data.tags.count("mine") == card.data.tags.count("lora") == 1
    assert len(hub.repositories[f"models/{REPO}"].commits) == 2  # the third push had nothing new


def test_what_a_person_wrote_in_the_folder_stays_through_training_and_push(hub, tmp_path):
    folder = tmp_path / "run"
    train_and_push(folder, "--license", "mit")
    (folder / "README.md").write_text(written_on((folder / "README.md").read_text()).replace(str(Path.home()), "my"))
    train_and_push(folder, "--seed", "99")
    saved = [(path / "README.md").read_text() for path in (folder, folder / "checkpoint-2")]
    for text in (*saved, files(hub)["README.md"].decode()):
        text = text.replace("my/x", f"{Path.home()}/x")
        assert text.count(NOTE) == text.count(BELOW) == text.count("seed 99") == 1 and "seed 0," not in text
        assert text.count("# cream-peft-tiny") + text.count("# adapter") == 1 and "PEFT 0" not in text


def test_a_card_that_somebody_else_wrote_is_kept_below_ours_and_one_of_ours_without_marks_is_not(hub, adapter, caplog):
    caplog.set_level("INFO", logger="cream_peft")
    hub.repositories[f"models/{REPO}"] = Repository({"README.md": b"---\nlicense: mit\n---\nMy own card.\n"})
    marked = (adapter / "README.md").read_text()
    (adapter / "README.md").write_text(re.sub("<!--.*?-->", "", marked) + "\n\nA line of mine.\n")
    push_folder(adapter, REPO)
    sent = files(hub)["README.md"].decode()
    assert sent.endswith("<!-- cream-peft: end -->\n\nMy own card.\n\nA line of mine.")
    assert sent.count("## Load it") == 1 and sent.count("license:") == 2  # in the head, and in the recipe
    assert f"README.md of {REPO} was not written by cream-peft: its text stays, below ours" in caplog.text
    (adapter / "README.md").write_text("---\nlicense: mit\n: {\n---\n\nBroken.\n")
    push_folder(adapter, REPO)
    assert files(hub)["README.md"].decode() == f"{sent}\n\nBroken."


def test_the_card_has_the_tags_of_trl_the_relation_to_its_base_and_the_space_of_its_curves(hub, adapter, tmp_path):
    base = "owner/base"
    hub.repositories[f"models/{base}"] = Repository.of_folder(base_folder())
    recipe = {"report_to": ["trackio"], "trackio_space_id": "someone/curves"}
    change(adapter, base_model=base, recipe=recipe)
    push_folder(adapter, REPO)
    card = ModelCard(files(hub)["README.md"].decode())
    wanted = {"trl", "sft", "transformers", "lora", f"base_model:adapter:{base}", "trackio"}
    assert wanted | {"trackio:https://huggingface.co/spaces/someone/curves"} <= set(card.data.tags)
    assert (card.data.base_model, card.data.base_model_relation) == (base, "adapter")
    assert "Its curves: [Trackio](https://huggingface.co/spaces/someone/curves)." in card.text
    change(adapter, recipe=recipe | {"report_to": []})
    push_folder(adapter, REPO)
    assert b"rackio]" not in files(hub)["README.md"] and b"trackio:" not in files(hub)["README.md"]
    merge_adapter(adapter, tmp_path / "merged")
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert f"base_model:finetune:{base}" in card.data.tags and "lora" not in card.data.tags
    change(adapter, base_is_local=True)
    assert metadata(Record.read(adapter, "")).base_model_relation is None


def test_a_model_whose_every_weight_was_trained_is_published_as_a_model(
    hub, make_model, make_documents, make_config, tmp_path, tiny_tokenizer
):
    trainer = CREAMTrainer(
        model=load_base(TINY_ID, load_in_4bit=False), args=make_config(context_length=256, target_length=2048),
        train_dataset=make_documents(), processing_class=tiny_tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    push_folder(tmp_path / "run", REPO)
    found = files(hub)
    assert {"config.json", "model.safetensors", "cream.json", "README.md"} <= set(found)
    assert "base_config/config.json" not in found and "adapter_config.json" not in found
    card = found["README.md"].decode()
    assert "A fully trained model that extends cream-peft-tiny" in card and "lora" not in card.split("---")[1]


@pytest.mark.slow
def test_a_push_killed_at_random_moments_shows_nothing_half_and_is_completed_by_the_next(hub, adapter):
    path, weights = adapter / "adapter_model.safetensors", load_file(adapter / "adapter_model.safetensors")

    def change_all(seed):
        save_file({name: tensor * (1 + seed) for name, tensor in weights.items()}, path, {"format": "pt"})
        change(adapter, seed=seed, adapter_sha256=adapter_sha256(adapter))
        (adapter / f"rng_state_{seed}.pth").write_bytes(b"state")
        (adapter / f"rng_state_{seed - 1}.pth").unlink(missing_ok=True)
        return adapter_sha256(adapter), seed, {f"rng_state_{seed}.pth"}

    def shown():
        """The weights, the seed of the record and the states, both in the root and below."""
        sent, below = files(hub), "last-checkpoint/"
        assert sent[path.name] == sent[below + path.name] and sent["cream.json"] == sent[f"{below}cream.json"]
        states = {name.removeprefix(below) for name in sent if "rng_state" in name}
        return sha256(sent[path.name]).hexdigest(), json.loads(sent["cream.json"])["seed"], states

    def work():
        push_folder(adapter, REPO, checkpoint_in_repo="last-checkpoint")

    earlier, moments, kills = change_all(0), random.Random(8), 0
    assert not killed(work, lambda: False) and shown() == earlier  # in a child too: the client keeps its connections
    for seed in range(1, 6):
        last = len(hub.requests) + moments.randint(1, 12)
        wanted = change_all(seed)
        kills += killed(work, lambda last=last: len(hub.requests) >= last)
        assert shown() in (earlier, wanted)
        assert not killed(work, lambda: False) and shown() == wanted
        earlier = wanted
    assert kills >= 3 and len(hub.repositories[f"models/{REPO}"].commits) == 7
