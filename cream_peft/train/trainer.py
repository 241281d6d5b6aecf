"""CREAMTrainer: TRL's SFTTrainer with CREAM positions."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs, gather_object
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import has_length
from trl.trainer import utils as trl_utils

from .. import rope
from ..model.attention import use_repeating_sdpa
from ..model.base import (
    CPU,
    WHOLE_DTYPE,
    check_module_names,
    keep_4bit_trainable_on_cpu,
    keep_adapter_in_fp32,
    load_base,
    local_snapshot,
    resolve_base,
)
from ..model.fingerprint import fingerprint, weight_files
from ..model.record import Record
from ..model.tokenizer import extended_max_length, load_tokenizer, with_pad_token
from .checkpoints import ResumingTrainer
from .collator import EVALUATION_ROW, MIXED, ROW_COLUMN, CREAMDataCollator
from .config import CREAMConfig, default_learning_rate
from .data import fingerprinted, prepare_columns
from .distillation import distil
from .output import refuse_output
from .preflight import check_positions
from .refusals import refuse_arguments, refuse_documents, refuse_other_collator, refuse_unsaved_weights
from .rows import column_names
from .templates import is_marked, set_chat_template, with_answer_masks
from .tokenised import CUT, fit_held_out_documents, fit_short_documents, report_unlabelled, warn_of_cut
from .watch import CheckScaling, StopIfNotFinite, digest, refuse_useless

logger = logging.getLogger(__name__)


class _SetEpoch(TrainerCallback):
    def __init__(self, collator: CREAMDataCollator):
        self.collator = collator

    # As transformers counts the epochs of a run that is resumed, perhaps with other batches than those of state.epoch.
    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.epoch = int(state.epoch or 0)
        if state.global_step and has_length(train_dataloader):
            steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
            self.epoch = state.global_step // max(1, steps)

    # Counted, not read from state.epoch: with a streamed data set that one lags behind.
    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.set_epoch(self.epoch)
        self.collator.set_progress(state.global_step, state.max_steps, args.gradient_accumulation_steps)
        self.epoch += 1


@contextmanager
def _only_labels_projected() -> Generator[None]:
    """On a CPU only positions with a label go through the LM head, as on a GPU.

    TRL projects all of them where it has no Triton (`_fused_forward`): with short answers that is half of a step.
    """
    has_triton = trl_utils._use_triton
    trl_utils._use_triton = lambda device: device.type == "cpu" or has_triton(device)  # ty: ignore[invalid-assignment]
    try:
        yield
    finally:
        trl_utils._use_triton = has_triton


class CREAMTrainer(ResumingTrainer):
    """SFTTrainer whose training examples are draws of CREAM positions (arXiv 2406.07138) from whole documents.

    It takes SFTTrainer's arguments (`kwargs` are passed on), with a CREAMConfig. What it changes: the base's RoPE is
    scaled to `args.target_length`, the data collator is a CREAMDataCollator, adapters stay in fp32, and what it saves
    says how the base was scaled. Evaluation runs at plain positions. The loss is TRL's own; with a distillation_weight
    the gradient of a second one is added, see `distillation.distil`, and logged beside it as distillation_loss.

    Raises:
        PositionError: from `train`, before the first step, if the drawn positions do not reach the model or attention
            does not cross the segments.
    """

    _tag_names = ["trl", "sft", "cream", "long-context"]
    _name = "CREAM"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: CREAMConfig | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        callbacks: list[TrainerCallback] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        args = args if args is not None else CREAMConfig()
        refuse_arguments(model, args, peft_config, quantization_config, processing_class, eval_dataset)
        # What is filled in here is of this base; the caller may use the config for another.
        args = copy.copy(args)
        if args.device.type == "cpu":
            # There is nowhere to offload from, and TRL's offloading fails when it looks for a GPU.
            args.activation_offloading = False
        self.recipe: dict[str, Any] = {}
        self.seconds: float | None = None
        base = self._scaled_model(model, args, quantization_config, peft_config is None)
        refuse_output(Path(str(args.output_dir)), base.config._name_or_path)
        is_peft = peft_config is not None or isinstance(base, PeftModel)
        if args.learning_rate is None:
            args.learning_rate = default_learning_rate(base.config.get_text_config().hidden_size, is_peft)
        if processing_class is None:
            commit = getattr(base.config, "_commit_hash", None)
            trusted = args.trust_remote_code
            folder = getattr(base, "trained_folder", None)
            source, revision = (folder, None) if folder else (base.config._name_or_path, commit)
            processing_class = load_tokenizer(source, revision=revision, trust_remote_code=trusted)
        tokenizer = with_pad_token(processing_class)
        # Else it warns of documents that the model is about to learn to read.
        tokenizer.model_max_length = extended_max_length(tokenizer.model_max_length, self.lengths.target_length)
        if args.chat_template_path:
            set_chat_template(tokenizer, args.chat_template_path)
            args.chat_template_path = None
        collator = self._collator(args, tokenizer)
        refuse_other_collator(data_collator, collator)
        refuse_documents(train_dataset, eval_dataset, args)
        self._training_documents = train_dataset
        handed_over = base.named_parameters() if isinstance(base, PeftModel) else ()
        given = {name: p.detach().clone() for name, p in handed_over if p.requires_grad}

        # Else TRL finds the answers, and needs a chat template that it knows, or one with marks.
        self._find_answers = bool(args.assistant_only_loss) and not is_marked(tokenizer)
        # Nor are there answers in what a function of the user's makes of a row: TRL says what it can do.
        self._find_answers &= kwargs.get("formatting_func") is None
        if self._find_answers:
            args.assistant_only_loss = False
        super().__init__(
            model=base,
            args=args,
            data_collator=data_collator or collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            peft_config=peft_config,
            **kwargs,
        )

        self.add_callback(_SetEpoch(self.data_collator))
        self.add_callback(StopIfNotFinite(self.accelerator.mixed_precision))
        self.add_callback(CheckScaling(self.scaled_config))
        keep_4bit_trainable_on_cpu(self.model)
        if not isinstance(self.model, PeftModel):
            # Else autocast keeps its 16-bit copies of all weights until a forward pass ends, and uses each but once.
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        # DeepSpeed keeps fp32 copies of its own, and gathers parameters of one dtype only.
        if isinstance(self.model, PeftModel) and not self.is_deepspeed_enabled:
            check_module_names(self.model)
            self._check_modules_to_save()
            keep_adapter_in_fp32(self.model, given)

    def _check_modules_to_save(self) -> None:
        # LoRA's layers take any precision; a norm in fp32 hands its own on to the next layer.
        whole = getattr(self.model.active_peft_config, "modules_to_save", None)
        if whole and self.accelerator.mixed_precision == "no" and self.model.dtype != torch.float32:
            dtype = str(self.model.dtype).removeprefix("torch.")
            raise ValueError(
                f"lora_modules_to_save={whole} trains in float32 and the base computes in {dtype}, which needs mixed "
                "precision: set bf16 or fp16 to true on a GPU, dtype to float32 on a CPU, or leave it out"
            )

    def _scaled_model(
        self, model: Any, args: CREAMConfig, quantization_config: BitsAndBytesConfig | None, is_whole: bool
    ) -> Any:
        if isinstance(model, str):
            options: dict[str, Any] = dict(args.model_init_kwargs or {})  # ty: ignore[no-matching-overload] no text by now
            if quantization_config is not None:
                options["quantization_config"] = quantization_config
            options.setdefault("trust_remote_code", args.trust_remote_code)
            if args.use_cpu:
                options.setdefault("device_map", CPU)
            if is_whole:
                options.setdefault("dtype", WHOLE_DTYPE)
            model = load_base(model, load_in_4bit=False, **options)
            args.model_init_kwargs = None
        use_repeating_sdpa()
        unscaled: Any = getattr(model, "unscaled_config", None) or rope.unscaled_config(model.config)
        self.earlier: Record | None = getattr(model, "trained_record", None)
        ups = [p for name, p in model.named_parameters() if "lora_B" in name] if isinstance(model, PeftModel) else []
        if self.earlier is None and any(p.any() for p in ups):
            logger.warning(
                "the model's adapter is trained already, and nothing says with which RoPE scaling: load it with "
                "load_adapter to train it further"
            )
        if self.earlier and self.earlier.rope_scaling_type != args.rope_scaling_type:
            raise ValueError(
                f"rope_scaling_type={args.rope_scaling_type or 'none'}, and the adapter was trained with "
                f"{self.earlier.rope_scaling_type or 'none'}: set the same"
            )
        if self.earlier:
            reached = self.earlier.target_length
            args.target_length = args.target_length or reached
            if args.target_length < reached:
                raise ValueError(
                    f"target_length={args.target_length}, and the adapter reached {reached}: set as much or more"
                )
        self.pretrained_window = rope.pretrained_window(unscaled)
        self.lengths = args.resolve(self.pretrained_window)
        if self.lengths.context_length == self.lengths.target_length and args.position_strategy != "contiguous":
            logger.warning(
                "context_length is target_length, %s tokens: there are no other positions to draw than a plain "
                "fine-tune's. Set context_length to the length of your examples, or target_length beyond it",
                f"{self.lengths.target_length:,}",
            )
        for doubt in rope.doubts(unscaled, self.lengths.target_length, args.rope_scaling_type):
            logger.warning(doubt)
        self.scaled_config = rope.scaled_config(unscaled, self.lengths.target_length, args.rope_scaling_type)
        rope.apply_scaling(model, self.scaled_config)
        model.unscaled_config = unscaled
        # Of a model that load_base did not load nothing says which commit it is of.
        name, commit = model.config._name_or_path, getattr(model.config, "_commit_hash", None)
        self.base_revision = commit if args.base_model_id in (None, name) else None
        # Of a quantized model the files say what it was made of, if they are known to be its own.
        is_known = commit is not None or Path(resolve_base(name)).is_dir()
        folder = local_snapshot(name, commit) if name and is_known else None
        files = weight_files(folder) if folder else {}
        self.base_fingerprint = fingerprint(model, files)
        if not is_whole:
            refuse_unsaved_weights(model, self.base_fingerprint, files)
        return model

    def _collator(self, args: CREAMConfig, tokenizer: Any) -> CREAMDataCollator:
        return CREAMDataCollator(
            pad_token_id=tokenizer.pad_token_id or 0,
            **self.lengths._asdict(),
            position_strategy=args.position_strategy,
            strategy_options=args.strategy_options(),
            **{name: getattr(args, name) for name in MIXED},
            seed=args.data_seed if args.data_seed is not None else args.seed,
            pad_to_multiple_of=args.pad_to_multiple_of,  # ty: ignore[invalid-argument-type] TRL has made it a number
        )

    # TRL prepares training and evaluation sets here; an evaluation set may be called "train", so the name says nothing.
    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        is_training = dataset is self._training_documents
        name = "train_dataset" if is_training else "eval_dataset"
        if formatting_func:
            dataset = fingerprinted(dataset)
        else:
            size = self.scaled_config.get_text_config().vocab_size
            settings: dict[str, Any] = {"vocab_size": size, "eos_token": args.eos_token}
            settings["find_answers"] = self._find_answers
            dataset = prepare_columns(dataset, name, processing_class, args.dataset_text_field, **settings)
        if is_training:
            # The training set comes first; the same object handed over for evaluation is an evaluation set.
            self._training_documents = None
        documents, key = dataset, "context_length" if is_training else "eval_length"
        length = getattr(self.lengths, key)
        if args.completion_only_loss is None and not formatting_func:
            # TRL decides it for every set by the first row of the training set, and by a mask only if it is asked to.
            self.completion_only_loss = bool({"completion", "completion_mask"} & set(column_names(dataset)))
        if self._find_answers:
            dataset = with_answer_masks(dataset, processing_class, self.completion_only_loss, is_training)
        dataset = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        report_unlabelled(dataset, documents, CUT[key][0], "target_length", self.lengths.target_length)
        warn_of_cut(dataset, documents, key, length, self.lengths.target_length)
        if not is_training:
            dataset = fit_held_out_documents(dataset, args.short_documents, length)
            return dataset.map(lambda row: {ROW_COLUMN: EVALUATION_ROW}).with_format("numpy")
        dataset = fit_short_documents(dataset, args.short_documents, length)
        if isinstance(dataset, Dataset):
            dataset = dataset.add_column(ROW_COLUMN, range(len(dataset)))
        else:
            dataset = dataset.map(lambda row, index: {**row, ROW_COLUMN: index}, with_indices=True)
        return dataset.with_format("numpy")

    def get_test_dataloader(self, test_dataset: Any):
        # TRL prepares what evaluate gets, and not what predict gets.
        how = self.processing_class, self.args, False, self._formatting_func, "test"
        return super().get_test_dataloader(self._prepare_dataset(test_dataset, *how))

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns or []
        self._signature_columns = columns if ROW_COLUMN in columns else [*columns, ROW_COLUMN]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any):
        if self.args.distillation_weight and self.model.training:
            self._metrics["train"]["distillation_loss"].append(distil(self, model, inputs))
        with _only_labels_projected():
            return super().compute_loss(model, inputs, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any):
        self.check_positions()
        before = digest(self.model)
        start = time.perf_counter()
        output = super().train(*args, **kwargs)
        self.seconds = time.perf_counter() - start
        refuse_useless(self.model, before, self.args)
        # transformers averages over the ranks when it logs, and leaves the steps since then as each rank had them.
        losses = gather_object([output.training_loss])
        return output._replace(training_loss=sum(losses) / len(losses))

    def check_positions(self) -> None:
        """Check that positions reach the model and attention crosses the segments, see `preflight.check_positions`."""
        check_positions(self)
