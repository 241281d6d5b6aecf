"""Every YAML under recipes/: its header, its keys, and its whole path on a tiny model of the same architecture."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, Features, List, Value
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cream_peft.model import base
from cream_peft.model.adapter import load_adapter
from cream_peft.model.base import load_base
from cream_peft.model.record import BASE_FOLDER
from cream_peft.plan import gpus as cards
from cream_peft.rope import pretrained_window
from cream_peft.tiny.documents import evaluate_recall
from cream_peft.train import machine
from cream_peft.train import run as train
from cream_peft.train.recipe import RecipeError, parse_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate")
CHAT_RECIPES = [path for path in RECIPES if "assistant_only_loss: true" in path.read_text()]


def label(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


PER_RECIPE = pytest.mark.parametrize("path", RECIPES, ids=label)

CONTEXT = 64
"""Tokens fed per example in these tests; the other lengths shrink in the same proportion."""

SECRET = "hf_aTokenThatNobodyMaySee"
LLAMA2_CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
    "'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def header_of(path: Path) -> dict[str, str]:
    """The `# Name:  value` lines above the first key."""
    above = path.read_text().split("\nmodel_name_or_path:")[0]
    return dict(re.findall(r"^# (\w+): +(.+)$", above, flags=re.MULTILINE))


def shortened(tokens: int) -> str:
    return f"{tokens // 1024}k"


# Headers and keys


def test_the_recipes_that_the_makefile_and_this_file_name_are_there():
    named = re.findall(r"recipes/\S+\.yaml", (ROOT / "Makefile").read_text())
    assert len(named) >= 2
    assert all((ROOT / name).is_file() for name in named)
    assert {path.parent.name for path in RECIPES} >= {"llama-2-7b", "llama-2-7b-chat"}


@PER_RECIPE
def test_every_recipe_says_what_it_is_for_what_it_needs_and_how_to_run_it(path):
    header = header_of(path)
    assert all(header.get(name) for name in ("Purpose", "Hardware", "Peak", "Hours", "Base", "Data", "Command"))
    assert "GPU" in header["Hardware"]
    command = shlex.split(header["Command"])
    assert command == ["cream-peft", "train", "--config", str(path.relative_to(ROOT))]


@PER_RECIPE
def test_every_recipe_parses_strictly_through_its_own_command(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = parse_recipe(shlex.split(header_of(path)["Command"])[2:])
    assert recipe.keys == list(yaml.safe_load(path.read_text()))


@PER_RECIPE
def test_a_misspelt_key_is_refused_by_name(path, tmp_path):
    copy = tmp_path / "recipe.yaml"
    copy.write_text(path.read_text().replace("\ngradient_accumulation_steps:", "\ngradient_acumulation_steps:"))
    with pytest.raises(RecipeError, match=r"gradient_acumulation_steps.*gradient_accumulation_steps"):
        parse_recipe(["--config", str(copy)])


@PER_RECIPE
def test_file_name_and_header_agree_with_the_settings(path):
    recipe = parse_recipe(["--config", str(path)])
    config = base.embedded_config(recipe.model.model_name_or_path)
    method = "qlora" if recipe.model.load_in_4bit else "lora"
    window, target = pretrained_window(config), recipe.run.target_length
    assert path.stem == f"{recipe.run.position_strategy}-{shortened(window)}-{shortened(target)}-{method}"
    assert f"from {window:,} to {target:,} tokens" in header_of(path)["Purpose"]


@PER_RECIPE
def test_the_header_quotes_the_planned_peak_and_a_card_that_holds_it(path):
    recipe, header = parse_recipe(["--config", str(path)]), header_of(path)
    planned = machine.plan_recipe(recipe, base.embedded_config(recipe.model.model_name_or_path)).terms["total"]
    assert header["Peak"] == f"{planned:.1f} GiB planned by cream-peft plan, not run"
    size = re.search(r"of (\d+) GB", header["Hardware"])[1]
    assert planned < min(gpu.gib for name, gpu in cards.GPUS.items() if name.endswith(f" {size}GB"))


# The whole path


def tiny_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    """A token a byte, and Llama-2's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=10**6
    )
    fast.chat_template = chat_template
    return fast


