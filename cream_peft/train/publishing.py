"""What SFTTrainer does on the Hub, done by `publish.push`: one commit, complete, the token in none of its files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers.trainer_utils import HubStrategy
from trl import SFTTrainer

from ..errors import explain
from ..model.record import AdapterError, Record
from ..model.secrets import public_name
from ..publish import push as hub
from ..tiny import TINY_ID, base_folder
from .config import CREAMConfig

logger = logging.getLogger(__name__)


class PublishingTrainer(SFTTrainer):
    """SFTTrainer whose base has a public name and whose folders are published whole."""

    args: CREAMConfig
    model: Any

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
