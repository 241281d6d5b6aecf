"""Strategies, scalings and tasks of a user's own package: the page that shows how, and what is refused."""

import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_eval_tasks import bytes_tokenizer
from transformers import AutoModelForCausalLM

from cream_peft import CREAMConfig, plugins, register_scaling, register_strategy, register_task
from cream_peft.evals.tasks import TASKS, Measurement
from cream_peft.families import RopeError
from cream_peft.plugins import PluginError
from cream_peft.positions import POSITION_STRATEGIES
from cream_peft.rope import apply_scaling, check_scaling, scaled_config
from cream_peft.scalings import ROPE_SCALING_TYPES
from cream_peft.train.recipe import RecipeError, parse_recipe

PAGE = (ROOT / "recipes/add-your-own.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = """
import json, sys
from cream_peft.cli import main

folder = sys.argv[1]
run, text = f"{folder}/run", f"{folder}/text"
codes = [
    main(["train", "--config", f"{folder}/mine.yaml", "--max_steps", "2", "--save_strategy", "no",
          "--output_dir", run]),
    main(["evaluate", "--compare", "text=" + text + "+keep_fast", "--tasks", "parcel", "--samples", "1", "--no_4bit",
          "--lengths", "512", "1024", "--target_length", "1024", "--output_dir", f"{folder}/results"]),
    main(["merge", "--adapter", run, "--output", f"{folder}/merged"]),
]
from cream_peft import load_adapter

model, _ = load_adapter(run, load_in_4bit=False)
print(json.dumps({"codes": codes, "inv_freq": model.get_base_model().model.rotary_emb.inv_freq.tolist()}))
"""
WITHOUT = """
import sys
from cream_peft import load_adapter
from cream_peft.model.check import check_adapter

print([finding.verdict for finding in check_adapter(sys.argv[1] + "/merged")])
load_adapter(sys.argv[1] + "/run")
"""


def blocks(kind):
    return [block for found, block in BLOCKS if found == kind]


def install(folder):
    """The page's package in `folder`, as pip installs it. Returns the environment of a process that has it."""
    project = tomllib.loads(blocks("toml")[0])
    site = folder / "site"
    info = site / "my_positions-0.1.dist-info"
    info.mkdir(parents=True)
    # The last block of Python is the package's test.
    (site / "my_positions.py").write_text("\n\n".join(blocks("python")[:-1]), encoding="utf-8")
    name, version = project["project"]["name"], project["project"]["version"]
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    groups = project["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in groups[group].items()) for group in groups]
    (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}


def run_python(program, *arguments, env):
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What a fresh process does with the page's package: its folder, environment and last printed line."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("page")
    tokenizer = bytes_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    (folder / "mine.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    env = install(folder)
    ran = run_python(COMMANDS, str(folder), env=env)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout.splitlines()[-1])
    assert said["codes"] == [0, 0, 0], ran.stderr
    return SimpleNamespace(folder=folder, env=env, said=said)


def test_a_strategy_and_a_scaling_of_a_package_are_trained_and_named_in_cream_json(page):
    content = json.loads((page.folder / "run" / "cream.json").read_text())
    assert (content["positions"]["strategy"], content["positions"]["options"]["pieces"]) == ("scattered", 4)
    assert content["rope_scaling_type"] == "keep_fast"
    assert content["packages"] == dict.fromkeys(("position_strategy", "rope_scaling_type"), "my-positions 0.1")


@pytest.mark.parametrize("folder", ["run", "merged"])
def test_the_card_offers_no_server_that_was_not_tried_with_a_scaling_of_a_package(page, folder):
    card = (page.folder / folder / "README.md").read_text()
    assert card.count("vLLM and llama.cpp were not tried with a RoPE scaling of one's own.") == (folder == "merged")
    assert not re.search("vllm serve|llama-server|convert_hf_to_gguf", card)


def test_the_numbers_of_a_scaling_are_what_the_model_runs_with_and_what_transformers_reads_without_the_package(page):
    inv_freq = 10000.0 ** -(np.arange(0, 32, 2) / 32)
    wanted = np.where(256 * inv_freq >= 2 * np.pi, inv_freq, inv_freq / 8)
    assert 0 < (wanted == inv_freq).sum() < 16
    assert np.allclose(page.said["inv_freq"], wanted, rtol=1e-6)
    merged = AutoModelForCausalLM.from_pretrained(page.folder / "merged")
    rotary = merged.model.rotary_emb
    with torch.no_grad():
        merged(torch.arange(3)[None], position_ids=torch.tensor([[0, 300, 2047]]))
    assert np.allclose(rotary.inv_freq, wanted, rtol=1e-6) and rotary.attention_scaling == 1


def test_a_task_of_a_package_is_measured_by_the_command_line(page):
    (path,) = (page.folder / "results").glob("*.json")
    content = json.loads(path.read_text())
    cells = content["cells"]
    assert {(cell["task"], cell["length"]) for cell in cells} == {("parcel", 512), ("parcel", 1024)}
    assert {cell["depth"] for cell in cells} == {0.1, 0.3, 0.5, 0.7, 0.9} and content["settings"][
        "target_length"
    ] == 1024
    assert all(cell["length"] - 100 < cell["tokens"] <= cell["length"] - 12 for cell in cells)


def test_python_knows_the_package_once_something_is_imported(page):
    program = "from cream_peft import POSITION_STRATEGIES; print('scattered' in POSITION_STRATEGIES)"
    assert run_python(program, env=page.env).stdout == "True\n"
    # The package itself first, as its own tests do.
    program = "import my_positions; from cream_peft.positions import options_of; print(options_of('scattered'))"
    assert run_python(program, env=page.env).stdout == "{'pieces': 8}\n"


def test_an_adapter_whose_package_is_missing_names_it_and_a_merged_model_does_without(page):
    ran = run_python(WITHOUT, str(page.folder), env={**page.env, "PYTHONPATH": str(ROOT)})
    assert ran.returncode == 1 and "wrong" not in ran.stdout and "'ok'" in ran.stdout, ran.stderr
    error = ran.stderr.splitlines()[-1]
    assert "'keep_fast' of 'my-positions 0.1', which is not installed here" in error and "AdapterError" in error


def test_the_tests_of_the_page_pass(page):
    (page.folder / "test_mine.py").write_text(blocks("python")[-1], encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"]
    ran = subprocess.run(command, cwd=page.folder, env=page.env, capture_output=True, text=True)
    assert ran.returncode == 0 and "2 passed" in ran.stdout, ran.stdout


@pytest.fixture(autouse=True)
def registries():
    """Afterwards they hold what they held before."""
    before = [(registry, dict(registry)) for registry in (POSITION_STRATEGIES, ROPE_SCALING_TYPES, TASKS)]
    yield
    for registry, content in before:
        registry.clear()
        registry.update(content)


def jumps(num_tokens, context_length, target_length, rng, gap=4):
    fed = min(num_tokens, context_length)
    return np.arange(fed), np.arange(fed) + rng.integers(0, min(gap, target_length - fed + 1))


CALLS = itertools.count()
WRONG = {
    "floats": (lambda fed, rng: (np.arange(fed), np.arange(fed) / 2), "must be integers"),
    "a token too few": (lambda fed, rng: (np.arange(fed), np.arange(fed - 1)), "of shape"),
    "repeated positions": (lambda fed, rng: (np.arange(fed), np.arange(fed) // 2), "must rise strictly"),
    "beyond the target": (lambda fed, rng: (np.arange(fed), np.arange(fed) + 9999), "within 0..0"),
    "tokens that are not there": (lambda fed, rng: (np.arange(fed) + 9999, np.arange(fed)), "token indices"),
    "other random numbers": (
        lambda fed, rng: (np.arange(fed), np.arange(fed) + (fed == 3) * next(CALLS)),
        "two draws of one generator differ",
    ),
}


@pytest.mark.parametrize(("draw", "said"), WRONG.values(), ids=WRONG)
def test_a_strategy_whose_draws_are_wrong_is_refused(draw, said):
    def strategy(num_tokens, context_length, target_length, rng):
        return draw(min(num_tokens, context_length), rng)

    with pytest.raises(PluginError, match=re.escape(said)):
        register_strategy("mine", strategy)
    assert "mine" not in POSITION_STRATEGIES


def test_a_name_that_is_taken_is_refused_and_a_module_may_replace_its_own():
    for register, name, entry in (
        (register_strategy, "cream", jumps),
        (register_scaling, "yarn", lambda *arguments: arguments),
        (register_task, "needle", Measurement(jumps)),
        (register_task, "new_skill", Measurement(jumps)),
    ):
        with pytest.raises(PluginError, match=f"'{name}' is registered already, by cream_peft"):
            register(name, entry)
    with pytest.raises(PluginError, match="a name has letters"):
        register_strategy("cream 2", jumps)
    register_strategy("jumps", jumps)
    register_strategy("jumps", jumps)
    with pytest.raises(PluginError, match="options colour: evaluate has"):
        register_task("mine", Measurement(jumps, ("colour",)))
    with pytest.raises(PluginError, match="must be a Task or a Measurement"):
        register_task("mine", jumps)


def test_options_of_a_registered_strategy_are_read_from_recipe_and_command_line(tmp_path):
    register_strategy("jumps", jumps)
    words = ["--position_strategy", "jumps", "--output_dir", str(tmp_path)]
    assert parse_recipe(words).run.strategy_options() == {}
    given = parse_recipe([*words, "--position_strategy_kwargs", '{"gap": 9}']).run
    assert given.strategy_options() == {"gap": 9}
    config = CREAMConfig(str(tmp_path), position_strategy="jumps", position_strategy_kwargs={"gap": 9}, use_cpu=True)
    assert config.strategy_options() == {"gap": 9}
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("position_strategy: jumps\nposition_strategy_kwargs: {gap: 2}\noutput_dir: x\n")
    assert parse_recipe(["--config", str(recipe)]).run.strategy_options() == {"gap": 2}
    for kwargs, said in (
        ('{"gp": 9}', "position_strategy_kwargs has gp, and position_strategy=jumps takes gap"),
        ('{"gap": "wide"}', "position_strategy_kwargs="),
        ('{"gap', "is not valid JSON"),
        ("[3]", "must be a mapping"),
    ):
        with pytest.raises(RecipeError, match=re.escape(said)):
            parse_recipe([*words, "--position_strategy_kwargs", kwargs])
    with pytest.raises(RecipeError, match="takes none: write sigma: 3"):
        parse_recipe(["--position_strategy_kwargs", '{"sigma": 3}'])


def halved(inv_freq, window, target_length):
    return inv_freq / 2, 1.25


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda inv_freq: (inv_freq[1:], 1.0), "must return 16 finite numbers above 0"),
        (lambda inv_freq: (inv_freq * np.nan, 1.0), "must return 16 finite numbers above 0"),
        (lambda inv_freq: (-inv_freq, 1.0), "must return 16 finite numbers above 0"),
        (lambda inv_freq: (inv_freq, 0.0), "the factor 0.0, and must return a finite one above 0"),
    ],
)
def test_numbers_that_no_rope_can_have_are_refused(make_model, returned, said):
    register_scaling("mine", lambda inv_freq, window, target_length: returned(inv_freq))
    with pytest.raises(RopeError, match=said):
        scaled_config(make_model().config, 512, "mine")


def test_a_scaling_is_refused_on_a_base_that_is_scaled_or_rotates_a_part(make_model):
    register_scaling("halved", halved)
    config = make_model().config
    with pytest.raises(RopeError, match="rope_type 'yarn'"):
        scaled_config(scaled_config(config, 512, "yarn"), 1024, "halved")
    again = scaled_config(config, 512, "halved")
    with pytest.raises(
        RopeError, match="'yarn' needs an unscaled base, and this one has rope_type 'longrope': use 'ntk'"
    ):
        scaled_config(again, 1024, "yarn")
    config.model_type = "glm4"
    with pytest.raises(RopeError, match="one RoPE over whole heads"):
        scaled_config(config, 512, "halved")
    # One that changes with the length of the input stays refused.
    again.rope_parameters["long_factor"] = [1.0] * 16
    with pytest.raises(RopeError, match="the base has rope_type 'longrope'"):
        scaled_config(again, 512, None)


def test_a_scaling_is_applied_anew_after_the_model_has_read_beyond_its_window(make_model):
    register_scaling("halved", halved)
    register_scaling("slower", lambda inv_freq, window, target_length: (inv_freq / 3, 1.0))
    model = make_model()
    plain, far = model.model.rotary_emb.inv_freq.clone(), torch.tensor([[0, 1, 400]])
    for name, divisor, factor in (("halved", 2, 1.25), ("slower", 3, 1.0)):
        config = scaled_config(make_model().config, 512, name)
        apply_scaling(model, config)
        check_scaling(model, config)
        with torch.no_grad():
            model(torch.arange(3)[None], position_ids=far)
        # What transformers put there while it read.
        assert torch.allclose(model.model.rotary_emb.inv_freq, plain / divisor)
        assert model.model.rotary_emb.attention_scaling == factor


def test_a_package_that_cannot_be_imported_is_named_each_time(monkeypatch):
    def fail():
        raise ModuleNotFoundError("No module named 'gone'")

    dist = SimpleNamespace(name="broken-positions", version="2.0")
    entry = SimpleNamespace(load=fail, dist=dist, value="broken", module="broken")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry])
    monkeypatch.setitem(plugins._state, "loaded", False)
    for _ in range(2):
        with pytest.raises(PluginError, match=r"broken-positions 2\.0 registers broken .*No module named 'gone'"):
            plugins.load_plugins()
