"""Every YAML under recipes/: its header, its keys, and its whole path on a tiny model of the same architecture."""

from __future__ import annotations

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, Features, List, Value
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import chat_template_utils

from cream_peft import cli
from cream_peft.chat import ChatSettings, load_chat
from cream_peft.model import base
from cream_peft.model.adapter import load_adapter
from cream_peft.model.base import load_base
from cream_peft.model.check import check_adapter
from cream_peft.model.record import BASE_FOLDER
from cream_peft.plan import gpus as cards
from cream_peft.publish.merge import merge_adapter
from cream_peft.rope import pretrained_window
from cream_peft.tiny.documents import evaluate_recall
from cream_peft.train import machine
from cream_peft.train import run as train
from cream_peft.train.recipe import parse_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate")
CHAT_RECIPES = [path for path in RECIPES if "\nassistant_only_loss: true" in path.read_text()]
WITHIN_WINDOW = [path for path in RECIPES if "rope_scaling_type: none" in path.read_text()]


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

FAMILIES = Path(chat_template_utils.__file__).parent / "chat_templates"
EMPTY_THOUGHT = r"<think>\n\n</think>\n\n[A-Z]+<\|im_end\|>\n"
# Base -> its template as the Hub has it; one turn of the assistant as it is trained; what of the rest has capitals.
TEMPLATES = {
    "Qwen/Qwen3-8B": ((FAMILIES / "qwen3.jinja").read_text(), EMPTY_THOUGHT, "$."),
    "Qwen/Qwen3.5-0.8B": ((FAMILIES / "qwen3_5_nothink.jinja").read_text(), EMPTY_THOUGHT, "$."),
    "Qwen/Qwen3.5-9B": ((FAMILIES / "qwen3_5_think.jinja").read_text(), EMPTY_THOUGHT, "$."),
    "google/gemma-3-4b-it": ((FAMILIES / "gemma3.jinja").read_text(), r"[A-Z]+<end_of_turn>\n", "$."),
    # Trained on every token.
    "unsloth/gpt-oss-20b-BF16": ((FAMILIES / "gptoss.jinja").read_text(), "$.", "$."),
    "meta-llama/Llama-3.1-8B-Instruct": (
        (FAMILIES / "llama3_1.jinja").read_text(), r"[A-Z]+<\|eot_id\|>", r"Cutting Kn.*\nToday .*",
    ),
}  # fmt: skip
LLAMA2_CHAT = (LLAMA2_CHAT_TEMPLATE, r" [A-Z]+ </s>", r"\[/?INST\]")


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


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_a_flag_counts_for_what_the_recipe_says_under_the_settings_other_name(name, said, tmp_path):
    other = {"gradient": "activation", "activation": "gradient"}[name.split("_")[0]] + "_checkpointing"
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model_name_or_path: x\ndataset_name: x\n{name}: {str(said).lower()}\n")
    run = parse_recipe(["--config", str(file), f"--{other}", str(not said)]).run
    assert run.gradient_checkpointing is run.activation_checkpointing is not said


@PER_RECIPE
def test_file_name_and_header_agree_with_the_settings(path):
    recipe = parse_recipe(["--config", str(path)])
    config = base.embedded_config(recipe.model.model_name_or_path)
    method = "qlora" if recipe.model.load_in_4bit else "lora"
    window, target = pretrained_window(config), recipe.run.target_length
    if target <= window:
        lengths = f"skill-{shortened(recipe.run.context_length)}-{shortened(target)}"
        assert "a skill over the window" in header_of(path)["Purpose"] and f" {target:,} tokens;" in path.read_text()
    else:
        lengths = f"{shortened(window)}-{shortened(target)}"
        assert f"from {window:,} to {target:,} tokens" in header_of(path)["Purpose"]
    assert path.stem == f"{recipe.run.position_strategy}-{lengths}-{method}"