def tiny_base(recipe, folder: Path) -> None:
    """A random model of the recipe's architecture, rope_type and ratio of heads, its lengths shrunk to CONTEXT."""
    config = base.embedded_config(recipe.model.model_name_or_path)
    config.num_key_value_heads = 8 * config.num_key_value_heads // config.num_attention_heads
    config.num_attention_heads, config.head_dim = 8, 16
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 64, 96, 2
    if hasattr(config, "layer_types") and config.layer_types:
        config.layer_types = config.layer_types[:2]
    tokenizer = tiny_tokenizer(LLAMA2_CHAT_TEMPLATE if recipe.run.assistant_only_loss else None)
    config.vocab_size, config.bos_token_id, config.eos_token_id = len(tokenizer), 1, 2
    context = recipe.run.context_length
    config.max_position_embeddings = config.max_position_embeddings * CONTEXT // context
    original = config.rope_parameters.get("original_max_position_embeddings")
    if original:
        config.rope_parameters["original_max_position_embeddings"] = original * CONTEXT // context
    # Sharp attention, so that logits show how RoPE is scaled.
    config.initializer_range = 0.2
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pile_4k_train() -> DatasetDict:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(CONTEXT, 4 * CONTEXT, (100,), generator=generator).tolist()
    rows = [torch.randint(3, 259, (length,), generator=generator).tolist() for length in lengths]
    features = {"text": Value("string"), "meta": {"pile_set_name": Value("string")}}
    features |= {"llama2_tok_len": Value("int64"), "input_ids": List(Value("int32"))}
    columns = {"text": ["-"] * 100, "meta": [{"pile_set_name": "ArXiv"}] * 100}
    columns |= {"llama2_tok_len": lengths, "input_ids": rows}
    return DatasetDict(train=Dataset.from_dict(columns, Features(features)))


def ultrachat_200k() -> DatasetDict:
    """Users write in small letters, assistants in capitals."""
    conversations = [
        [
            {"content": word * 2, "role": "user"},
            {"content": word.upper(), "role": "assistant"},
            {"content": f"{word}?", "role": "user"},
            {"content": f"{word.upper()}{word.upper()}", "role": "assistant"},
        ]
        for word in (chr(97 + index % 26) * (1 + index % 3) for index in range(160))
    ]
    columns = {"prompt": [turns[0]["content"] for turns in conversations], "messages": conversations}
    columns["prompt_id"] = [str(index) for index in range(160)]
    return DatasetDict({split: Dataset.from_dict(columns) for split in ("train", "train_sft", "test_sft")})


def pg19() -> DatasetDict:
    def split(books: int) -> Dataset:
        texts = [f"Chapter {book}. " + "It was the best of times. " * (10 + book % 30) for book in range(books)]
        features = {"short_book_title": Value("string"), "publication_date": Value("int32")}
        features |= {"url": Value("string"), "text": Value("string")}
        columns = {"short_book_title": ["A"] * books, "publication_date": [1859] * books, "url": ["-"] * books}
        return Dataset.from_dict(columns | {"text": texts}, Features(features))

    return DatasetDict(train=split(60), validation=split(10), test=split(10))


# Columns, types and splits of each data set's card on the Hub.
DATA_SETS = {
    "victor-wu/pile_4k_train": pile_4k_train,
    "HuggingFaceH4/ultrachat_200k": ultrachat_200k,
    "emozilla/pg19": pg19,
    "runs/smollm2-135m-instruct/data/chat.jsonl": ultrachat_200k,
}


