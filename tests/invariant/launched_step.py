"""Optimizer steps of `Trainer.train` in every process that a launcher starts: what test_launched_training.py compares.

    torchrun --nproc_per_node 2 launched_step.py MODEL OUTPUT PARALLELISM CASE...

Each rank leaves its results in `OUTPUT/rank{rank}.pt`. The policy of the first case is published to the server that
`PUBLISH_URL` names.
"""

from __future__ import annotations

import math
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from test_split_invariance import (
    NUM_ROLLOUTS,
    VOCAB_SIZE,
    Gradient,
    endless_data,
    make_trainer,
    policy,
    ragged_rollouts,
)
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Trainer,
)

from trl_atropos.data.micro_batches import deal_by_count, deal_by_tokens
from trl_atropos.distributed import run_on_main_process
from trl_atropos.errors import NonFiniteGradientError, PreflightError
from trl_atropos.loss.losses import LossFunction, LossInputs, LossOutputs
from trl_atropos.policy.logprobs import MAX_LOGITS
from trl_atropos.policy.plan import plan_forward
from trl_atropos.policy.sequence_parallel import SequenceParallel
from trl_atropos.trainer.atropos_trainer import AtroposTrainer
from trl_atropos.trainer.callbacks import StepCallback
from trl_atropos.weight_sync.client import AtroposVLLMClient
from trl_atropos.weight_sync.options import WeightSyncOptions
from trl_atropos.weight_sync.probe import LogprobProbe
from trl_atropos.weight_sync.publisher import PolicyPublisher
from trl_atropos.weight_sync.server_group import ServerGroup
from trl_atropos.weight_sync.server_link import ServerLink
from trl_atropos.weight_sync.transports.shm import SharedMemoryTransport


# So large that what is rounded in `weights - learning_rate * gradient` is the gradient. A power of two divides exactly.
LEARNING_RATE = 1024.0
# Of rollout 2 of group 0 in `ragged_rollouts`: no other trains as many.
NUM_TRAINED_OF_BAD_ROLLOUT = 12


def _is_bad(inputs: LossInputs) -> torch.Tensor:
    num_trained = inputs.rollout_index.bincount(minlength=inputs.num_rollouts)
    return (num_trained == NUM_TRAINED_OF_BAD_ROLLOUT)[inputs.rollout_index]


def diverging_loss(inputs: LossInputs) -> LossOutputs:
    """Infinite for one rollout, whichever rank it is dealt to, and so is its gradient."""
    return LossOutputs(torch.where(_is_bad(inputs), math.inf, 1.0) * inputs.trainer_logprobs, {})


def infinite_loss(inputs: LossInputs) -> LossOutputs:
    """Infinite for one rollout; the gradient is finite and tells the other rank nothing."""
    return LossOutputs(torch.where(_is_bad(inputs), math.inf, 0.0) + inputs.trainer_logprobs, {})


@dataclass(frozen=True)
class Case:
    """A run of one or a few optimizer steps.

    Args:
        options (`dict`):
            Of `AtroposConfig`.
        split (`tuple[int, int, int]`):
            Ranks, gradient_accumulation_steps, per_device_train_batch_size.
        num_rollouts (`int`):
            Of a step. With 4, the second of two ranks has nothing.
        is_instance (`bool`):
            Whether the model is given as an instance and not as a path.
        num_steps (`int`):
            All with the same rollouts.
        learning_rate (`float`):
            Of plain gradient descent.
        loss_fn (`LossFunction`, *optional*):
            Instead of the one that the options name.
    """

    options: dict[str, Any] = field(default_factory=dict)
    split: tuple[int, int, int] = (2, 1, 4)
    num_rollouts: int = NUM_ROLLOUTS
    is_instance: bool = False
    num_steps: int = 1
    learning_rate: float = LEARNING_RATE
    loss_fn: LossFunction | None = None


# The KL term pushes only after the policy left its reference: in the second step, at a rate that keeps it near.
TWO_STEPS: dict[str, Any] = {"num_steps": 2, "learning_rate": 0.5}
TOKEN_BUDGET = {"max_tokens_per_micro_batch": 20, "max_length": 20}
CASES = {
    "dapo": Case({"loss_type": "dapo"}),
    "dapo-accumulated": Case({"loss_type": "dapo"}, split=(2, 2, 2)),
    "dapo-two-steps": Case({"loss_type": "dapo"}, **TWO_STEPS),
    "grpo": Case({"loss_type": "grpo"}, is_instance=True),
    "grpo-accumulated": Case({"loss_type": "grpo"}, split=(2, 2, 2)),
    "clipped": Case({"loss_type": "grpo", "max_grad_norm": 0.5}),
    "reference": Case({"loss_type": "dapo", "beta": 0.5}, **TWO_STEPS),
    "rank-without-data": Case({"loss_type": "dapo"}, num_rollouts=4),
    "token-budget": Case({"loss_type": "dapo", **TOKEN_BUDGET}),
    "diverging-loss": Case(loss_fn=diverging_loss),
    "infinite-loss": Case(loss_fn=infinite_loss),
}


