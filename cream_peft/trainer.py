"""CREAMTrainer: TRL's SFTTrainer with CREAM positions."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import logging
import os
import platform
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback
from trl import SFTTrainer

from . import __version__, hub, rope
from .adapter import fingerprint
from .collator import ROW_COLUMN, CREAMDataCollator
from .config import CREAMConfig
from .data import fit_short_documents, training_chat_template
from .model import keep_4bit_trainable_on_cpu, load_base, load_tokenizer
from .positions import SIGMA_PER_FACTOR
from .tiny import TINY_ID, base_folder

logger = logging.getLogger(__name__)

PROOF_TOKENS = 64
LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "huggingface_hub")


class PositionError(RuntimeError):
    """The model does not see what the position sampler drew."""


def versions() -> dict[str, str]:
    """Versions of this package and of those that decide what it computes."""
    return {"cream_peft": __version__} | {name: importlib.metadata.version(name) for name in LIBRARIES}


def machine() -> str:
    """The device that computes: the GPU's name, or the CPU's kind and number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {os.cpu_count()} cores"


class _SetEpoch(TrainerCallback):
    def __init__(self, collator: CREAMDataCollator):
        self.collator = collator

    def on_train_begin(self, args, state, control, **kwargs):
        self.epoch = int(state.epoch or 0)

    # Counted, not read from state.epoch: with a streamed data set that one lags behind.
    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.set_epoch(self.epoch)
        self.epoch += 1


