"""`AtroposSFTTrainer`: verl's SFT trainer, fed by Atropos environments and followed by the servers that they ask.

verl owns model, optimizer, sharding, micro-batches and checkpoints. Ours are the data, the loss, and the publishes.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from .installed import check_verl


check_verl()

from omegaconf import DictConfig, OmegaConf
from verl.trainer.sft_trainer import SFTTrainer
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.workers.engine_workers import TrainingWorker, TrainingWorkerConfig

from ..data.micro_batches import Dealer
from ..distributed import run_on_main_process
from ..loss.losses import LossFunction, make_loss_function
from ..loss.metrics import MetricAccumulator, mean_of
from ..loss.step import check_grad_norm, is_overflow
from ..loss.weighted_sft import weighted_sft_loss_of_model
from ..policy.load import eos_token_ids, padding_id
from ..trainer.run_data import RunData
from ..trainer.servers import Connection, open_connection
from ..trainer.step_clock import StepClock
from ..types import Rollout
from ..weight_sync.publisher import WeightSync
from ..wire.parse import WireLimits
from ..wire.recorded import OfflineData
from .cpu import register_engine
from .loss import RolloutLoss
from .options import atropos_config, check_lora
from .rows import make_rows
from .weights import EngineProbe, EngineWeights


logger = logging.getLogger(__name__)


class AtroposSFTTrainer(SFTTrainer):
    """verl's SFT trainer on scored rollouts of Atropos environments, live or recorded.

    Where it differs from verl's:

    1. A step trains one batch of the API, or as many whole groups of recorded data as fit into `data.train_batch_size`, in
       their order. Rank 0 alone fetches; every batch is in the journal before it is used.
    2. The loss is any of `loss_type` (docs/losses.md). Its denominators and the statistics of its advantages are those of
       the whole step over all data-parallel ranks, so that any cut into micro-batches and ranks gives the same gradient.
    3. With `data.atropos.api_url`, the policy is published to the inference servers after the step, and proven.
    4. A loss or a gradient that is not finite ends the run; verl leaves out the step and goes on.

    Args:
        config (`DictConfig`):
            `trl_atropos/verl/config/atropos_sft_trainer.yaml` with what the user changed.
        loss_fn ([`~loss.losses.LossFunction`], *optional*):
            Your own loss instead of the one of `atropos.loss_type`.

    Raises:
        [`TrlAtroposError`]: on every rank, if a part of the configuration cannot act here, or data cannot be read.

    Example:

    ```python
    trainer = AtroposSFTTrainer(config=config)
    trainer.fit()
    ```
    """

    ckpt_handler: Any

    def __init__(self, config: DictConfig, loss_fn: LossFunction | None = None):
        plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)
        self.args = atropos_config(plain, num_ranks=torch.distributed.get_world_size(), device=get_device_name())
        self._is_live = self.args.data_path is None
        if self._is_live:
            check_lora(plain)
        self._loss_function = make_loss_function(self.args) if loss_fn is None else loss_fn
        self._metrics = MetricAccumulator()
        # Of the run that fit() makes.
        self._connection: Connection | None = None
        self._data: RunData | None = None
        self._clock = StepClock()
        self._log_history: list[dict[str, float]] = []
        self._global_step = 0
        super().__init__(config=config)

    # Life of a run

    def fit(self) -> None:
        """Train. The metrics of the steps are also in `trainer_state.json` afterwards, as transformers writes it.

        Raises:
            [`TrlAtroposError`]: before the first step if API, server, data and model do not fit together; later if the data
                or a publish fails. The server is left paused if it does not hold a complete policy.
        """
        self._global_step = self.resume_global_step
        try:
            if self._is_live:
                self._connect().publisher.begin_run(self.train_dataloader.state.get("policy_version", 0))
                self._publish_step()
            self._clock.start(self._global_step)
            super().fit()
            if self._global_step < self.total_training_steps:
                logger.warning(
                    f"The data ended after {self._global_step} of {self.total_training_steps} steps: whole batches of it were "
                    "refused, see quarantine.jsonl. No last checkpoint was written."
                )
        finally:
            self._save_log()
            if self._data is not None:
                self._data.close()
            if self._connection is not None:
                self._connection.close()

    @property
    def global_step(self) -> int:
        """Optimizer steps done so far."""
        return self._global_step

    @property
    def num_steps_left(self) -> int:
        """Optimizer steps that are still to be made."""
        return int(self.total_training_steps) - self._global_step

    @property
    def policy_version(self) -> int:
        """Number of the policy that was published last, or is on its way; 0 before the first publish."""
        return self._connection.publisher.policy_version if self._connection else 0

    # What verl builds

    def _build_engine(self) -> None:
        """Build verl's worker with our loss, and with what surrounds a step."""
        register_engine()
        self.loss_fn = RolloutLoss(self._loss_function, self.args)
        worker_config = TrainingWorkerConfig(
            model_type="language_model",
            model_config=self.model_config,
            engine_config=self.engine_config,
            optimizer_config=self.optimizer_config,
            checkpoint_config=self.checkpoint_config,
            profiler_config=self.profiler_config,
        )
        self.training_client = _StepWorker(worker_config, self)
        self.training_client.set_loss_fn(loss_fn=self.loss_fn)
        self.engine = self.training_client.engine

    def _build_dataset(self) -> None:
        """There are no files to be read before the run: `_build_dataloader` says where rollouts come from."""
        self.train_dataset = self.val_dataset = None

    def _build_dataloader(self) -> None:
        """Hand out the rows of this rank, step after step."""
        self.global_batch_size = self.config.data.train_batch_size
        self.train_batch_size_per_dp = self.global_batch_size // self.engine.get_data_parallel_size()
        self.train_sampler = _NoSampler()
        self.train_dataloader = _StepLoader(self, run_on_main_process(self._num_steps_per_pass))
        self.val_dataloader = None

    def _build_ckpt_handler(self) -> None:
        """Tell the journal of every checkpoint: a resume needs no batch before it."""
        super()._build_ckpt_handler()
        handler: Any = self.ckpt_handler
        self.ckpt_handler = _ReleasingCheckpoints(handler, self)

    def _init_engine(self) -> None:
        super()._init_engine()
        # Environments are told how long the run is.
        self.args.max_steps = int(self.total_training_steps)

    # Data

    def _num_steps_per_pass(self) -> int:
        if self.args.data_path is None:
            return self.args.max_steps
        summary = OfflineData(self.args.data_path, self.global_batch_size).summarize()
        logger.info(f"{self.args.data_path}: {len(summary.group_sizes)} groups, {summary.num_batches} steps a pass.")
        return summary.num_batches

    def rollouts(self, state: dict[str, Any]) -> Iterator[list[Rollout]]:
        """This rank's rollouts, step after step, from where a checkpoint with this `state` ends; collective."""
        dealer = Dealer(
            self.global_batch_size,
            self.train_batch_size_per_dp,
            rank=self.engine.get_data_parallel_rank(),
            world_size=self.engine.get_data_parallel_size(),
        )
        is_required = self.args.mask_truncated_completions
        self._data = RunData(
            self.args,
            self,
            dealer,
            WireLimits(vocab_size=self._vocab_size, max_length=self.args.max_length, reads_teacher=False),
            None if self._connection is None else self._connection.servers,
            is_main_process=self.rank == 0,
            resumes=self.config.trainer.resume_mode != "disable",
            state=state,
            eos_token_ids=eos_token_ids(self.engine.module, self.model_config.tokenizer, is_required=is_required),
        )
        return itertools.chain.from_iterable(self._data.stream)

    def rows(self, rollouts: list[Rollout]) -> dict[str, Tensor]:
        """Normalise and clip the advantages of a step, weigh its tokens, and make the rows of this rank; collective."""
        rows = make_rows(
            rollouts,
            self.train_batch_size_per_dp,
            self.args,
            temperature=self.args.temperature,
            applies_temperature=self._connection is None or self._connection.facts.has_processed_logprobs,
            max_length=self.args.max_length,
            pad_token_id=padding_id(self.model_config.tokenizer, self._vocab_size),
            device=torch.device(get_device_name()),
            process_group=self.engine.get_data_parallel_group(),
        )
        self.loss_fn.names = rows.names
        self._metrics.update(rows.metrics)
        return rows.columns

    @property
    def _vocab_size(self) -> int:
        return int(self.model_config.hf_config.get_text_config().vocab_size)

    def data_state(self) -> dict[str, Any]:
        """What a checkpoint must hold of the data and of the publishes."""
        stream = {} if self._data is None else self._data.stream.state_dict()
        return {**stream, "policy_version": self.policy_version, "global_step": self._global_step}

    def after_save(self) -> None:
        """A checkpoint is whole."""
        if self._data is not None:
            self._data.after_save()

    # A step

    def begin_step(self, data: Any) -> None:
        """Before verl trains `data`: what its forward passes must know of the rows."""
        if self._connection is not None:
            self._connection.publisher.sleep()
        temperatures = data.pop("sampling_temperature")
        if (temperatures != 1.0).any():
            tu.pop(data, "temperature")
            data["temperature"] = temperatures
        if self.loss_fn.needs_entropy:
            tu.assign_non_tensor(data, calculate_entropy=True)

    def end_step(self, metrics: dict[str, Any]) -> None:
        """After verl's optimizer step: check it, publish, and add to its `metrics`; collective.

        Raises:
            NonFiniteGradientError: the loss or the gradient was not finite.
        """
        step = self._global_step + 1
        self.loss_fn.watch.check(step, torch.device(get_device_name()))
        scaler = self.engine.scaler
        if not is_overflow(metrics["grad_norm"], None if scaler is None else scaler.get_scale()):
            check_grad_norm(step, metrics["grad_norm"])
        self._global_step = step
        if self._is_live:
            is_last = self.num_steps_left == 0
            if is_last or step % self.args.weight_sync_steps == 0:
                self._publish_step()
            if is_last:
                self._record_publish(self._connect().publisher.finish())
        assert self._data is not None, "a step comes from the data"
        self._data.mark_trained(step)
        self._metrics.update(self._data.pop_metrics())
        self._metrics.update(self._clock.read(step))
        for collected in (self._metrics, self.loss_fn.metrics):
            metrics |= collected.reduce(
                self.engine.get_data_parallel_group(), torch.distributed.get_world_size() > 1, get_device_name()
            )
        metrics |= self._data.stream.total_metrics()
        if self._is_live:
            metrics["policy_version"] = self.policy_version
        self._log_history.append(
            {"step": step, **{key: value for key, value in metrics.items() if isinstance(value, int | float)}}
        )

    def _save_log(self) -> None:
        if self.rank == 0 and self._log_history:
            output_dir = Path(self.args.output_dir)
            output_dir.mkdir(parents=True, exist_ok=True)
            state = TrainerState(global_step=self._global_step, log_history=self._log_history)
            state.save_to_json(str(output_dir / TRAINER_STATE_NAME))

    # Losses

    def compute_advantage_weighted_sft_loss(
        self,
        input_ids: Tensor,
        advantages: Tensor,
        loss_mask: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """[`~trl_atropos.advantage_weighted_sft_loss`] of the current policy, at `atropos.temperature` and with this
        trainer's normalisation and clipping of the advantages. On several ranks: call it on each of them.

        The arguments are those of the function, shapes and errors included; `attention_mask` and `position_ids` of shape
        `(B, T)` go to the model.

        Returns:
            `torch.Tensor` of shape `()`, with gradient: a mean over the trained tokens of these tensors.
        """
        optional = {"attention_mask": attention_mask, "position_ids": position_ids}
        given = {name: tensor for name, tensor in optional.items() if tensor is not None}
        module = self.engine.module
        return weighted_sft_loss_of_model(
            module,
            module.get_output_embeddings(),
            {"input_ids": input_ids, **given},
            advantages,
            loss_mask,
            self.args,
            temperature=self.args.temperature,
        )

    # Publishing

    def publish_policy(self) -> None:
        """Publish the current weights under the next version, and prove it. Collective. The trainer does it by itself after
        its steps."""
        with self.weight_sync(self.policy_version + 1) as sync:
            sync.push(self.engine.module)

    def weight_sync(self, policy_version: int) -> AbstractContextManager[WeightSync]:
        """`with trainer.weight_sync(version) as sync: sync.push(trainer.engine.module)`, on every rank: pauses the servers,
        takes the policy, and ends with the servers resumed and the publish proven, or raises with them still paused."""
        return self._connect().publisher.weight_sync(policy_version, self._record_publish)

    @property
    def sharding_manager(self) -> AbstractContextManager[None]:
        """`with trainer.sharding_manager:`, on every rank: inside, the servers answer from the current weights. At its end
        they give their memory back if `atropos.vllm_enable_sleep_mode` is on, until the next publish."""

        @contextmanager
        def manage() -> Iterator[None]:
            self.publish_policy()
            yield
            self._connect().publisher.sleep()

        return manage()

    def _connect(self) -> Connection:
        """Reach the servers and check them, unless that is done; collective."""
        if self._connection is None:
            weights: dict[torch.dtype, EngineWeights] = {}

            def make_source(model: torch.nn.Module, dtype: torch.dtype) -> EngineWeights:
                # One for the run: its first manifest gathers everything.
                return weights.setdefault(dtype, EngineWeights(self.engine, dtype))

            tokenizer = self.model_config.tokenizer
            self._connection = open_connection(
                self.args,
                self.engine.module,
                tokenizer,
                make_source=make_source,
                probe=EngineProbe(self.engine, tokenizer, self._vocab_size),
            )
        return self._connection

    def _publish_step(self) -> None:
        self._record_publish(self._connect().publisher.publish_step(self.engine.module, self._global_step))

    def _record_publish(self, metrics: dict[str, float]) -> None:
        if self.rank == 0:
            self._metrics.update({name: mean_of(value) for name, value in metrics.items()})


class _StepWorker(TrainingWorker):
    """verl's worker, which tells a trainer of every step."""

    def __init__(self, config: TrainingWorkerConfig, trainer: AtroposSFTTrainer):
        super().__init__(config=config)
        self._trainer = trainer

    def train_batch(self, data: Any) -> Any:
        """Train the rows of a step."""
        self._trainer.begin_step(data)
        output = super().train_batch(data=data)
        self._trainer.end_step(tu.get(output, "metrics"))
        return output


class _StepLoader:
    """In the place of verl's data loader: the rows of this rank, `num_steps` steps a pass.

    `state` is that of the checkpoint from which the run goes on; empty at a start from scratch.
    """

    def __init__(self, trainer: AtroposSFTTrainer, num_steps: int):
        self.state: dict[str, Any] = {}
        self._trainer = trainer
        self._num_steps = num_steps
        self._rollouts: Iterator[list[Rollout]] | None = None

    def __len__(self) -> int:
        return self._num_steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The rest of a pass. Batches are made one by one: the next one may need the publish of the one before."""
        trainer = self._trainer
        if self._rollouts is None:
            self._rollouts = trainer.rollouts(self.state)
        num_left = self._num_steps - trainer.global_step % self._num_steps
        for rollouts in itertools.islice(self._rollouts, num_left):
            yield trainer.rows(rollouts)

    def state_dict(self) -> dict[str, Any]:
        """What verl saves beside the model."""
        return self._trainer.data_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what verl saved beside the model it goes on with."""
        self.state = state


class _NoSampler:
    """In the place of verl's sampler: the order is that of the data."""

    def set_epoch(self, epoch: int) -> None:
        """Nothing is shuffled."""


class _ReleasingCheckpoints:
    """verl's checkpoint handler, which tells a trainer when a checkpoint is whole."""

    def __init__(self, handler: Any, trainer: AtroposSFTTrainer):
        self._handler = handler
        self._trainer = trainer

    def save_checkpoint(self, step: int) -> None:
        """Save as verl does."""
        self._handler.save_checkpoint(step=step)
        self._trainer.after_save()

    def load_checkpoint(self) -> int:
        """Load as verl does, and return the step."""
        return int(self._handler.load_checkpoint())