@PER_RECIPE
def test_the_header_quotes_the_planned_peak_and_a_card_that_holds_it(path):
    recipe, header = parse_recipe(["--config", str(path)]), header_of(path)
    plan = machine.plan_recipe(recipe, base.embedded_config(recipe.model.model_name_or_path))
    planned = max(plan.terms["total"], plan.validation["total"])
    assert header["Peak"].startswith(f"{planned:.1f} GiB planned by cream-peft plan, not run")
    size = re.search(r"of (\d+) GB", header["Hardware"])[1]
    assert planned < min(gpu.gib for name, gpu in cards.GPUS.items() if name.endswith(f" {size}GB"))
    fits = {fit.card: fit for fit in plan.cards}
    fit, name = fits["RTX 4090 24GB"], "RTX 4090"
    if not fit.fits:
        fit, name = fits["A100 80GB"], "A100 of 80 GB"
    if fit.hours:
        least, most = (f"{hours:.1f}" for hours in fit.hours)
        said = f"{least} planned" if least == most else f"{least} to {most} planned"
        assert header["Hours"] == f"{said} on an {name}, and the held-out loss"
    else:
        assert header["Hours"].startswith("not planned: ")


@PER_RECIPE
def test_the_held_out_loss_chooses_beyond_what_is_fed(path):
    recipe = parse_recipe(["--config", str(path)])
    planned = machine.plan_recipe(recipe, base.embedded_config(recipe.model.model_name_or_path))
    assert recipe.run.load_best_model_at_end and recipe.run.eval_length >= 2 * recipe.run.context_length
    # It costs no memory but in the smallest recipe, which feeds 1,024 tokens and asks on 16,384.
    is_smallest = path.relative_to(ROOT) == Path("recipes/smollm2-135m-instruct/cream-8k-32k-qlora.yaml")
    assert (planned.validation["total"] < planned.terms["total"]) is not is_smallest


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
    context = recipe.run.context_length
    if getattr(config, "layer_types", None):
        # A layer of each kind.
        config.layer_types = [config.layer_types[0], "full_attention"]
        if getattr(config, "sliding_window", None):
            config.sliding_window = max(8, config.sliding_window * CONTEXT // context)
    for kind in ("key", "value"):
        if hasattr(config, f"linear_num_{kind}_heads"):
            setattr(config, f"linear_num_{kind}_heads", 2)
            setattr(config, f"linear_{kind}_head_dim", 16)
    if hasattr(config, "num_local_experts"):
        config.num_local_experts = 8
    name = recipe.model.model_name_or_path
    template, _, _ = TEMPLATES.get(name, LLAMA2_CHAT)
    tokenizer = tiny_tokenizer(template if recipe.run.assistant_only_loss or name in TEMPLATES else None)
    config.vocab_size, config.bos_token_id, config.eos_token_id = len(tokenizer), 1, 2
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


def capybara() -> DatasetDict:
    rows = ultrachat_200k()["train"]
    rows = rows.select_columns(["messages"]).add_column("source", ["-"] * 160).add_column("num_turns", [2] * 160)
    return DatasetDict(train=rows, test=rows.select(range(10)))


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
    "trl-lib/Capybara": capybara,
    "runs/smollm2-135m-instruct/data/chat.jsonl": ultrachat_200k,
    "runs/smollm2-135m-instruct/data/skill-train.jsonl": capybara,
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
        # The best of two steps may be the first, which a warm-up would give a rate of 0.
        changes |= {"warmup_steps": 0, "max_steps": 2, "eval_steps": 1, "save_steps": 1, "disable_tqdm": True}
        changes["held_out_documents"] = min(64, data.held_out_documents)
        if data.dataset_test_split and Path(data.dataset_test_split).suffix:
            changes["dataset_test_split"] = folder / Path(data.dataset_test_split).name
            DATA_SETS[data.dataset_name]()["test"].to_json(changes["dataset_test_split"])
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

    @property
    def is_within_window(self) -> bool:
        return self.target_length <= self.trainer.pretrained_window

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
    quantized = [hasattr(module.weight, "quant_state") for name, module in trained.trainer.model.named_modules()
                 if name.endswith("q_proj.base_layer")]  # fmt: skip
    assert quantized and set(quantized) == {trained.written.model.load_in_4bit}
    moved = load_file(trained.output / "adapter_model.safetensors")
    projections = [name for name in moved if "lora_B" in name]
    with torch.device("meta"):
        base_model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(trained.base))
    targets = trained.written.model.lora_target_modules
    assert {name.split(".")[-3] for name in projections} == set(targets)
    assert len(projections) == sum(name.split(".")[-1] in targets for name, _ in base_model.named_modules())
    assert all(moved[name].any() for name in projections)