class CREAMTrainer(SFTTrainer):
    """SFTTrainer whose training examples are draws of CREAM positions (arXiv 2406.07138) from whole documents.

    It takes SFTTrainer's arguments, with a CREAMConfig. What it changes: the base's RoPE is scaled to
    `args.target_length`, the data collator is a CREAMDataCollator, adapters stay in fp32, and what it saves says how
    the base was scaled. Evaluation runs at plain positions. The loss is TRL's own.

    Raises:
        PositionError: from `train`, before the first step, if the drawn positions do not reach the model or attention
            does not cross the segments.
    """

    _tag_names = ["trl", "sft", "cream", "long-context"]
    _name = "CREAM"

    def __init__(self, model, args: CREAMConfig | None = None, data_collator=None, train_dataset=None, **kwargs: Any):
        args = args if args is not None else CREAMConfig()
        if not isinstance(args, CREAMConfig):
            raise TypeError(f"args must be a CREAMConfig, got {type(args).__name__}")
        self.recipe: dict[str, Any] = {}
        model = self._scaled_model(model, args, kwargs.pop("quantization_config", None))
        if kwargs.get("processing_class") is None:
            kwargs["processing_class"] = load_tokenizer(model.config._name_or_path)
        tokenizer = kwargs["processing_class"]
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
        if isinstance(train_dataset, IterableDataset) and args.dataloader_num_workers:
            raise ValueError(
                f"dataloader_num_workers={args.dataloader_num_workers} cannot go with a streamed data set: each worker "
                "would number the documents anew. Set it to 0, or do not stream"
            )
        self._training_documents = train_dataset
        given = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        if not isinstance(model, PeftModel):
            given = {}

        served_template, template = tokenizer.chat_template, None
        if args.assistant_only_loss:
            template = training_chat_template(tokenizer)
            tokenizer.chat_template = template or served_template
        try:
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator or self._collator(args, tokenizer),
                train_dataset=train_dataset,
                **kwargs,
            )
        finally:
            if template is not None:
                tokenizer.chat_template = served_template
        self.chat_template = template or self.chat_template

        if isinstance(self.data_collator, CREAMDataCollator):
            self.add_callback(_SetEpoch(self.data_collator))
        keep_4bit_trainable_on_cpu(self.model)
        if isinstance(self.model, PeftModel):
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    # TRL casts QLoRA adapters to bf16, where most updates at usual learning rates are rounded away.
                    parameter.data = given.get(name, parameter.data).to(parameter.device, torch.float32)

    def _scaled_model(self, model: Any, args: CREAMConfig, quantization_config: Any) -> nn.Module:
        if isinstance(model, str):
            options = dict(args.model_init_kwargs or {})
            if quantization_config is not None:
                options["quantization_config"] = quantization_config
            model = load_base(model, load_in_4bit=False, **options)
            args.model_init_kwargs = None
        unscaled = getattr(model, "unscaled_config", None) or copy.deepcopy(model.config)
        args.resolve(rope.pretrained_window(unscaled))
        self.pretrained_window = rope.pretrained_window(unscaled)
        self.scaled_config = rope.scaled_config(unscaled, args.target_length, args.rope_scaling_type)
        rope.apply_scaling(model, self.scaled_config)
        model.unscaled_config = unscaled
        self.base_fingerprint = fingerprint(model)
        return model

    @staticmethod
    def _collator(args: CREAMConfig, tokenizer: Any) -> CREAMDataCollator:
        return CREAMDataCollator(
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
            context_length=args.context_length,
            target_length=args.target_length,
            position_strategy=args.position_strategy,
            strategy_options=args.strategy_options(),
            seed=args.data_seed if args.data_seed is not None else args.seed,
            eval_length=args.eval_length,
            pad_to_multiple_of=args.pad_to_multiple_of,
        )

    # TRL prepares training and evaluation sets here; an evaluation set may be called "train", so the name says nothing.
    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        is_training = dataset is self._training_documents
        if is_training:
            # The training set comes first; the same object handed over for evaluation is an evaluation set.
            self._training_documents = None
        dataset = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        if not is_training:
            columns = dataset.column_names or []
            return (dataset.remove_columns(ROW_COLUMN) if ROW_COLUMN in columns else dataset).with_format("numpy")
        dataset = fit_short_documents(dataset, args.short_documents, args.context_length)
        if isinstance(dataset, Dataset):
            dataset = dataset.add_column(ROW_COLUMN, range(len(dataset)))
        else:
            dataset = dataset.map(lambda row, index: {**row, ROW_COLUMN: index}, with_indices=True)
        return dataset.with_format("numpy")

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if ROW_COLUMN not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, ROW_COLUMN]

    def train(self, *args: Any, **kwargs: Any):
        self.prove_positions()
        return super().train(*args, **kwargs)

    def prove_positions(self) -> None:
        """Show on this model, through this trainer's own loss, that positions arrive and attention crosses segments.

        Feeds the first tokens of one training document twice, the second time with other tokens in the head segment.
        The rotary embedding must be given the drawn positions, and what the model makes of the last token must change.

        Raises:
            PositionError: if either fails.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            logger.warning("positions are not proved before training: the model is not on one device yet")
            return
        row = next(iter(self.train_dataset))
        input_ids = row["input_ids"][:PROOF_TOKENS]
        example = {"input_ids": input_ids, "labels": input_ids, ROW_COLUMN: row.get(ROW_COLUMN, 0)}
        batch = self.data_collator([example])
        if "position_ids" not in batch:
            raise PositionError(f"{type(self.data_collator).__name__} emits no position_ids: use CREAMDataCollator")
        wanted = batch["position_ids"][0]
        jumps = torch.nonzero(wanted.diff() != 1).flatten()
        head_length = int(jumps[0]) + 1 if len(jumps) else max(1, len(wanted) // 2)
        changed = {name: tensor.clone() for name, tensor in batch.items()}
        changed["input_ids"][:, :head_length] += 1
        changed["input_ids"] %= self.scaled_config.vocab_size

        arrived, last = self._observe(batch)
        _, last_changed = self._observe(changed)
        if not torch.equal(arrived.flatten()[-len(wanted) :], wanted.to(arrived)):
            raise PositionError(
                "the drawn position_ids do not reach the model's rotary embedding: something between the data "
                "collator and the model replaces them"
            )
        if len(wanted) > head_length and torch.equal(last, last_changed):
            raise PositionError(
                "attention does not cross the segments: the last token does not see the head. Without an "
                "attention_mask transformers takes each jump of the positions for a new document"
            )

    def _observe(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions [tokens] that the rotary embedding got, and the last token's hidden state, both on the CPU."""
        seen: dict[str, torch.Tensor] = {}

        def positions_hook(module, args, kwargs):
            seen["positions"] = kwargs["position_ids"] if "position_ids" in kwargs else args[1]

        def hidden_hook(module, args, output):
            seen["hidden"] = output[0][:, -1]

        decoder = self.accelerator.unwrap_model(self.model)
        decoder = (decoder.get_base_model() if isinstance(decoder, PeftModel) else decoder).get_decoder()
        was_training = self.model.training
        self.model.eval()
        with ExitStack() as stack:
            for module in decoder.modules():
                if "RotaryEmbedding" in type(module).__name__:
                    hook = module.register_forward_pre_hook(positions_hook, with_kwargs=True)
                    stack.callback(hook.remove)
            stack.callback(decoder.register_forward_hook(hidden_hook).remove)
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.compute_loss_context_manager())
            self.compute_loss(self.model, self._prepare_inputs(dict(batch)))
        self.model.train(was_training)
        self._metrics["eval"].clear()
        return seen["positions"].cpu(), seen["hidden"].float().cpu()

    def base_model_name(self) -> str:
        """The base's public name: `base_model_id`, its Hub id, or a local folder's last part. Never a path."""
        name = self.args.base_model_id or self.unwrapped_config()._name_or_path
        if name == str(base_folder()):
            return TINY_ID
        return Path(name).name if Path(name).exists() else name

    def base_is_local(self) -> bool:
        """Whether the name above is a folder's, which says nobody where to find the base."""
        name = self.unwrapped_config()._name_or_path
        return self.args.base_model_id is None and name not in (TINY_ID, str(base_folder())) and Path(name).exists()

    def unwrapped_config(self):
        return self.accelerator.unwrap_model(self.model).config

    def describe(self) -> dict[str, Any]:
        """What cream.json says: how to scale the base, how positions were drawn, with which versions and seed."""
        args, collator = self.args, self.data_collator
        positions: dict[str, Any] = {"strategy": type(collator).__name__}
        if isinstance(collator, CREAMDataCollator):
            factor = collator.target_length / collator.context_length
            sigma = collator.strategy_options.get("sigma") or SIGMA_PER_FACTOR * factor
            positions = {
                "strategy": collator.position_strategy,
                "context_length": collator.context_length,
                "factor": factor,
                "sigma": sigma if collator.position_strategy == "cream" else None,
                "seed": collator.seed,
                "short_documents": args.short_documents,
                "redrawn": collator.redrawn(),
                "unlabelled": collator.unlabelled(),
            }
        return {
            "base_model": self.base_model_name(),
            "base_is_local": self.base_is_local(),
            "base_revision": getattr(self.unwrapped_config(), "_commit_hash", None),
            "base_fingerprint": self.base_fingerprint,
            "pretrained_window": self.pretrained_window,
            "target_length": args.target_length,
            "rope_scaling_type": args.rope_scaling_type,
            "positions": positions,
            "steps": self.state.global_step,
            "machine": machine(),
            "seed": args.seed,
            "versions": versions(),
            "recipe": self.recipe,
        }

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        # It would carry the Hub token and local paths to the Hub, and nothing reads it back.
        (folder / "training_args.bin").unlink(missing_ok=True)
        rope.save_base_config(self.scaled_config, folder)
        adapter_config = folder / "adapter_config.json"
        if adapter_config.is_file():
            content = json.loads(adapter_config.read_text(encoding="utf-8"))
            content["base_model_name_or_path"] = self.base_model_name()
            adapter_config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        description = self.describe()
        (folder / "cream.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        hub.write_card(folder, description, self._public_name())

    def _public_name(self) -> str | None:
        return self.hub_model_id if self.args.push_to_hub else None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write our card where TRL would put its own."""
        if self.is_world_process_zero():
            hub.write_card(self.args.output_dir, self.describe(), self._public_name())