class Trained:
    """A recipe, the same recipe shrunk, and what its run left."""

    def __init__(self, path: Path, folder: Path):
        self.written = parse_recipe(["--config", str(path)])
        run, data = self.written.run, self.written.data
        self.base, self.output, documents = folder / "tiny-base", folder / "run", folder / Path(data.dataset_name).name
        tiny_base(self.written, self.base)
        DATA_SETS[data.dataset_name]().save_to_disk(documents)
        self.target_length = run.target_length * CONTEXT // run.context_length
        changes = {"model_name_or_path": self.base, "dataset_name": documents, "output_dir": self.output}
        changes |= {"context_length": CONTEXT, "target_length": self.target_length, "hub_token": SECRET}
        changes |= {"max_steps": 2, "eval_steps": 1, "save_steps": 1, "disable_tqdm": True}
        if run.eval_length:
            changes["eval_length"] = run.eval_length * CONTEXT // run.context_length
        flags = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
        self.recipe = parse_recipe(["--config", str(path), *flags])
        self.summary = self._run()

    def _run(self):
        trained = self

        class Kept(train.CREAMTrainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                trained.trainer = self

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "CREAMTrainer", Kept)
            return train.run_recipe(self.recipe)

    def json(self, name: str):
        return json.loads((self.output / name).read_text())


@pytest.fixture(scope="module", params=RECIPES, ids=label)
def trained(request, tmp_path_factory):
    # A second thread only waits at this size, and longer when the machine is busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Trained(request.param, tmp_path_factory.mktemp("recipe"))
    torch.set_num_threads(threads)