def test_the_adapter_is_complete_and_holds_no_path_and_no_token(trained):
    needed = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"}
    needed |= {"base_config/config.json", "cream.json", "README.md"}
    for folder in (trained.output, trained.output / "checkpoint-2"):
        assert all((folder / name).is_file() for name in needed)
    if trained.trainer.processing_class.chat_template:
        template, _, _ = TEMPLATES.get(trained.written.model.model_name_or_path, LLAMA2_CHAT)
        assert (trained.output / "chat_template.jinja").read_text() == template
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
    in_4bit = trained.written.model.load_in_4bit
    model, tokenizer = load_adapter(trained.output, base_model=str(trained.base), load_in_4bit=in_4bit)
    assert model.config.max_position_embeddings == max(trained.target_length, trained.trainer.pretrained_window)
    assert model.config.rope_parameters == trained.trainer.scaled_config.rope_parameters
    assert tokenizer("As it was.").input_ids == trained.trainer.processing_class("As it was.").input_ids

    input_ids = torch.randint(3, 259, (1, 16), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "use_cache": False}
    inputs["position_ids"] = torch.linspace(0, trained.target_length - 1, 16).long()[None]
    unscaled = PeftModel.from_pretrained(load_base(str(trained.base), load_in_4bit=in_4bit), trained.output).eval()
    with torch.no_grad():
        expected = trained.trainer.model.eval()(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, expected)
        # The control: a plain PEFT load, which is right only where the base is not scaled.
        difference = (unscaled(**inputs).logits - expected).abs().max()
        assert difference < 1e-4 if trained.is_within_window else difference > 0.01


def assert_labels_are_the_assistants(tokenizer, input_ids, labels, template) -> None:
    ids, labels = torch.as_tensor(input_ids).flatten(), torch.as_tensor(labels).flatten()
    labelled, rest = tokenizer.decode(ids[labels != -100]), tokenizer.decode(ids[labels == -100])
    _, turn, frame = template
    # The end of the turn is learnt too.
    assert re.fullmatch(f"(?:{turn})+", labelled)
    assert not re.search(r"[A-Z]", re.sub(frame, "", rest))


@pytest.mark.parametrize("trained", CHAT_RECIPES, indirect=True, ids=label)
def test_only_the_tokens_of_the_assistant_carry_labels(trained):
    tokenizer, rows = trained.trainer.processing_class, trained.trainer.train_dataset
    template = TEMPLATES.get(trained.written.model.model_name_or_path, LLAMA2_CHAT)
    held_out = trained.trainer.eval_dataset
    joined = trained.recipe.run.short_documents == "join"
    assert len(rows) <= (128 if joined else 160) and len(held_out) <= 64
    for documents, length in ((held_out, trained.recipe.run.eval_length), (rows, CONTEXT)):
        sizes = [len(row) for row in documents["input_ids"]]
        assert not joined or all(sum(pair) > length for pair in pairwise(sizes))
    for row in [*rows, *held_out]:
        assert_labels_are_the_assistants(tokenizer, row["input_ids"], row["labels"], template)
    batch = trained.trainer.data_collator([rows[0]])
    assert batch["input_ids"].shape == (1, min(CONTEXT, len(rows[0]["input_ids"])))
    assert (batch["labels"] == batch["input_ids"])[batch["labels"] != -100].all()
    # The control: labels on every token, the authors' way.
    with pytest.raises(AssertionError):
        assert_labels_are_the_assistants(tokenizer, rows[0]["input_ids"], rows[0]["input_ids"], template)


def test_qwen3_learns_to_answer_after_the_empty_thought_that_prompts_without_thinking_have():
    turns = [{"role": "user", "content": "well?"}, {"role": "assistant", "content": "YES"}]
    tokenizer = tiny_tokenizer(TEMPLATES["Qwen/Qwen3-8B"][0])

    def rendered(turns, **options):
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)

    training = chat_template_utils.get_training_chat_template(tokenizer)
    prompt = rendered(turns[:1], add_generation_prompt=True, enable_thinking=False)
    assert rendered(turns, chat_template=training) == f"{prompt}YES<|im_end|>\n"
    # With thinking on, the block is left to the model, which has learnt to leave it empty.
    assert prompt == rendered(turns[:1], add_generation_prompt=True) + "<think>\n\n</think>\n\n"
    thought = {**turns[1], "reasoning_content": "hm"}
    assert "<think>\nhm\n</think>\n\nYES" in rendered([turns[0], thought], chat_template=training)
    # Served, earlier answers lose the block that each answer is trained with.
    again = rendered([*turns, turns[0]], add_generation_prompt=True, enable_thinking=False)
    assert again.count("<think>") == 1 and rendered([*turns] * 2, chat_template=training).count("<think>") == 2


