"""The trainer.

    Atropos API --RolloutStream--> micro-batches of one optimizer step
        get_batch_samples   token count and advantage statistics over all micro-batches and ranks
        compute_loss        model -> logprobs at trained positions -> loss sum / trained tokens of the step
        optimizer.step      only if every gradient is finite
        on_step_end         PublishPolicyCallback -> PolicyPublisher -> vLLM server

Shape letters: B rollouts of a micro-batch, T tokens, V vocabulary, N trained tokens of a micro-batch.
"""

from __future__ import annotations

import logging
import math
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)

from .advantages import advantage_statistics, clip_advantages, normalize_advantages, standardize_advantages
from .atropos_client import AtroposClient, Registration
from .atropos_config import AtroposConfig
from .callbacks import PublishPolicyCallback, StepTableCallback
from .data import RolloutCollator, RolloutStream, StreamSettings
from .distributed import is_distributed, run_on_main_process
from .errors import NonFiniteGradientError
from .journal import Journal
from .logprobs import align_with_targets, next_token_targets, select_positions_before, token_logprobs_and_entropy
from .losses import LossInputs, make_loss_function
from .metrics import MetricAccumulator, maximum_of, mean_of
from .modeling import add_adapter, disable_dropout, load_model
from .preflight import ServerFacts, inspect_server, make_transport
from .types import IGNORE_INDEX
from .validation import WireLimits
from .weight_sync.base import WeightTransport
from .weight_sync.probe import LogprobProbe
from .weight_sync.publisher import PolicyPublisher, PublishReport
from .weight_sync.vllm_client import AtroposVLLMClient


if TYPE_CHECKING:
    from peft import PeftConfig


logger = logging.getLogger(__name__)

JOURNAL_NAME = "rollouts.jsonl"