def test_a_run_trains_evaluates_and_saves(trained):
    assert trained.summary.steps == 2
    assert trained.summary.unlabelled == 0
    logged = trained.trainer.state.log_history
    evaluated = [row["eval_loss"] for row in logged if "eval_loss" in row]
    assert len(evaluated) == 2
    assert all(torch.isfinite(torch.tensor(evaluated)))
    assert {folder.name for folder in trained.output.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    assert all(module.weight.quant_state for name, module in trained.trainer.model.named_modules()
               if name.endswith("q_proj.base_layer"))  # fmt: skip
    moved = load_file(trained.output / "adapter_model.safetensors")
    projections = [name for name in moved if "lora_B" in name]
    assert len(projections) == 2 * len(trained.written.model.lora_target_modules)
    assert all(moved[name].any() for name in projections)


def test_the_adapter_is_complete_and_holds_no_path_and_no_token(trained):
    needed = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"}
    needed |= {"base_config/config.json", "cream.json", "README.md"}
    for folder in (trained.output, trained.output / "checkpoint-2"):
        assert all((folder / name).is_file() for name in needed)
    if trained.trainer.processing_class.chat_template:
        assert (trained.output / "chat_template.jinja").read_text() == LLAMA2_CHAT_TEMPLATE
    # base_folder.txt is for this machine, and no push takes it.
    files = [path for path in trained.output.glob("*") if path.name != "base_folder.txt"]
    published = [*files, *trained.output.glob("base_config/*")]
    for file in filter(Path.is_file, published):
        if file.name == BASE_FOLDER:
            # Where the base lies; test_push.py holds that it stays here.
            continue
        content = file.read_bytes()
        assert str(trained.output.parent).encode() not in content, file.name
        assert SECRET.encode() not in content, file.name
    # The control: what the Trainer would have published has both.
    torch.save(trained.trainer.args, trained.output.parent / "training_args.bin")
    content = (trained.output.parent / "training_args.bin").read_bytes()
    assert SECRET.encode() in content
    assert str(trained.output.parent).encode() in content


def test_cream_json_holds_the_positions_of_the_recipe(trained):
    run, found = trained.written.run, trained.json("cream.json")
    factor = run.target_length / run.context_length
    positions = found["positions"]
    assert (positions["strategy"], positions["short_documents"]) == (run.position_strategy, run.short_documents)
    assert (positions["context_length"], positions["factor"]) == (CONTEXT, factor)
    assert positions["options"].items() >= run.strategy_options().items() and positions["options"]["sigma"] == run.sigma
    assert (found["target_length"], found["rope_scaling_type"]) == (trained.target_length, run.rope_scaling_type)
    window = pretrained_window(base.embedded_config(trained.written.model.model_name_or_path))
    assert found["target_length"] / found["pretrained_window"] == run.target_length / window
    assert found["recipe"]["learning_rate"] == run.learning_rate
    assert found["seed"] == run.seed


def test_the_saved_adapter_loads_back_as_the_trained_model(trained):
    model, tokenizer = load_adapter(trained.output, base_model=str(trained.base))
    assert model.config.max_position_embeddings == trained.target_length
    assert model.config.rope_parameters == trained.trainer.scaled_config.rope_parameters
    assert tokenizer("As it was.").input_ids == trained.trainer.processing_class("As it was.").input_ids

    input_ids = torch.randint(3, 259, (1, 16), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "use_cache": False}
    inputs["position_ids"] = torch.linspace(0, trained.target_length - 1, 16).long()[None]
    unscaled = PeftModel.from_pretrained(load_base(str(trained.base)), trained.output).eval()
    with torch.no_grad():
        expected = trained.trainer.model.eval()(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, expected)
        # The control: a plain PEFT load.
        assert (unscaled(**inputs).logits - expected).abs().max() > 0.01


def assert_labels_are_the_assistants(tokenizer, input_ids, labels) -> None:
    ids, labels = torch.as_tensor(input_ids).flatten(), torch.as_tensor(labels).flatten()
    labelled, rest = tokenizer.decode(ids[labels != -100]), tokenizer.decode(ids[labels == -100])
    # The end of the turn is learnt too.
    assert re.fullmatch(r"(?:[A-Z ]|</s>)+", labelled)
    assert "</s>" in labelled
    assert not re.search(r"[A-Z]", re.sub(r"\[/?INST\]", "", rest))


@pytest.mark.parametrize("trained", CHAT_RECIPES, indirect=True, ids=label)
def test_only_the_tokens_of_the_assistant_carry_labels(trained):
    tokenizer, rows = trained.trainer.processing_class, trained.trainer.train_dataset
    assert len(rows) < 96
    assert all(len(row["input_ids"]) >= CONTEXT for row in rows.select(range(len(rows) - 1)))
    for row in [*rows, *trained.trainer.eval_dataset]:
        assert_labels_are_the_assistants(tokenizer, row["input_ids"], row["labels"])
    batch = trained.trainer.data_collator([rows[0]])
    assert batch["input_ids"].shape == (1, CONTEXT)
    assert (batch["labels"] == batch["input_ids"])[batch["labels"] != -100].all()
    # The control: labels on every token, the authors' way.
    with pytest.raises(AssertionError):
        assert_labels_are_the_assistants(tokenizer, rows[0]["input_ids"], rows[0]["input_ids"])


@pytest.mark.slow
def test_the_documented_defaults_train(tmp_path):
    """What README.md and recipes/README.md leave out of a recipe has values with which the embedded model learns."""
    recipe = {
        "model_name_or_path": "cream-peft-tiny", "dataset_name": "cream-peft-tiny", "target_length": 2048,
        "rope_scaling_type": "ntk", "output_dir": str(tmp_path / "run"), "max_steps": 150,
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    # As many windows a step as by default, faster; the rest is where the time goes.
    faster = ["--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1", "--save_strategy", "no"]
    train.run_recipe(
        parse_recipe(["--config", str(tmp_path / "mine.yaml"), *faster, "--gradient_checkpointing", "false"])
    )
    untuned = load_base("cream-peft-tiny", target_length=2048, rope_scaling_type="ntk")
    trained, _ = load_adapter(tmp_path / "run")
    before, after = (evaluate_recall(model, 2048, 16, seed=5)["correct"].mean() for model in (untuned, trained))
    # TRL's learning rate of 2e-5 leaves it at .52.
    assert before < 0.6 and after > 0.9