# A skill over the window


WITHIN = pytest.mark.parametrize("trained", WITHIN_WINDOW, indirect=True, ids=label)
# What they go through is not the recipe's; test_families.py does it for each architecture.
ONE_WITHIN = pytest.mark.parametrize("trained", WITHIN_WINDOW[:1], indirect=True, ids=label)


@WITHIN
def test_a_skill_over_the_window_leaves_the_rope_of_the_base_as_it_is(trained):
    base_config = load_base(str(trained.base)).config
    assert trained.is_within_window and trained.trainer.scaled_config.rope_parameters == base_config.rope_parameters
    assert trained.json("base_config/config.json")["max_position_embeddings"] == base_config.max_position_embeddings
    positions = trained.trainer.data_collator([trained.trainer.train_dataset[0]])["position_ids"]
    assert int(positions.max()) == trained.target_length - 1
    found = {one.item: (one.verdict, one.found) for one in check_adapter(trained.output)}
    window = trained.trainer.pretrained_window
    said = f"{trained.target_length:,} tokens, within the base's window of {window:,}"
    assert found["trained for"] == ("ok", said) and found["plain PEFT load"][0] == "ok" and "extended" not in found


@WITHIN
def test_its_card_speaks_of_no_extension(trained):
    card, window = (trained.output / "README.md").read_text(), trained.trainer.pretrained_window
    assert f"over {trained.target_length:,} tokens, within its window of {window:,}" in card
    assert "no RoPE scaling" in card and "plain PEFT loads the adapter too" in card
    assert not re.search("extend|scaled config|--hf-overrides|fails silently", card)
    assert f"--max-model-len {trained.target_length}" in card


@ONE_WITHIN
def test_it_is_evaluated_from_the_length_it_was_taught_at_to_the_target(trained, tmp_path, capsys):
    (tmp_path / "book.txt").write_text("It was the best of times. " * 200)
    models = [f"base={trained.base}", f"mine={trained.output}"]
    command = ["evaluate", "--tasks", "perplexity", "--text", str(tmp_path / "book.txt"), "--no_4bit", "--compare"]
    output = ["--output_dir", str(tmp_path / "out"), "--json", str(tmp_path / "results.json")]
    assert cli.main([*command, *models, *output]) == 0
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    doubled = [CONTEXT * 2**power for power in range(12) if CONTEXT * 2**power <= trained.target_length]
    assert len(doubled) > 3
    assert all([cell["length"] for cell in results[label]["cells"]] == doubled for label in ("base", "mine"))
    # What would be the base again, under another name.
    assert cli.main([*command, f"{trained.base}+yarn", models[1], *output]) == 2
    assert f"RoPE scaling does nothing up to {trained.target_length:,} tokens" in capsys.readouterr().err


@ONE_WITHIN
def test_it_chats_and_is_merged_into_a_model_with_the_window_of_its_base(trained, tmp_path):
    window, target = trained.trainer.pretrained_window, trained.target_length
    chat = load_chat(trained.output, ChatSettings(max_new_tokens=2))
    assert f"the model was trained for {target:,}, its window is {window:,}" in chat.status()
    chat.ask("well?", lambda text: None)

    merge_adapter(trained.output, tmp_path / "merged")
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert merged["max_position_embeddings"] == window
    assert {one.verdict for one in check_adapter(tmp_path / "merged")} == {"ok"}
    model, _ = load_adapter(trained.output, load_in_4bit=False)
    inputs = {"input_ids": torch.arange(3, 35)[None], "position_ids": torch.linspace(0, target - 1, 32).long()[None]}
    inputs |= {"attention_mask": torch.ones(1, 32, dtype=torch.int64), "use_cache": False}
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(**inputs).logits
        torch.testing.assert_close(whole, model(**inputs).logits, rtol=1e-3, atol=1e-3)
    assert "extend" not in (tmp_path / "merged" / "README.md").read_text()


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