class AtroposTrainer(Trainer):
    """
    Trainer for Atropos environments: takes scored rollouts from the Atropos API, applies an advantage-weighted loss that
    is exact at any split of the batch, and keeps the vLLM server that the environments query on the newest policy.

    Args:
        model (`str` or `PreTrainedModel` or `PeftModel`):
            The policy: an instance, or a path or id that is loaded with `args.model_init_kwargs` (float32 unless these
            say otherwise).
        args ([`AtroposConfig`], *optional*):
            Options.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer, for padding, for the logprob probe, and to be saved with the model. Loaded from the model's path
            if not given.
        peft_config (`PeftConfig`, *optional*):
            Wraps the model. Not together with a `PeftModel`.
        callbacks (`list[TrainerCallback]`, *optional*):
            More callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and learning rate scheduler.
        weight_transport ([`~weight_sync.base.WeightTransport`], *optional*):
            Moves the weights to the server. Chosen from what the server reports if not given.

    Example:

    ```python
    trainer = AtroposTrainer(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        args=AtroposConfig(
            output_dir="out", atropos_api_url="http://localhost:8000", vllm_server_base_url="http://localhost:8001"
        ),
    )
    trainer.train()
    ```
    """

    _tag_names: ClassVar[list[str]] = ["trl", "atropos"]
    _name = "Atropos"

    # The loss is divided by the trained tokens of the whole optimizer step: dividing it again by the number of
    # micro-batches would be wrong.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: AtroposConfig | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        weight_transport: WeightTransport | None = None,
    ):
        args = args or AtroposConfig(output_dir="atropos-output")
        # Before the adapter is created: its initial weights are random, and must be the same on every rank.
        set_seed(args.seed)
        model = load_model(model, args)
        if processing_class is None and getattr(model.config, "_name_or_path", None):
            processing_class = AutoTokenizer.from_pretrained(
                model.config._name_or_path, trust_remote_code=args.trust_remote_code
            )
        if peft_config is not None:
            model = add_adapter(model, peft_config)
        if args.disable_dropout:
            disable_dropout(model)
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)
        self.args: AtroposConfig = args
        self.loss_function = make_loss_function(args.loss_type, epsilon=args.epsilon, epsilon_high=args.epsilon_high)
        self.policy_version = 0
        self.atropos_client: AtroposClient | None = None
        self.vllm_client: AtroposVLLMClient | None = None
        self._weight_transport = weight_transport
        self._publisher: PolicyPublisher | None = None
        self._server_facts: ServerFacts | None = None
        self._stream: RolloutStream | None = None
        self._metrics = MetricAccumulator()
        self._has_published = False
        self._last_log: tuple[float, int] | None = None
        self.add_callback(PublishPolicyCallback(self.publish_policy, args.weight_sync_steps))
        self.pop_callback(PrinterCallback)
        self.pop_callback(ProgressCallback)
        self.add_callback(StepTableCallback())

    # Life of a run

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train. Takes the arguments of [`~transformers.Trainer.train`].

        Raises:
            [`TrlAtroposError`]: before the first step if API, server and model do not fit together; later if the data
                or a publish fails. The server is left paused if it does not hold a complete policy.
        """
        self._server_facts = run_on_main_process(self._connect)
        self._has_published = False
        try:
            return super().train(*args, **kwargs)
        finally:
            self._disconnect()

    def _connect(self) -> ServerFacts:
        args = self.args
        self.atropos_client = AtroposClient(args.atropos_api_url)
        self.atropos_client.wait_until_reachable(args.api_timeout_s)
        self.vllm_client = AtroposVLLMClient(
            args.vllm_server_base_url,
            connection_timeout=args.vllm_server_timeout,
            request_timeout=args.weight_sync_timeout,
            group_port=args.vllm_group_port,
            api_key=args.vllm_api_key or os.environ.get("VLLM_API_KEY"),
        )
        facts = inspect_server(self.vllm_client, self.model.config, args.max_length)
        transport = self._weight_transport or make_transport(facts, self.vllm_client, self.accelerator.device)
        self._publisher = PolicyPublisher(
            self.vllm_client,
            transport,
            LogprobProbe(self.processing_class, self._vocab_size),
            facts.dtype,
            args.logprob_probe_tolerance,
        )
        return facts

    def _disconnect(self) -> None:
        if self._publisher is not None:
            self._publisher.close()
        if self.atropos_client is not None:
            self.atropos_client.close()

    def _register(self) -> None:
        """Register with the API. Called on rank 0, after the first publish: the first `/batch` releases environments."""
        args = self.args
        assert self.atropos_client is not None
        assert args.atropos_batch_size is not None
        self.atropos_client.register(
            Registration(
                wandb_group=args.run_name or "trl_atropos",
                wandb_project=os.environ.get("WANDB_PROJECT", "trl_atropos"),
                batch_size=args.atropos_batch_size,
                # Environments drop a whole group if a rollout has max_token_len tokens or more.
                max_token_len=args.max_length + 1,
                checkpoint_dir=str(Path(args.output_dir).absolute()),
                save_checkpoint_interval=_save_interval(args),
                starting_step=self.state.global_step,
                num_steps=args.max_steps,
            )
        )

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """This rank's micro-batches, straight from the API. Not prepared by accelerate: they are dealt already."""
        args = self.args
        assert self._server_facts is not None, "train() connects before it asks for data"
        assert args.atropos_batch_size is not None
        settings = StreamSettings(
            batch_size=args.atropos_batch_size,
            micro_batch_size=args.per_device_train_batch_size,
            rank=args.process_index,
            world_size=args.world_size,
            limits=WireLimits(vocab_size=self._vocab_size, max_length=args.max_length),
            scale_rewards=args.scale_rewards,
            needs_inference_logprobs=args.loss_type == "grpo" and args.inference_logprobs == "require",
            max_dropped_fraction=args.max_dropped_fraction,
            batch_timeout_s=args.batch_timeout_s,
            refresh_interval_s=args.refresh_interval,
        )
        is_main = self.is_world_process_zero()
        lookup = self.vllm_client.get_policy_versions if self.vllm_client is not None else None
        self._stream = RolloutStream(
            client=self.atropos_client,
            journal=Journal(Path(args.output_dir) / JOURNAL_NAME) if is_main else None,
            settings=settings,
            register=self._register,
            policy_version=lambda: self.policy_version,
            lookup_policy_versions=lookup if self._server_facts.knows_policy_versions else None,
        )
        pad_token_id = getattr(self.processing_class, "pad_token_id", None)
        collator = RolloutCollator(pad_token_id=pad_token_id or 0, temperature=args.temperature)
        return DataLoader(self._stream, batch_size=None, collate_fn=collator)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """Take one optimizer step's micro-batches, normalise and clip their advantages, and count the trained tokens.

        Both the statistics of `advantage_normalization=global` and the count cover all micro-batches of all ranks, so
        that any split of the same rollouts gives the same gradient.

        Returns:
            `tuple[list, torch.Tensor]`: the micro-batches, and the trained tokens of the step over all ranks.
        """
        micro_batches = [next(epoch_iterator) for _ in range(num_batches)]
        advantages = [batch["advantages"] for batch in micro_batches]
        masks = [_loss_mask(batch["labels"]) for batch in micro_batches]
        statistics = advantage_statistics(advantages, masks, distributed=is_distributed(), device=device)
        for batch, mask in zip(micro_batches, masks, strict=True):
            if self.args.advantage_normalization == "global":
                normalized = standardize_advantages(batch["advantages"], mask, statistics)
            else:
                normalized = normalize_advantages(batch["advantages"], mask, self.args.advantage_normalization)
            batch["advantages"] = self._clip(normalized, mask).masked_fill(batch.pop("zero_advantage")[:, None], 0.0)
        self._metrics.update(
            {
                **(self._stream.pop_metrics() if self._stream else {}),
                "num_trained_tokens": mean_of(float(statistics.num_trained_tokens)),
                "advantages/zero_std": mean_of(statistics.std == 0),
            }
        )
        return micro_batches, torch.tensor(statistics.num_trained_tokens, device=device)

    def _clip(self, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        clipping = self.args.advantage_clipping
        clipped = clip_advantages(advantages, clipping)
        if clipping is not None:
            self._metrics.update(
                {
                    "advantages/clipped_frac_low": mean_of(advantages[mask] < clipping[0]),
                    "advantages/clipped_frac_high": mean_of(advantages[mask] > clipping[1]),
                }
            )
        return clipped

    # Loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Loss of one micro-batch: its sum over trained tokens, divided by the trained tokens of the optimizer step.

        Args:
            model (`nn.Module`):
                The wrapped policy.
            inputs (`dict[str, torch.Tensor]`):
                From [`~data.RolloutCollator`], with normalised and clipped `advantages` (B, T).
            return_outputs (`bool`, *optional*, defaults to `False`):
                Not supported: full outputs are never computed.
            num_items_in_batch (`torch.Tensor`, *optional*):
                Trained tokens of the step over all ranks; those of this micro-batch if not given.

        Returns:
            `torch.Tensor` of shape `()`. Times the number of ranks, because gradients are averaged over ranks.
        """
        if return_outputs:
            raise NotImplementedError(
                "AtroposTrainer computes logits at trained positions only: no outputs to return."
            )
        targets = next_token_targets(inputs["labels"])
        positions = targets != IGNORE_INDEX
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        with select_positions_before(head, positions):
            logits = model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            ).logits.squeeze(0)
        trainer_logprobs, entropy = token_logprobs_and_entropy(
            logits, targets[positions], self._temperature(inputs, positions)
        )
        outputs = self.loss_function(
            LossInputs(
                trainer_logprobs=trainer_logprobs,
                advantages=align_with_targets(inputs["advantages"])[positions],
                inference_logprobs=self._inference_logprobs(inputs, positions, trainer_logprobs),
                entropy=entropy,
            )
        )
        self._metrics.update(outputs.metrics)
        if num_items_in_batch is None:
            num_items_in_batch = positions.sum()
        return outputs.loss_sum / num_items_in_batch.clamp(min=1) * self.accelerator.num_processes

    def _temperature(self, inputs: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor | float:
        if self._server_facts is not None and not self._server_facts.has_processed_logprobs:
            return 1.0
        return inputs["temperature"][:, None].expand_as(positions)[positions]

    def _inference_logprobs(
        self, inputs: dict[str, torch.Tensor], positions: torch.Tensor, trainer_logprobs: torch.Tensor
    ) -> torch.Tensor | None:
        """Logprobs (N,) of the policy that sampled, with `args.inference_logprobs` applied where the wire has none."""
        logprobs = align_with_targets(inputs["inference_logprobs"])[positions]
        is_missing = logprobs.isnan()
        if self.args.loss_type == "weighted_sft":
            # Only metrics would use them, and those must not report made-up ratios of 1.
            return None if is_missing.any() else logprobs
        if self.args.inference_logprobs == "recompute":
            return trainer_logprobs.detach()
        return torch.where(is_missing, trainer_logprobs.detach(), logprobs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # The last call before optimizer.step(): beyond it one NaN is in every weight and in the optimizer's state.
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if grad_norm is not None and not math.isfinite(float(grad_norm)):
            raise NonFiniteGradientError(
                f"The gradient norm of step {self.state.global_step + 1} is {float(grad_norm)}.",
                "The optimizer step was not taken: the model and the server hold the last good policy.",
                "Resume from the last checkpoint with a smaller --learning_rate, or set --max_grad_norm; in half "
                "precision load the model in float32 (--dtype float32).",
            )
        return grad_norm

    # Publishing

    def publish_policy(self) -> None:
        """Publish the current weights. Collective: call it on every rank, after an optimizer step."""
        if self._has_published:
            version = self.policy_version + 1
        else:
            # 0 at the start; after a resume, the publishes that led to the checkpoint.
            version = math.ceil(self.state.global_step / self.args.weight_sync_steps)
        report = run_on_main_process(lambda: self._publish(version))
        self.policy_version = version
        if not self._has_published:
            self._has_published = True
            self._last_log = (time.perf_counter(), self.state.global_step)
            logger.info(
                f"Published policy version {version} in {report.total_s:.2f} s: {report.num_bytes / 1e6:.0f} MB, "
                f"mean |logprob difference| to the server {report.probe.mean_abs_diff:.4f}"
            )
        elif self.is_world_process_zero():
            self._metrics.update({name: mean_of(value) for name, value in report.metrics().items()})

    def _publish(self, version: int) -> PublishReport:
        assert self._publisher is not None
        return self._publisher.publish(self.accelerator.unwrap_model(self.model), version)

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the steps since the last log. Names and units: `metrics.METRICS`."""
        if "loss" in logs:
            logs = {**logs, **self._collect_metrics()}
        super().log(logs, start_time)

    def _collect_metrics(self) -> dict[str, float]:
        now = time.perf_counter()
        if self._last_log is not None:
            last_time, last_step = self._last_log
            self._metrics.update({"step_time": mean_of((now - last_time) / (self.state.global_step - last_step))})
        self._last_log = (now, self.state.global_step)
        # Linux reports kibibytes.
        peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._metrics.update({"memory/peak_rss_bytes": maximum_of(float(peak_rss_bytes))})
        metrics = self._metrics.reduce(distributed=is_distributed(), device=self.args.device)
        metrics["policy_version"] = float(self.policy_version)
        if self._stream is not None:
            metrics["num_tokens"] = float(self._stream.num_tokens)
            metrics["num_rollouts_trained"] = float(self._stream.num_rollouts_trained)
            metrics["num_rollouts_dropped"] = float(self._stream.num_rollouts_dropped)
        return metrics

    @property
    def _vocab_size(self) -> int:
        return self.model.config.get_text_config().vocab_size


def _loss_mask(labels: torch.Tensor) -> torch.Tensor:
    """Trained positions (B, T), bool. Token 0 has nothing that predicts it."""
    mask = labels != IGNORE_INDEX
    mask[:, 0] = False
    return mask


def _save_interval(args: AtroposConfig) -> int:
    """Steps between checkpoints of the environments: those of the trainer, so that both resume from the same step."""
    return max(int(args.save_steps), 1) if args.save_strategy == "steps" else args.max_steps
