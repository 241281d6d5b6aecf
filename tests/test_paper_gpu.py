"""The CUDA code path without a GPU, as paper_gpu/count.py counts it: training steps, held-out losses, reading."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, load_script
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cream_peft.model import attention

paper = load_script("tests/paper_gpu/cases.py")
CASES = paper.cases()
RESULTS = ROOT / "recipes/llama-2-7b/results"
WHOLE, TWO_LAYERS = (json.loads((RESULTS / f"cuda-path{of}.json").read_text()) for of in ("", "-two-layers"))
FAST = [
    "llama-2-7b/cream-4k-32k-qlora",
    "qwen3-8b/cream-skill-4k-32k-qlora",
    "7B, memory: low",
    "Mistral-7B, fp16 on Turing",
    "7B, 16-bit base",
    "7B, every weight",
    "Mistral-7B reads 32K, 16-bit cache",
    "7B reads 32K, 4-bit cache",
]
"""Of bases with two layers. The other cases are other sizes of these; what dropout, all linears and more examples
take is in test_memory.py too."""
COUNTS = pytest.mark.skipif(
    torch.backends.cuda.is_built() or not shutil.which(os.environ.get("CXX", "g++")),
    reason="needs a C++ compiler, and a torch without CUDA",
)


def count(path, *options):
    command = [sys.executable, "tests/paper_gpu/count.py", "--output", str(path), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(path.read_text())["cases"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return count(tmp_path_factory.mktemp("counted") / "whole.json")


@COUNTS
def test_with_two_layers_kernels_host_syncs_and_peak_are_as_planned(tmp_path):
    counted = count(tmp_path / "two.json", "--layers", "2", "--only", *FAST)
    assert [problem for name in FAST for problem in paper.problems(CASES[name], counted[name])] == []


@COUNTS
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_whole_kernels_host_syncs_and_peak_are_as_planned(whole, name):
    assert paper.problems(CASES[name], whole[name]) == []


@pytest.mark.parametrize("published", [WHOLE, TWO_LAYERS], ids=["whole", "two layers"])
def test_what_is_published_has_no_problem(published):
    assert published["command"].startswith("python tests/paper_gpu/count.py --output FILE") and published["cases"]
    assert published is WHOLE or set(published["cases"]) == set(CASES)
    for name, result in published["cases"].items():
        assert paper.problems(CASES[name], result) == [], name
        assert (result["layers"] == 2) == (published is TWO_LAYERS), name


def test_the_table_of_the_page_is_what_is_published():
    page = (ROOT / "recipes/llama-2-7b/README.md").read_text(encoding="utf-8")
    lines = paper.table_of(WHOLE["cases"], TWO_LAYERS["cases"])
    assert len(lines) == len(CASES) + 2 and "\n".join(lines) in page[page.index("## Counted") :]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"error": "RuntimeError: cpu and cuda:0"}, "RuntimeError: cpu and cuda:0"),
        ({"kernels": ["flash bfloat16", "math bfloat16"]}, "math bfloat16"),
        ({"host_syncs": {"trainer.py compute_loss": 1}}, "1 in trainer.py compute_loss, 0 are known"),
        ({"optimizer_host_syncs": {"watch.py on_step": 2}}, "2 in watch.py on_step, 0 are known"),
        ({"peak_gib": 10.5}, "peak 10.50 GiB, planned 10.00"),
        ({"peak_gib": 9.0}, "peak 9.00 GiB, planned 10.00"),
        (
            {"held_out": {"kernels": ["flash bfloat16"], "peak_gib": 10.5, "planned_gib": 10.0}},
            "held-out loss: peak",
        ),
    ],
)
def test_each_thing_that_must_not_be_is_a_problem(change, said):
    good = {"layers": 32, "kernels": ["flash bfloat16"], "peak_gib": 10.1, "planned_gib": 10.0, "host_syncs": {}}
    good["held_out"] = {"kernels": ["flash bfloat16"], "peak_gib": 9.9, "planned_gib": 10.0}
    assert paper.problems({}, good) == []
    (problem,) = paper.problems({}, copy.deepcopy(good) | change)
    assert said in problem


@pytest.mark.parametrize("lacks_flash", [True, False])
def test_keys_are_repeated_where_there_is_no_flash_attention_and_the_output_stays(monkeypatch, lacks_flash):
    module = torch.nn.Module()
    module.num_key_value_groups = 4
    query, key, value = (
        torch.randn(2, heads, 12, 16, generator=torch.Generator().manual_seed(heads)) for heads in (8, 2, 2)
    )
    expected, _ = sdpa_attention_forward(module, query, key, value, None)
    sdpa, heads = torch.nn.functional.scaled_dot_product_attention, []

    def seen(query, key, value, **kwargs):
        heads.append((key.shape[1], value.shape[1]))
        return sdpa(query, key, value, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    monkeypatch.setattr(attention, "_lacks_flash", lambda query: lacks_flash)
    output, _ = attention.repeating_sdpa(module, query, key, value, None)
    assert heads == [(8, 8) if lacks_flash else (2, 2)]
    torch.testing.assert_close(output, expected)
