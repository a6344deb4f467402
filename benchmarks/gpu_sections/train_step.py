"""A training step of AtroposTrainer in every way to attend: forward, loss and backward, with gradient checkpointing."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch

from trl_atropos import AtroposConfig, AtroposTrainer
from trl_atropos.policy.forward import PolicyForward
from trl_atropos.policy.scoring import ForwardPlan, PolicyScorer

from .attention import Variant, using, variants
from .bench import Bench, case_lengths, make_rollouts, qwen3


CASES = ("128/32/8", "512/512/8", "512/2048/8", "2048/1024/16", "512/6144/4")
TINY_CASES = ("16/8/4", "8/40/4")


def run(bench: Bench) -> None:
    trainer, wrapped = make_trainer(bench)
    start = time.perf_counter()
    plan = trainer._get_forward().scorer.plan
    attention = trainer.model.config._attn_implementation
    bench.report(chosen=plan.layout, attention=attention, fallbacks=plan.fallbacks, s=time.perf_counter() - start)
    for case in TINY_CASES if bench.is_tiny else CASES:
        rollouts = make_rollouts(*case_lengths(case), trainer.model.config.vocab_size)
        for variant in (variant for variant in variants(bench) if variant.is_timed):
            bench.attempt(
                lambda v=variant, r=rollouts: measure(bench, trainer, wrapped, v, r), case=case, variant=variant.name
            )
    bench.report(unique_graphs=torch._dynamo.utils.counters["stats"]["unique_graphs"])


def make_trainer(bench: Bench) -> tuple[AtroposTrainer, Any]:
    """A trainer, and its model as accelerate wraps it."""
    with tempfile.TemporaryDirectory() as directory:
        args = AtroposConfig(
            output_dir=directory,
            use_cpu=not bench.is_cuda,
            report_to="none",
            loss_type="dapo",
            inference_logprobs="recompute",
            per_device_train_batch_size=8,
            max_length=16_384,
        )
        trainer = AtroposTrainer(qwen3(bench), args)
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = trainer.accelerator.prepare_model(trainer.model)
    trainer.model_wrapped = wrapped
    return trainer, wrapped.train()


def one_step(trainer: AtroposTrainer, wrapped: Any, rollouts: list[Any]) -> None:
    trainer.model.zero_grad()
    # Laying out and weighing belong to the step.
    (item,), num_items = trainer.get_batch_samples(iter([[rollouts]]), 1, trainer.args.device)
    trainer.training_step(wrapped, item, num_items)


def measure(
    bench: Bench, trainer: AtroposTrainer, wrapped: Any, variant: Variant, rollouts: list[Any]
) -> dict[str, Any]:
    plan = ForwardPlan(variant.layout, projects_in_pieces=True)
    scorer = PolicyScorer(trainer.model, plan, trainer.accelerator.autocast)
    trainer._forward = PolicyForward(scorer, None, 1)
    with using(variant, trainer.model):
        timed = bench.time(lambda: one_step(trainer, wrapped, rollouts), repeats=3, warmup=1)
    num_tokens = sum(rollout.num_tokens for rollout in rollouts)
    trainer.model.zero_grad()
    return {**timed, "tokens_s": num_tokens / timed["s"]}
