"""Small models and documents, made in code and seeded."""

import os

# Before any library of the Hub is imported: no test may wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import importlib.util
import shutil
import sys
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cream_peft import CREAMConfig
from cream_peft.plan.memory import Reading, Training, Validation
from cream_peft.tiny import base_folder
from cream_peft.train.recipe import parse_recipe
from cream_peft.train.run import run_recipe

datasets.disable_progress_bars()
torch.set_num_threads(1)

WINDOW, TARGET = 64, 512
ROOT = Path(__file__).parents[1]


def load_script(path):
    """A script of the repository that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look for the types of their fields.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def estimate(config, **settings):
    return Training(**settings).terms(config)


def estimate_validation(config, **settings):
    return Validation(**settings).terms(config)


def estimate_evaluation(config, **settings):
    return Reading(**settings).terms(config)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of an adapter of the embedded model, trained for two steps. Not to be changed: take `adapter`."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_recipe(parse_recipe(["--max_steps", "2", "--output_dir", str(folder), "--save_strategy", "no"]))
    return folder


@pytest.fixture
def adapter(trained, tmp_path):
    """A copy of `trained` of one's own."""
    return Path(shutil.copytree(trained, tmp_path / "adapter"))


@pytest.fixture
def tiny_tokenizer():
    return AutoTokenizer.from_pretrained(base_folder())


@pytest.fixture
def make_model():
    def make(seed=0, **changes):
        torch.manual_seed(seed)
        settings = {
            "vocab_size": 385,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": WINDOW,
            "attn_implementation": "eager",
        }
        return LlamaForCausalLM(LlamaConfig(**(settings | changes)))

    return make


@pytest.fixture
def byte_tokenizer():
    """One token a byte, so that what carries a label can be read back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: index + 2 for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def make_documents():
    def make(count=24, tokens=3 * WINDOW, **columns):
        generator = torch.Generator().manual_seed(1)
        rows = torch.randint(1, 385, (count, tokens), generator=generator).tolist()
        return Dataset.from_dict({"input_ids": rows, **columns})

    return make


@pytest.fixture
def make_config(tmp_path):
    def make(**changes):
        settings = {
            "output_dir": str(tmp_path / "run"),
            "context_length": WINDOW,
            "target_length": TARGET,
            "rope_scaling_type": "ntk",
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "lr_scheduler_type": "linear",
            "max_steps": 2,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "gradient_checkpointing": False,
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
            "report_to": "none",
            "seed": 0,
        }
        return CREAMConfig(**(settings | changes))

    return make


@pytest.fixture
def lora():
    def make(**changes):
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
        return LoraConfig(**(settings | changes), task_type="CAUSAL_LM")

    return make
