"""The notebook of the tiny model: its code runs in a fresh process, and its outputs are those of such a run."""

import ast
import base64
import importlib
import json
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

TOUR = ROOT / "recipes/cream-peft-tiny/tour.ipynb"
LARGEST_PICTURE = 120_000
"""Bytes."""


def code_cells():
    notebook = json.loads(TOUR.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def code_of(cell):
    """The cell's code as plain Python: an expression at its end is what a notebook shows."""
    return "".join(cell["source"])


def imported_names(source):
    """(module, name) of what is imported from cream_peft."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cream_peft":
            yield from ((node.module, alias.name) for alias in node.names)


def wrong_outputs(cell):
    """What of a cell's outputs must not be committed."""
    found = [output["output_type"] for output in cell["outputs"] if output["output_type"] == "error"]
    texts = json.dumps(cell["outputs"])
    found += re.findall(r"/(?:home|root|tmp|work|Users|private|opt|usr)/[\w./-]*", texts)
    found += [output["name"] for output in cell["outputs"] if output.get("name") == "stderr"]
    return found


def test_the_code_of_the_notebook_parses_and_names_what_there_is():
    cells = code_cells()
    names = {name for cell in cells for name in imported_names(code_of(cell))}
    assert {("cream_peft", name) for name in ("CREAMConfig", "CREAMTrainer", "cream", "load_adapter")} <= names
    for module, name in names:
        assert not name.startswith("_") and hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_the_notebook_was_run_from_a_fresh_kernel_and_its_outputs_are_clean():
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert [wrong_outputs(cell) for cell in cells] == [[]] * len(cells)
    pictures = [
        base64.b64decode(o["data"]["image/png"])
        for c in cells
        for o in c["outputs"]
        if "image/png" in o.get("data", {})
    ]
    assert len(pictures) == 2
    for picture in pictures:
        width, height = struct.unpack(">II", picture[16:24])
        assert len(picture) < LARGEST_PICTURE and 300 < width < 900 and 200 < height < 900


def test_an_error_a_path_and_a_warning_in_an_output_are_found():
    def cell(**output):
        return {"outputs": [output]}

    assert wrong_outputs(cell(output_type="error", ename="ValueError"))
    assert wrong_outputs(cell(output_type="stream", name="stdout", text=["/".join(["in ", "tmp", "abc", "run\n"])]))
    assert wrong_outputs(cell(output_type="stream", name="stderr", text=["a warning\n"]))
    assert not wrong_outputs(cell(output_type="stream", name="stdout", text=["1,024 to 2,047\n"]))


def shares_in(text):
    """Label -> shares of right answers, of the table that the notebook prints."""
    rows = re.findall(r"^(untouched base|plain fine-tune|CREAM) +((?:[01]\.\d\d *){4})$", text, re.MULTILINE)
    return {label: [float(share) for share in row.split()] for label, row in rows}


def assert_it_shows_what_it_says(shares):
    assert set(shares) == {"untouched base", "plain fine-tune", "CREAM"}
    assert max(shares["untouched base"]) < 0.2
    assert shares["plain fine-tune"][0] > 0.9 and shares["plain fine-tune"][-1] < 0.5
    assert min(shares["CREAM"]) > 0.8


def test_the_committed_table_shows_what_the_text_says():
    outputs = [output for cell in code_cells() for output in cell["outputs"]]
    assert_it_shows_what_it_says(shares_in("".join(line for output in outputs for line in output.get("text", ()))))


@pytest.mark.slow
def test_the_code_runs_in_a_fresh_process(tmp_path):
    program = "\n\n".join(code_of(cell) for cell in code_cells())
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert_it_shows_what_it_says(shares_in(ran.stdout))


def test_the_line_for_rented_gpus_is_one_that_the_client_of_the_hub_takes(tmp_path):
    page = (ROOT / "recipes/README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^hf jobs uv run .*?[^\\]$", page, re.MULTILINE | re.DOTALL)
    words = shlex.split(line.replace("\\\n", " ").replace("RECIPE", "recipes/llama-2-7b/cream-4k-32k-qlora.yaml"))
    hf = Path(sys.executable).with_name("hf")
    command = [hf, *words[1:4], "--dry-run", *words[4:]]
    environment = {"PATH": "", "HOME": str(tmp_path), "HF_TOKEN": "hf_none", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and "not submitted" in ran.stdout + ran.stderr, ran.stderr
    assert "cream-peft @ git+https://" in ran.stdout and "train --config" in ran.stdout
