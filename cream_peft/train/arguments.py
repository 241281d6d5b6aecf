"""The dataclasses that a recipe fills in beside CREAMConfig: the model and the data."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import ModelConfig, ScriptArguments

from .config import documented, one_of, option, refuse_below


@documented
@dataclass
class CREAMModelArguments(ModelConfig):
    """TRL's ModelConfig with QLoRA on the attention layers as the default."""

    model_name_or_path: str | None = option(
        None, "Base model: a Hub id or a local folder, or cream-peft-tiny, the embedded one."
    )
    dtype: str | None = option(None, "Precision of what is not quantized. None: bfloat16 on a GPU, float32 on a CPU.")
    use_peft: bool = option(True, "Train a LoRA adapter. false: train every weight, which takes many times the memory.")
    adapter_name_or_path: str | None = option(
        None, "Adapter of cream-peft, a Hub id or a folder, to train further: on other data, or to a longer target."
    )
    lora_dropout: float = option(0.0, "LoRA dropout.")
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"],
        metadata={"help": "Modules that get a LoRA adapter."},
    )
    load_in_4bit: bool | None = option(  # ty: ignore[incompatible-attribute-override] None until __post_init__
        None, "Quantize the base to 4 bits when loading. None: true, with use_peft: false it is false."
    )
    use_bnb_nested_quant: bool = option(True, "Quantize the quantization constants too (double quantization).")

    def __post_init__(self):
        if self.load_in_4bit is None:
            self.load_in_4bit = self.use_peft
        if not self.use_peft and (self.load_in_4bit or self.adapter_name_or_path):
            name = "load_in_4bit=true" if self.load_in_4bit else f"adapter_name_or_path={self.adapter_name_or_path}"
            raise ValueError(f"use_peft=false trains every weight of the base, which cannot go with {name}")
        if self.load_in_8bit:
            raise ValueError("load_in_8bit=true is not offered: use load_in_4bit=true, or false for 16-bit")
        refuse_below(1, self, "lora_r", "lora_alpha")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout:g} must be at least 0 and below 1")
        one_of("dtype", self.dtype, (None, "auto", "bfloat16", "float16", "float32"))
        one_of("lora_task_type", self.lora_task_type, ("CAUSAL_LM",))
        super().__post_init__()
        # TRL unwraps a list of one, and PEFT would take the name for a pattern of whole paths.
        if isinstance(modules := self.lora_target_modules, str) and modules.isidentifier():
            self.lora_target_modules = [modules]


@documented
@dataclass
class CREAMDataArguments(ScriptArguments):
    """TRL's ScriptArguments; `dataset_name` may also be a local file or folder."""

    dataset_name: str | None = option(
        None, "Hub id, folder, or .jsonl, .json, .parquet, .txt, .md file; cream-peft-tiny is the embedded one"
    )
    dataset_revision: str | None = option(None, "Commit, tag or branch of the data set.")
    dataset_test_split: str | None = option(  # ty: ignore[incompatible-attribute-override] None: no such split
        None, "Split for evaluation. None: the documents held out by held_out_documents."
    )
    held_out_documents: int = option(
        0, "Documents taken off the training split for evaluation when dataset_test_split is None."
    )
    max_documents: int | None = option(None, "Use only the first so many documents. None: all of them.")

    def __post_init__(self):
        refuse_below(0, self, "held_out_documents")
        refuse_below(1, self, "max_documents")