def run_case(
    case: Case,
    model: Path,
    output: Path,
    rank: int = 0,
    parallelism: str = "none",
    publish_url: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train.

    Args:
        case ([`Case`]):
            What.
        model (`Path`):
            Directory of `policy()` with a tokenizer.
        output (`Path`):
            Directory that may be written to.
        rank (`int`, *optional*, defaults to `0`):
            Which share of the rollouts is trained here.
        parallelism (`str`, *optional*, defaults to `"none"`):
            `"none"`, `"ddp"`, `"zero2"`, `"zero3"`, `"ulysses2"` or `"ulysses3"`: what must have happened.
        publish_url (`str`, *optional*):
            Server that the trained policy is published to.
        options:
            More of `AtroposConfig`.

    Returns:
        `dict[str, Any]`: `weights`, those after training; `published`, the metrics of the publish; `change`, weights before minus weights after, divided by the learning rate: after a single step
        the gradient; `loss`, mean of the steps; `error`, of a run that [`NonFiniteGradientError`] ended; `items`, for
        each call of `training_step` the number of rollouts of its micro-batches; `refusals`, where ranks share sequences,
        why the models of `OF_PIECES` cannot.
    """
    descent = {"optim": "sgd", "learning_rate": case.learning_rate, "lr_scheduler_type": "constant"}
    run = {"max_steps": case.num_steps, "max_grad_norm": 0.0, "save_strategy": "no"}
    trainer = make_trainer(
        case.split,
        output,
        None if case.is_instance else str(model),
        case.loss_fn,
        **{**descent, **run, **case.options, **options},
    )
    items = deal(case, rank)
    # No servers here: nothing to publish to, and the rollouts are at hand.
    trainer.pop_callback(StepCallback)
    trainer.get_train_dataloader = lambda: endless_data(items * case.num_steps)
    error, loss = None, math.nan
    try:
        loss = Trainer.train(trainer).training_loss
    except NonFiniteGradientError as exc:
        error = exc.what
    check_parallelism(trainer, parallelism)
    published = None if publish_url is None else publish(trainer, publish_url)
    # The publish left everything where it was.
    check_parallelism(trainer, parallelism)
    sharing = trainer._sequence_parallel
    refusals = {} if sharing is None else {name: why_not_in_pieces(name, sharing) for name in OF_PIECES}
    before, after = policy().state_dict(), whole_weights(trainer, parallelism)
    return {
        "weights": after,
        "published": published,
        "change": {name: (before[name] - weight) / case.learning_rate for name, weight in after.items()},
        "loss": loss,
        "error": error,
        "items": [[len(micro_batch) for micro_batch in item] for item in items],
        "refusals": refusals,
    }


def publish(trainer: AtroposTrainer, url: str) -> dict[str, float]:
    """Publish as the trainer does, without an Atropos API, to a server of which rank 0 alone knows."""
    options = WeightSyncOptions(on_publish_failure="abort", logprob_probe_interval=1)
    servers = None
    if trainer.is_world_process_zero():
        client = AtroposVLLMClient(url, connection_timeout=10, request_timeout=30)
        servers = ServerGroup([ServerLink(client, SharedMemoryTransport(), torch.float32, options)], options)
    probe = LogprobProbe(None, trainer.model.config.vocab_size)
    publisher = PolicyPublisher(
        options, torch.float32, servers, make_probe=lambda model: probe, on_main=run_on_main_process
    )
    report = publisher.publish(trainer.accelerator.unwrap_model(trainer.model), 1)
    publisher.close()
    return report.metrics()


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
OF_PIECES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "everything before": (LlamaForCausalLM, LlamaConfig, {}),
    "a window": (MistralForCausalLM, MistralConfig, {"sliding_window": 8}),
    "a state": (Lfm2ForCausalLM, Lfm2Config, {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64}),
}
"""What layers of a model attend to: model class, config class and options."""


def why_not_in_pieces(name: str, sequence_parallel: SequenceParallel) -> str | None:
    """What the check at start says of a model whose sequences ranks share; None if it takes them."""
    model_class, config_class, options = OF_PIECES[name]
    # DeepSpeed's attention knows the heads of the model that it came with.
    sizes = {key: getattr(policy().config, key) for key in SIZES}
    torch.manual_seed(0)
    # Not by `_from_config`, which would cut the weights in pieces, too.
    model = model_class(config_class(**sizes, **options, initializer_range=0.1, attn_implementation="sdpa"))
    whole = {"max_length": 20, "dtype": torch.float32, "device": torch.device("cpu")}
    try:
        plan_forward(model, model, "padded", **whole, sequence_parallel=sequence_parallel)
    except PreflightError as exc:
        return exc.what
    return None


def deal(case: Case, rank: int) -> list[Any]:
    """What the stream of a rank yields in one step."""
    num_ranks, accumulation, size = case.split
    rollouts = ragged_rollouts()[: case.num_rollouts]
    max_tokens = case.options.get("max_tokens_per_micro_batch")
    if max_tokens is not None:
        return [deal_by_tokens(rollouts, max_tokens=max_tokens, layout="tree", world_size=num_ranks)[rank]]
    dealt = deal_by_count(rollouts, micro_batch_size=size, num_micro_batches=accumulation, world_size=num_ranks)
    return [[micro_batch] for micro_batch in dealt[rank]]


def check_parallelism(trainer: AtroposTrainer, parallelism: str) -> None:
    """Fail if the processes trained each for itself, or with whole weights where pieces were meant."""
    kind, wrapped = trainer.accelerator.distributed_type, trainer.model_wrapped
    if parallelism == "none":
        assert kind == DistributedType.NO, kind
        return
    sharing = trainer._sequence_parallel
    num_sharing = 1 if sharing is None else sharing.size
    assert num_sharing == (2 if parallelism.startswith("ulysses") else 1)
    assert dist.get_world_size() == trainer.accelerator.num_processes == 2 * num_sharing
    if parallelism == "ddp":
        assert kind == DistributedType.MULTI_CPU, kind
        assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel), type(wrapped)
        return
    assert kind == DistributedType.DEEPSPEED, kind
    assert wrapped.zero_optimization_stage() == int(parallelism[-1])
    num_parameters = sum(parameter.numel() for parameter in policy().parameters())
    if parallelism.endswith("2"):
        # A share of the parameters with weight decay and one of those without, each padded for the collectives.
        pieces = [piece.numel() for piece in wrapped.optimizer.single_partition_of_fp32_groups]
        assert abs(sum(pieces) - num_parameters // dist.get_world_size()) < 64, pieces
        return
    assert trainer._get_forward().scorer.plan.is_head_sharded
    for name, parameter in trainer.model.named_parameters():
        assert parameter.shape == (0,), (name, parameter.shape)
        assert parameter.ds_tensor.numel() == -(-parameter.ds_numel // dist.get_world_size()), name
    assert sum(parameter.ds_numel for parameter in trainer.model.parameters()) == num_parameters


def whole_weights(trainer: AtroposTrainer, parallelism: str) -> Gradient:
    gathered: Any = nullcontext()
    if parallelism.endswith("3"):
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(trainer.model.parameters()))
    with gathered:
        return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def main(model: Path, output: Path, parallelism: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    # A few tokens at a time: the backward pass makes most logits again, of weights that may be in pieces by then.
    MAX_LOGITS["cpu"] = 8 * VOCAB_SIZE
    options: dict[str, Any] = {}
    if parallelism.startswith(("zero", "ulysses")):
        import deepspeed

        # Reduce with gloo: DeepSpeed's own operation would be compiled on the spot.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # With use_cpu, transformers leaves the configuration of DeepSpeed aside without a word. Without ddp_backend,
        # accelerate knows no backend for DeepSpeed on a CPU and takes each process for the only one.
        options = {"use_cpu": False, "ddp_backend": "gloo"}
    rank = int(os.environ["RANK"])
    results = {}
    for name in names:
        case, share = CASES[name], rank
        if parallelism.startswith("ulysses"):
            # Two ranks share a sequence, and so a share of the rollouts; a micro-batch is one sequence.
            case, share = replace(case, split=(2, 4, 1)), rank // 2
        publish_url = os.environ["PUBLISH_URL"] if name == names[0] else None
        results[name] = run_case(case, model, output, share, parallelism, publish_url, **options)
    torch.save(results, output / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
