"""What CREAMTrainer refuses of its arguments, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, PromptLearningConfig
from transformers import BitsAndBytesConfig, ProcessorMixin

from ..model.fingerprint import differing, from_files
from ..model.misfit import refuse_unrepeatable
from .collator import MIXED, CREAMDataCollator
from .config import CREAMConfig
from .distillation import refuse_distillation


def refuse_arguments(
    model: Any,
    args: CREAMConfig,
    peft_config: PeftConfig | None,
    quantization_config: BitsAndBytesConfig | None,
    processing_class: Any,
    eval_dataset: Any,
) -> None:
    """Refuse arguments that do not go together.

    Raises:
        TypeError: args of another kind.
        ValueError: naming the argument, and what to do.
    """
    if not isinstance(args, CREAMConfig):
        raise TypeError(f"args must be a CREAMConfig, got {type(args).__name__}")
    if isinstance(model, PeftModel) and not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model's adapter is frozen: load it with load_adapter(..., is_trainable=True)")
    if quantization_config is not None and not isinstance(model, str):
        raise ValueError("quantization_config goes with a model's name: a model that is loaded already stays as it is")
    if getattr(quantization_config, "load_in_8bit", False) or getattr(model, "is_loaded_in_8bit", False):
        raise ValueError("a base in 8 bits is not offered: use load_in_4bit=True, or 16 bits")
    if peft_config is not None and isinstance(model, PeftModel):
        raise ValueError("peft_config goes with a base: the model has an adapter already, which is trained further")
    if isinstance(peft_config, PromptLearningConfig):
        kind = getattr(peft_config.peft_type, "value", peft_config.peft_type)
        raise ValueError(
            f"peft_config={kind} puts tokens of its own before those that positions are drawn for: use LoRA"
        )
    if isinstance(model, PeftModel) and (name := model.active_adapter) != "default":
        raise ValueError(f"the model's adapter is called {name!r}: PEFT saves it elsewhere unless it is 'default'")
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError("processing_class is a processor of images or sound too: pass its tokenizer")
    if isinstance(eval_dataset, dict) and args.metric_for_best_model in ("loss", "eval_loss"):
        metrics = ", ".join(f"eval_{name}_loss" for name in eval_dataset)
        raise ValueError(f"eval_dataset holds several sets: set metric_for_best_model to the loss of one, of {metrics}")
    if peft_config is None and not isinstance(model, PeftModel) and args.sharded_by == "DeepSpeed":
        raise ValueError("use_peft=false cannot go with DeepSpeed, which saves no whole weight: use FSDP, or LoRA")
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            raise ValueError(f"{name}=true rounds RoPE's frequencies, and what is trained: leave it out")
    refuse_unrepeatable(peft_config)
    refuse_distillation(args, peft_config)


def refuse_unsaved_weights(model: Any, values: dict[str, list[float]], files: Mapping[str, tuple[Path, str]]) -> None:
    """Refuse a base that was changed after it was loaded, such as merged or with tokens added: the adapter would name
    one with other weights. `values`: its fingerprint; `files`: those of the base that it names.

    Raises:
        ValueError: naming a tensor.
    """
    if not isinstance(model, PeftModel) and (tensor := differing(values, from_files(files))):
        raise ValueError(
            f"the model's {tensor} has other values than the files of {model.config._name_or_path}, which the adapter "
            "would name as its base: save the model with save_pretrained, and load it from there"
        )


def refuse_documents(dataset: Any, eval_dataset: Any, args: CREAMConfig) -> None:
    """Refuse a training set without documents, of which TRL takes the first, and what cannot go with a streamed one.

    Raises:
        ValueError: naming the set, or the setting.
    """
    is_empty = isinstance(dataset, Dataset) and not len(dataset)
    if is_empty or (isinstance(dataset, IterableDataset) and next(iter(dataset), None) is None):
        raise ValueError("train_dataset is empty: it must hold documents, a row each")
    held_out = eval_dataset.values() if isinstance(eval_dataset, dict) else (eval_dataset,)
    if args.world_size > 1 and any(isinstance(one, IterableDataset) for one in (dataset, *held_out)):
        raise ValueError(
            f"a streamed data set cannot go with {args.world_size} processes: each would number the documents anew, "
            "and wait for ever for one that has fewer. Do not stream, or train in one process"
        )
    if isinstance(dataset, IterableDataset) and args.dataloader_num_workers:
        raise ValueError(
            f"dataloader_num_workers={args.dataloader_num_workers} cannot go with a streamed data set: each worker "
            "would number the documents anew. Set it to 0, or do not stream"
        )
    if isinstance(dataset, IterableDataset) and args.target_growth:
        raise ValueError(
            f"target_growth={args.target_growth:g} cannot go with a streamed data set, of which a resumed run "
            "reads what it skips: set it to 0, or do not stream"
        )


def refuse_other_collator(given: Any, ours: CREAMDataCollator) -> None:
    """Refuse a data collator that draws no CREAM positions, or others than `ours`. A seed and an eval_length that it
    leaves out are filled in.

    Raises:
        ValueError: naming what differs.
    """
    if given is None:
        return
    if not isinstance(given, CREAMDataCollator):
        raise ValueError(
            f"data_collator={type(given).__name__} draws no CREAM positions: leave it out, or subclass "
            "CREAMDataCollator"
        )
    for name in ("eval_length", "seed"):
        if getattr(given, name) is None:
            setattr(given, name, getattr(ours, name))
    for name in ("context_length", "target_length", "eval_length", "position_strategy", "strategy_options", *MIXED):
        if getattr(given, name) != getattr(ours, name):
            raise ValueError(
                f"data_collator has {name}={getattr(given, name)}, args {getattr(ours, name)}: make them equal"
            )
