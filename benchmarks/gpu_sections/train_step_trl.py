"""The same step by TRL's GRPOTrainer: `_compute_loss` and backward on the same tokens."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from rollouts import as_trl_inputs
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from .bench import Bench, case_lengths, make_rollouts, qwen3
from .train_step import CASES, TINY_CASES


def run(bench: Bench) -> None:
    trainer, wrapped = make_trainer(bench)
    for case in TINY_CASES if bench.is_tiny else CASES:
        rollouts = make_rollouts(*case_lengths(case), trainer.model.config.vocab_size)
        bench.attempt(lambda r=rollouts: measure(bench, trainer, wrapped, r), case=case, variant="TRL")


def make_trainer(bench: Bench) -> tuple[GRPOTrainer, Any]:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>")),
        eos_token="<eos>",
        pad_token="<eos>",
    )
    with tempfile.TemporaryDirectory() as directory:
        args = GRPOConfig(
            output_dir=directory,
            use_cpu=not bench.is_cuda,
            bf16=bench.is_cuda,
            report_to="none",
            per_device_train_batch_size=8,
            num_generations=8,
            loss_type="dapo",
            beta=0.0,
            temperature=1.0,
        )
        trainer = GRPOTrainer(
            model=qwen3(bench),
            reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
            args=args,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": ["unused"] * 8}),
        )
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.current_gradient_accumulation_steps = 1
    return trainer, trainer.accelerator.prepare_model(trainer.model).train()


def measure(bench: Bench, trainer: GRPOTrainer, wrapped: Any, rollouts: list[Any]) -> dict[str, Any]:
    completions = [rollout.input_ids[rollout.labels != -100] for rollout in rollouts]
    prompt = rollouts[0].input_ids[: rollouts[0].num_tokens - completions[0].numel()]
    advantages = torch.stack([rollout.advantages[0] for rollout in rollouts])
    inputs = as_trl_inputs(prompt, completions, advantages)
    inputs = {name: tensor.to(bench.device) for name, tensor in inputs.items()}

    def step() -> None:
        trainer.model.zero_grad()
        with trainer.compute_loss_context_manager():
            loss = trainer._compute_loss(wrapped, inputs)
        trainer.accelerator.backward(loss)

    timed = bench.time(step, repeats=3, warmup=1)
    trainer.model.zero_grad()
    return {**timed, "tokens_s": sum(rollout.num_tokens for rollout in rollouts) / timed["s"]}
