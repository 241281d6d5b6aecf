"""A downloaded adapter may hold anything. What is wrong in it is one line, of the one function that opens it."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cream_peft import cli, load_adapter
from cream_peft.chat import ChatSettings, load_chat
from cream_peft.evals.models import open_models
from cream_peft.evals.results import Results
from cream_peft.model import base, misfit, tokenizer
from cream_peft.model.adapter import open_adapter
from cream_peft.model.check import check_adapter
from cream_peft.model.record import AdapterError, adapter_sha256
from cream_peft.publish.merge import merge_adapter

CREAM, LORA, BASE = "cream.json", "adapter_config.json", "base_config/config.json"
DEEP, NESTED, HUGE = "[" * 100_000, '{"recipe": ' + "[" * 200 + "]" * 200 + "}", json.dumps({"recipe": "x" * 2**21})
THETA = "rope_parameters"
EDITS = {
    (CREAM, "target_length"): ["2048", -1, 0, 1e300, [2048], {"a": 1}, True, None, 8.5, float("nan"), 4096],
    (CREAM, "pretrained_window"): ["256", 10**400, -256],
    (CREAM, "base_model"): [5, None, "a\0b", "/etc/passwd", "../../x", ""],
    (CREAM, "base_revision"): [7, "../../etc/passwd", "a\0b"],
    (CREAM, "base_fingerprint"): ["abc", {"model.norm.weight": ["x"]}, {"model.norm.weight": [[1]]}],
    (CREAM, "base_is_local"): ["yes"],
    (CREAM, "rope_scaling_type"): [3, "banana"],
    (CREAM, "positions"): [[1], "cream"],
    (CREAM, "positions.options"): ["wide", [3.0]],
    (CREAM, "steps"): ["many", -1],
    (CREAM, "versions"): [["x"]],
    (CREAM, "format"): ["two", [2], 99],
    (CREAM, ""): ["[]", "", "\0", DEEP, NESTED, HUGE],
    (BASE, "num_hidden_layers"): ["4", 10**9, -1, [4]],
    (BASE, "vocab_size"): [385.0],
    (BASE, "model_type"): ["banana", 3],
    (BASE, "rope_parameters"): ["x", [], {"rope_type": "default", "rope_theta": "x"}, {"rope_theta": [1]}],
    (BASE, "max_position_embeddings"): ["2048", 1e300, -1],
    (BASE, ""): ["[]", DEEP, "\0"],
    (LORA, "r"): ["16", -1, 0, 10**9, 1e300, None],
    (LORA, "lora_alpha"): ["32", 1e300, [32]],
    (LORA, "target_modules"): [5, ["nope"], ["q_proj", "nope"], [5], "(", ["q_proj"]],
    (LORA, "init_lora_weights"): ["x", 3, [1]],
    (LORA, "layer_replication"): ["x", [[0, 1], [0, 2]]],
    (LORA, "peft_type"): ["NOPE", 3],
    (LORA, "megatron_config"): [{"a": 1}],
    (LORA, "use_dora"): ["yes", True],
    (LORA, "modules_to_save"): [[1], ["lm_head"]],
    (LORA, ""): ["[]", "{}", DEEP],
}
CASES = [(file, field, value) for (file, field), values in EDITS.items() for value in values]
CELL = {
    "task": "recall",
    "metric": "accuracy",
    "length": 256,
    "depth": 0.5,
    "value": 0.5,
    "samples": 2,
    "correct": "01",
}
RESULTS = {"model": "b", "adapter": None, "versions": {}, "seed": 0, "settings": {}, "cells": [CELL]}


def edit(path: Path, field: str, value) -> None:
    """Set a field of a JSON file; without a name, its whole text."""
    content = json.loads(path.read_text())
    *outer, last = field.split(".")
    inner = content
    for key in outer:
        inner = inner[key]
    inner[last] = value
    path.write_text(json.dumps(content) if field else value)


def is_alone(error) -> bool:
    """Whether nothing stands above the error in a traceback."""
    return error.__cause__ is None and (error.__suppress_context__ or error.__context__ is None)


def changed_weights(adapter, change):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    edit(adapter / CREAM, "adapter_sha256", adapter_sha256(adapter))


def rename(tensors):
    for name in list(tensors):
        tensors[name.replace("lora_A", "lora_a").replace("lora_B", "lora_b")] = tensors.pop(name)


@pytest.mark.parametrize(("file", "field", "value"), CASES, ids=lambda value: repr(value)[:40])
def test_a_wrong_value_in_an_adapter_is_one_line_that_names_it(adapter, file, field, value):
    edit(adapter / file, field, value)
    with pytest.raises(AdapterError) as raised:
        open_adapter(adapter)
    said = str(raised.value)
    assert is_alone(raised.value)
    # What is inconsistent may be found in the other file.
    names = [file, "adapter_model.safetensors", field.split(".")[-1] or file]
    assert any(name in said for name in names) and "\n" not in said and len(said) < 700


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rename, "lora_A.weight of adapter_model.safetensors"),
        (lambda tensors: tensors.pop(next(iter(tensors))), "is missing: it does not fit"),
        (lambda tensors: tensors.update(extra=torch.ones(3)), "has no place in cream-peft-tiny"),
        (
            lambda tensors: tensors.update({next(iter(tensors)): torch.ones(4, 128)}),
            "has another shape in cream-peft-tiny, (16, 128) and not (4, 128)",
        ),
    ],
)
def test_tensors_that_peft_would_ignore_are_refused_by_all_that_open_an_adapter(adapter, tmp_path, change, said):
    changed_weights(adapter, change)
    for opens in (
        load_adapter,
        check_adapter,
        lambda folder: merge_adapter(folder, tmp_path / "merged"),
        lambda folder: open_models([str(folder)]),
        lambda folder: load_chat(folder, ChatSettings()),
    ):
        with pytest.raises(AdapterError, match=r"does not fit adapter_config\.json") as raised:
            opens(adapter)
        assert said in str(raised.value)


def test_peft_itself_loads_renamed_tensors_as_the_bare_base(adapter):
    """Control: why that is looked for."""
    from peft import PeftModel

    model = base.load_base(base.TINY_ID, load_in_4bit=False)
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        bare = model(ids).logits
        changed_weights(adapter, rename)
        assert torch.equal(PeftModel.from_pretrained(model, str(adapter)).eval()(ids).logits, bare)


def endless(adapter, kind):
    template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    if kind == "template":
        (adapter / "chat_template.jinja").write_text(template)
    elif kind == "target_modules":
        edit(adapter / LORA, kind, "([a-z_.]+)+[0-9]*([a-z_.]+)+!")
    else:
        edit(adapter / LORA, kind, [[0, 2]] * 10**5)


@pytest.mark.parametrize("kind", ["template", "target_modules", "layer_replication"])
def test_what_would_never_end_is_broken_off(adapter, monkeypatch, kind):
    endless(adapter, kind)
    monkeypatch.setattr(tokenizer, "TIME_LIMIT", 1)
    start = time.perf_counter()
    with pytest.raises(AdapterError, match=r"do not use it|too deep") as raised:
        load_adapter(adapter, load_in_4bit=False)
    assert time.perf_counter() - start < 10 and is_alone(raised.value)


def test_an_adapter_that_names_its_modules_is_opened_however_busy_the_machine_is(adapter, monkeypatch):
    monkeypatch.setattr(misfit, "ends_in_time", lambda task: False)
    load_adapter(adapter, load_in_4bit=False)
    content = json.loads((adapter / LORA).read_text())
    for key, value in (
        ("target_modules", ".*_proj"), ("exclude_modules", "x+"), ("layers_pattern", ["h*"]),
        ("rank_pattern", {".*q_proj": 16}), ("layer_replication", [[0, 2]]),
    ):  # fmt: skip
        of_some = {"layers_to_transform": [0]} if key == "layers_pattern" else {}
        (adapter / LORA).write_text(json.dumps(content | {key: value} | of_some))
        with pytest.raises(AdapterError, match="takes too long"):
            load_adapter(adapter, load_in_4bit=False)


def test_code_that_a_base_or_a_tokenizer_brings_never_runs_unasked(adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda *said: "y")
    other, ran = tmp_path / "base", tmp_path / "ran"
    other.mkdir()
    for folder in (other, adapter):
        (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine"}}
    (other / "config.json").write_text(json.dumps(config))
    for command in (["check", "--adapter", str(adapter), "--base_model"], ["evaluate", "--compare"]):
        assert cli.main([*command, str(other)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "trust_remote_code" in said
    edit(adapter / "tokenizer_config.json", "auto_map", {"AutoTokenizer": ["code.Mine", None]})
    edit(adapter / "tokenizer_config.json", "tokenizer_class", "Mine")
    assert next(row for row in check_adapter(adapter) if row.item == "tokenizer").verdict == "wrong"
    for load in (lambda: tokenizer.load_tokenizer(str(adapter)), lambda: base.load_base(str(other))):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load()
    assert not ran.exists()
    # Control: it would run for the asking.
    with pytest.raises(AdapterError):
        open_adapter(adapter, base_model=str(other), trust_remote_code=True)
    assert ran.exists()


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("cells", [{**CELL, "samples": 0}], "samples 0"),
        ("cells", [CELL, {**CELL, "samples": "2"}], "cells[1].samples"),
        ("cells", [{**CELL, "value": 1e300}], "cells[0].value"),
        ("cells", [{**CELL, "value": float("nan")}], "cells[0].value"),
        ("cells", [{**CELL, "length": -256}], "cells[0].length"),
        ("cells", [{**CELL, "depth": 3}], "depth 3"),
        ("cells", [{**CELL, "correct": "0x"}], "correct"),
        ("cells", [{**CELL, "answer_loss": ["a"]}], "cells[0].answer_loss"),
        ("cells", {"a": 1}, "cells"),
        ("cells", [[1]], "cells"),
        ("settings", [1], "settings"),
        ("settings", {"target_length": "far"}, "settings.target_length"),
        ("settings", {"options": {"recall": 3}}, "settings.options"),
        ("settings", {"label": "a\0b"}, "settings.label"),
        ("seed", "x", "seed"),
        ("versions", [1], "versions"),
        ("adapter", 3, "adapter"),
        ("format", "two", "format"),
        ("", DEEP, "recursion"),
        ("", "[]", "missing"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_wrong_value_in_a_results_file_is_one_line_that_names_it(tmp_path, capsys, field, value, named):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RESULTS))
    assert Results.read(path).cells[0].correct == "01"  # control
    edit(path, field, value)
    assert cli.main(["plot", str(path), "--output", str(tmp_path / "a.png")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "--debug" not in said
    assert "results.json" in said and named in said
