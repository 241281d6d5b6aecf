"""What a run saves and publishes: an adapter or a model that says of itself how it was made, whole or not at all."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedConfig
from transformers.trainer_utils import HubStrategy
from trl import SFTTrainer

from .. import rope
from ..errors import explain
from ..model.base import quantization_of
from ..model.record import (
    BASE_FOLDER,
    AdapterError,
    Best,
    Positions,
    Record,
    adapter_sha256,
    machine,
    model_sha256,
    peak_gib,
    versions,
    write_json,
)
from ..model.secrets import public_name, without_secrets
from ..model.tokenizer import make_tokenizer_readable
from ..plugins import package_of
from ..positions import POSITION_STRATEGIES, options_of
from ..publish import push as hub
from ..publish.card import CARD, write_card
from ..scalings import ROPE_SCALING_TYPES
from ..tiny import TINY_ID, TINY_LICENSE, base_folder
from .collator import MIXED
from .config import CREAMConfig, Lengths
from .output import refuse_output, saved_whole
from .tokenised import rows_identity

logger = logging.getLogger(__name__)

KEPT_SETTINGS = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
KEPT_SETTINGS += ("warmup_steps", "bf16", "fp16", "dtype")
"""What a resumed run may change, with one line that says so."""
FIXED_SETTINGS = ("optim", "optim_args", "lr_scheduler_type", "lr_scheduler_kwargs", "weight_decay")
FIXED_SETTINGS += ("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "loss_type", "label_smoothing_factor")
FIXED_SETTINGS += ("neftune_noise_alpha", "train_sampling_strategy")
"""What it may not: the saved optimizer goes on with its own, or the weights would not be those of one run."""
CHOICE_SETTINGS = ("metric_for_best_model", "eval_length", "held_out_documents")
"""What a resumed run may not change if it keeps the best checkpoint: losses are compared with those of before."""


class SavingTrainer(SFTTrainer):
    """SFTTrainer whose folders hold the scaled config of the base, cream.json and a card, and are published whole by
    `publish.push`: in one commit, the token in none of its files."""

    args: CREAMConfig
    model: Any
    data_collator: Any
    recipe: dict[str, Any]
    seconds: float | None
    lengths: Lengths
    scaled_config: PreTrainedConfig
    pretrained_window: int
    base_revision: str | None
    base_fingerprint: dict[str, list[float]]
    earlier: Record | None
    resumed_step = 0
    run_id: str | None = None
    """The same in all that one run saves, resumed or not."""
    best: Best | None = None
    """Once training has ended with load_best_model_at_end: the step whose weights the model then has."""

    @cached_property
    def data_identity(self) -> str | None:
        """What tells one set of training documents from another; of a stream its name."""
        return rows_identity(self.train_dataset) or self.recipe.get("dataset_name")

    @cached_property
    def chosen_by(self) -> dict[str, Any]:
        """What the best checkpoint is chosen by, without which two losses cannot be compared; empty if none is."""
        if not self.args.metric_for_best_model:
            return {}
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        told = [f"{name} {identity}".strip() for name, one in sets.items() if (identity := rows_identity(one))]
        metric = self.args.metric_for_best_model.removeprefix("eval_")
        values = (metric, self.lengths.eval_length, "; ".join(told) or None)
        return dict(zip(CHOICE_SETTINGS, values, strict=True))

    def base_model_name(self) -> str:
        """The base's public name: `base_model_id`, its Hub id, or a local folder's last part. Never a path."""
        name = self.args.base_model_id or self.unwrapped_config()._name_or_path
        return TINY_ID if name == str(base_folder()) else public_name(name)

    def base_is_local(self) -> bool:
        """Whether that name is only the name of a local folder, which nobody else has."""
        name = self.unwrapped_config()._name_or_path
        return self.args.base_model_id is None and name not in (TINY_ID, str(base_folder())) and Path(name).exists()

    def unwrapped_config(self):
        return self.accelerator.unwrap_model(self.model).config

    def describe(self) -> Record:
        """The content of cream.json: how the base was scaled, how positions were drawn, what the run took."""
        args, collator, model = self.args, self.data_collator, self.accelerator.unwrap_model(self.model)
        is_full = not isinstance(model, PeftModel)
        factor = collator.target_length / collator.context_length
        options = options_of(collator.position_strategy) | collator.strategy_options
        packages = {
            "position_strategy": package_of(POSITION_STRATEGIES[collator.position_strategy]),
            "rope_scaling_type": package_of(ROPE_SCALING_TYPES.get(str(args.rope_scaling_type))),
        }
        positions = Positions(
            strategy=collator.position_strategy,
            context_length=collator.context_length,
            factor=factor,
            options=without_secrets(options | {name: getattr(collator, name) for name in MIXED}),
            seed=collator.seed,
            short_documents=args.short_documents,
            redrawn=collator.redrawn(),
            unlabelled=collator.unlabelled(),
        )
        return Record(
            base_model=self.base_model_name(),
            base_is_local=self.base_is_local(),
            base_revision=self.base_revision,
            base_fingerprint=self.base_fingerprint,
            pretrained_window=self.pretrained_window,
            target_length=self.lengths.target_length,
            rope_scaling_type=args.rope_scaling_type,
            distillation_weight=args.distillation_weight,
            distillation_length=args.distillation_length,
            positions=positions,
            load_in_4bit=bool(getattr(model, "is_loaded_in_4bit", False)),
            quantization=quantization_of(model),
            license=args.license or (TINY_LICENSE if self.base_model_name() == TINY_ID else None),
            steps=self.state.global_step,
            best=self.best,
            first_step=self.resumed_step,
            seconds=self.seconds and round(self.seconds, 1),
            peak_gib=peak_gib(),
            machine=machine(args.use_cpu),
            seed=args.seed,
            versions=versions(),
            packages={key: name for key, name in packages.items() if name},
            recipe=self.recipe,
            settings={key: without_secrets(getattr(args, key, None)) for key in (*KEPT_SETTINGS, *FIXED_SETTINGS)}
            | {"dtype": str(model.dtype).removeprefix("torch.")}
            | self.chosen_by,
            run_id=self.run_id,
            data=self.data_identity,
            stages=[*self.earlier.stages, self.earlier.as_stage()] if self.earlier else [],
            merged=is_full,
            full=is_full,
            dtype=str(self.model.dtype).removeprefix("torch.") if is_full else None,
        )

    def _load_best_model(self) -> None:
        super()._load_best_model()
        step, metric = int(self.state.best_global_step or 0), str(self.args.metric_for_best_model)
        metric = metric if metric.startswith("eval_") else f"eval_{metric}"
        self.best = Best(step, metric, float(self.state.best_metric or 0), self.lengths.eval_length)
        logger.info(
            "step %d is taken, the best on held-out documents: %s %.3f at up to %s tokens",
            step, metric, self.best.value, f"{self.best.eval_length:,}",
        )  # fmt: skip

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        home = Path(str(self.args.output_dir))
        target = Path(output_dir or home)
        if target.resolve() != home.resolve() and self.args.should_save:
            refuse_output(target, self.unwrapped_config()._name_or_path)
        card = next((place / CARD for place in (home, target) if (place / CARD).is_file()), None)
        with saved_whole(target, self.args.should_save) as folder:
            super()._save(str(folder), state_dict)
            if not self.args.should_save:
                return
            # In place of PEFT's; what a person wrote on ours goes along.
            (folder / CARD).unlink(missing_ok=True)
            if card:
                shutil.copyfile(card, folder / CARD)
            # It would carry the Hub token and local paths to the Hub, and nothing reads it back.
            (folder / "training_args.bin").unlink(missing_ok=True)
            make_tokenizer_readable(folder, self.lengths.target_length)
            record = self.describe()
            if record.full:
                kind = type(self.accelerator.unwrap_model(self.model)).__name__
                own = {"dtype": record.dtype, "architectures": [kind]}
                write_json(folder / "config.json", rope.published_config(self.scaled_config) | own)
            else:
                unwrapped: Any = self.accelerator.unwrap_model(self.model)
                rope.save_base_config(self.scaled_config, folder, unwrapped.unscaled_config)
            digest = model_sha256(folder) if record.full else adapter_sha256(folder)
            record = replace(record, adapter_sha256=digest)
            record.name_base_in(folder)
            record.write(folder)
            # A model that was made in memory has no name.
            if record.base_is_local and (name := self.unwrapped_config()._name_or_path):
                base = Path(name).absolute()
                (folder / BASE_FOLDER).write_text(f"{base}\n", encoding="utf-8")
            write_card(folder, record, self.hub_model_id if self.args.push_to_hub else None)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `_save` has written our card, and TRL's would take its place."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the Hub repository, before anything is trained that could not be published."""
        if self.base_is_local():
            raise hub.PushError(
                f"push_to_hub with a local base, {self.base_model_name()!r}: set base_model_id, its Hub id, so that "
                "others find it"
            )
        if self.is_world_process_zero():
            repo = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
            hub.check_card(Record(self.base_model_name(), 1, 1, None, license=self.args.license), repo)
            private = self.args.hub_private_repo if private is None else private
            self.hub_model_id = hub.create_repository(repo, private=private, token=token or self.args.hub_token)

    def push_to_hub(  # ty: ignore[incompatible-method-override] its URL, where transformers returns a CommitInfo
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> str | None:
        """Publish the adapter in one commit, see `hub.push_folder`; returns the commit's URL. It always blocks."""
        self.save_model(_internal_call=True)
        return self._push(str(self.args.output_dir), commit_message, token=token, revision=revision)

    def _push(self, folder: str, message: str | None, **options: Any) -> str | None:
        if self.hub_model_id is None:
            self.init_hf_repo(token=options.get("token"))
        if not self.is_world_process_zero():
            return None
        name = self.unwrapped_config()._name_or_path
        options["base_model"] = name if Path(name).is_dir() else None
        options["token"] = options.get("token") or self.args.hub_token
        options["revision"] = options.get("revision") or self.args.hub_revision
        repo, private = str(self.hub_model_id), self.args.hub_private_repo
        try:
            return hub.push_folder(folder, repo, private=private, message=message, **options)
        except AdapterError as error:
            raise hub.PushError(str(error)) from error

    # transformers would write training_args.bin, with the token, once more, publish the root without base_config, and
    # lose its errors in a thread.
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Each has a random state in it.
        self.accelerator.wait_for_everyone()
        strategy = self.args.hub_strategy
        if strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        below = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name}
        message = f"Training in progress, step {self.state.global_step}"
        try:
            self._push(checkpoint_folder, message, checkpoint_in_repo=below.get(strategy))
        except Exception as error:
            # Whatever it is, what was trained is worth more.
            logger.warning("step %d was not published: %s", self.state.global_step, explain(error))
