"""What `push_to_hub` and `hub_strategy` of a trainer do."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import CommitInfo
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from ..distributed import run_on_main_process
from ..errors import HubUploadError
from ..report.hub.merged import MERGED_DIR, check_mergeable, save_merged
from ..report.hub.model_card import describe_merged, files_to_upload, write_model_card
from ..report.hub.run_model import checkpoint_files, merged_repo_of, model_files, warn_of_local_base
from ..report.hub.training_config import training_config, write_training_config
from ..report.hub.upload import HUB_ERRORS, HubClient, remove_leftovers, wait_for


logger = logging.getLogger(__name__)

LAST_CHECKPOINT = "last-checkpoint"


class HubUploads(Trainer):
    """The part of [`AtroposTrainer`] that concerns the Hub.

    Deviations from [`~transformers.Trainer`]: (1) an upload that fails is logged, with the command that repeats it, and
    counted in `hub/num_failed_uploads`; it never ends a run. What cannot work later either (a token without rights, a name
    that is none) is refused before the first step. (2) `training_args.bin` is not uploaded: it holds tokens in the clear and
    runs code when it is loaded; `training_config.yaml` takes its place. (3) The journal, refused groups and logs are not
    uploaded. (4) `push_merged` uploads a LoRA policy a second time, merged, to `<hub_model_id>-merged`.
    """

    _tag_names: ClassVar[list[str]] = []
    # On rank 0.
    _hub: HubClient | None = None
    _has_asked_hub = False
    _uploads: tuple[Future[CommitInfo], ...] = ()

    def init_hf_repo(self, token: str | None = None) -> None:
        """Make the repository. Call it on every rank.

        Raises:
            [`HubUploadError`]: if it cannot be made now, and could not be made later either.
            [`PreflightError`]: if `push_merged` is set and the policy cannot be merged.
        """
        if self.args.push_merged:
            check_mergeable(self.accelerator.unwrap_model(self.model))
        self._has_asked_hub = True
        self.hub_model_id = run_on_main_process(lambda: self._make_repo(token))

    def _make_repo(self, token: str | None) -> str | None:
        remove_leftovers(self._output_dir)
        self._hub = self._hub or HubClient(self._output_dir, token or self.args.hub_token)
        name = self.args.hub_model_id or self._output_dir.absolute().name
        try:
            return self._hub.create_repo(name, self.args.hub_private_repo)
        except HubUploadError as exc:
            if exc.is_lasting:
                raise
            self._hub.num_failed += 1
            logger.warning(f"{exc} It is tried again with the next upload.")
            return None

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Write the model card, its plot and `training_config.yaml` into `output_dir`; on rank 0.

        Args:
            model_name (`str`, *optional*):
                Not used: the card is named after the repository.
            dataset_name (`str`, *optional*):
                Not used: what the model was trained on are environments.
            tags (`str` or `list[str]`, *optional*):
                Tags of the card beside those of this trainer.
        """
        if not self.is_world_process_zero():
            return
        self._output_dir.mkdir(parents=True, exist_ok=True)
        config = training_config(self.args, self.accelerator.unwrap_model(self.model))
        write_training_config(config, self._output_dir)
        more = [tags] if isinstance(tags, str) else tags or []
        write_model_card(
            self._output_dir,
            config,
            hub_model_id=self.hub_model_id or self.args.hub_model_id,
            history=self.state.log_history,
            tags=[*self._tag_names, *more],
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as [`~transformers.Trainer.save_model`] does, with the model card, and only after an upload of what is
        overwritten.
        """
        if output_dir is not None:
            super().save_model(output_dir, _internal_call)
            return
        self._finish_current_push()
        super().save_model(None, _internal_call)
        # A push writes it itself. Before that, PEFT has written a card of its own.
        if not _internal_call and not self.args.push_to_hub:
            self.create_model_card()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.create_model_card()
        super()._save_checkpoint(model, trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and not all(upload.done() for upload in self._uploads):
            return
        repo_id = self._repo()
        if repo_id is None:
            return
        self._announce_push()
        message = f"Training in progress, step {self.state.global_step}"
        checkpoint = Path(checkpoint_folder)
        self._upload(files_to_upload(checkpoint, self._output_dir), repo_id, message)
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            folder = LAST_CHECKPOINT if is_last else checkpoint.name
            self._upload(checkpoint_files(checkpoint), repo_id, f"{message}, checkpoint", folder)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Save the model and upload it, with its card. Call it on every rank.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                Message of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to wait for the upload.
            token (`str`, *optional*):
                Token of the Hub; `args.hub_token` if not given.
            revision (`str`, *optional*):
                Branch; `args.hub_revision` if not given.
            kwargs:
                Arguments of `create_model_card`.

        Returns:
            `CommitInfo`, or a `Future` of it with `blocking=False`; None on other ranks, and if the upload failed, which is
            logged.
        """
        self._announce_push()
        if not self._has_asked_hub:
            self.init_hf_repo(token)
        self.save_model(_internal_call=True)
        merged = self._output_dir / MERGED_DIR
        model = self.accelerator.unwrap_model(self.model)
        if self.args.push_merged:
            save_merged(model, self.processing_class, merged, self.is_world_process_zero())
        if self.is_world_process_zero():
            warn_of_local_base(self._output_dir)
        repo_id = self._repo() if self.is_world_process_zero() else None
        kwargs.pop("model_name", None)
        self.create_model_card(**kwargs)
        if repo_id is None:
            return None
        files = files_to_upload(self._output_dir, self._output_dir)
        future = self._upload(files, repo_id, commit_message, None, revision)
        if self.args.push_merged:
            self._push_merged(merged, repo_id, commit_message)
        if not blocking:
            return future
        self._finish_current_push()
        return None if future.exception() else future.result()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the number of failed uploads, if there are uploads."""
        if "loss" in logs and self._hub is not None:
            logs = {**logs, "hub/num_failed_uploads": float(self._hub.num_failed)}
        super().log(logs, start_time)

    def _finish_current_push(self) -> None:
        for upload in self._uploads:
            wait_for(upload, f"the model to {self.hub_model_id}")
        self._uploads = ()

    def _announce_push(self) -> None:
        """Let the callbacks act: the one of trackio uploads what it has logged."""
        try:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
        except (*HUB_ERRORS, RuntimeError) as exc:
            if self._hub is not None:
                self._hub.num_failed += 1
            logger.warning(
                f"A tracker failed at the beginning of an upload: {type(exc).__name__}: {exc}. The model is uploaded without it. "
                "With trackio, `trackio_static_space_id: false` in the file of --config keeps its metrics on this machine."
            )

    @property
    def _output_dir(self) -> Path:
        return Path(str(self.args.output_dir))

    def _repo(self) -> str | None:
        """Return the repository, which is made now if the Hub could not be reached before; on rank 0."""
        if self.hub_model_id is None:
            try:
                self.hub_model_id = self._make_repo(None)
            except HubUploadError as exc:
                logger.warning(str(exc))
        return self.hub_model_id

    def _upload(
        self,
        files: Mapping[str, Path],
        repo_id: str,
        message: str | None,
        folder: str | None = None,
        revision: str | None = None,
    ) -> Future[CommitInfo]:
        assert self._hub is not None, "_repo() made it"
        future = self._hub.upload(
            files,
            repo_id,
            message or "End of training",
            revision=revision or self.args.hub_revision,
            path_in_repo=folder,
        )
        self._uploads = (*(upload for upload in self._uploads if not upload.done()), future)
        return future

    def _push_merged(self, merged: Path, repo_id: str, message: str | None) -> None:
        assert self._hub is not None, "_repo() made it"
        merged_id = merged_repo_of(repo_id)
        try:
            self._hub.create_repo(merged_id, self.args.hub_private_repo)
        except HubUploadError as exc:
            self._hub.num_failed += 1
            logger.warning(str(exc))
            return
        config = training_config(self.args, self.accelerator.unwrap_model(self.model))
        files = describe_merged(self._output_dir, config, merged_id, repo_id, self.state.log_history)
        self._upload({**model_files(merged), **files}, merged_id, message)
