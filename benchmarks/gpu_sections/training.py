"""`AtroposTrainer.train()` on recorded groups, with the options that users set: does it run, and are the numbers right?

The first run is in float32 on this device; the first loss and gradient norm of the others are to be those.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedModel, Qwen3ForCausalLM

from trl_atropos import AtroposConfig, AtroposTrainer

from .bench import Bench, qwen3


NUM_STEPS = 4

RUNS: dict[str, dict[str, Any]] = {
    "float32": {"bf16": False},
    "defaults": {},
    "no checkpointing": {"gradient_checkpointing": False},
    "padded": {"sequence_layout": "padded"},
    "packed": {"sequence_layout": "packed"},
    "two micro-batches": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "token budget": {"max_tokens_per_micro_batch": 512},
    "beta": {"beta": 0.05},
    "entropy": {"entropy_coef": 0.01},
    "fp16": {"fp16": True, "bf16": False},
    "offload": {"activation_offloading": True},
    "lora": {"peft": True},
    "lora, beta": {"peft": True, "beta": 0.05},
    "flex": {"attention": "flex_attention"},
    "eager": {"attention": "eager"},
    "long rows": {"num_tokens": 1500, "max_length": 2048},
    "bfloat16 weights": {"dtype": torch.bfloat16},
}


TINY_RUNS = ("float32", "two micro-batches", "lora, beta")


def run(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "groups.jsonl"
        for name, options in RUNS.items():
            if bench.is_tiny and name not in TINY_RUNS:
                continue
            output_dir = str(Path(directory) / name.replace(" ", "_"))
            bench.attempt(lambda options=options, o=output_dir: train(bench, path, o, **options), run=name)
        resume = {"save_steps": 2, "max_steps": 2}
        output_dir = str(Path(directory) / "resumed")
        bench.attempt(lambda: train(bench, path, output_dir, **resume), run="saves after two steps")
        bench.attempt(lambda: train(bench, path, output_dir, resumes=True), run="resumes")


def group(number: int, num_tokens: int) -> dict[str, Any]:
    """Eight rollouts of at most `num_tokens` tokens, of which a third are the prompt."""
    generator = torch.Generator().manual_seed(number)
    num_prompt = num_tokens // 3
    prompt = torch.randint(500, (num_prompt,), generator=generator).tolist()
    lengths = [(num_tokens - num_prompt) * (8 + i) // 16 for i in range(8)]
    tokens = [prompt + torch.randint(500, (length,), generator=generator).tolist() for length in lengths]
    return {
        "tokens": tokens,
        "masks": [[-100] * num_prompt + ids[num_prompt:] for ids in tokens],
        "scores": torch.rand(8, generator=generator).tolist(),
        "inference_logprobs": [[1.0] * num_prompt + [-6.3] * (len(ids) - num_prompt) for ids in tokens],
    }


def train(bench: Bench, path: Path, output_dir: str, *, resumes: bool = False, **options: Any) -> dict[str, Any]:
    trainer = make_trainer(bench, path, output_dir, **options)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=resumes)
    return {**what_it_did(trainer), "s": time.perf_counter() - start}


def what_it_did(trainer: AtroposTrainer) -> dict[str, Any]:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    plan = trainer._get_forward().scorer.plan
    return {
        "layout": plan.layout,
        "attention": trainer.model.config._attn_implementation,
        "fallbacks": list(plan.fallbacks),
        "loss": [entry["loss"] for entry in logs],
        "grad_norm": [entry["grad_norm"] for entry in logs],
    }


def small_policy(bench: Bench, **options: Any) -> Qwen3ForCausalLM:
    return qwen3(Bench(bench.section, bench.device, is_tiny=True), hidden_size=128, num_hidden_layers=4, **options)


def make_trainer(
    bench: Bench,
    path: Path,
    output_dir: str,
    *,
    model: PreTrainedModel | None = None,
    peft: bool = False,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    num_tokens: int = 120,
    **options: Any,
) -> AtroposTrainer:
    """A trainer of a small policy, or of `model`, on recorded groups that are written to `path`."""
    # Every rank writes the same, and none may read a part of it.
    written = path.with_name(f"{path.name}.{os.getpid()}")
    written.write_text("".join(json.dumps(group(number, num_tokens)) + "\n" for number in range(NUM_STEPS)))
    written.replace(path)
    if model is None:
        model = small_policy(bench, attn_implementation=attention).to(dtype)
    args = AtroposConfig(
        output_dir=output_dir,
        data_path=str(path),
        learning_rate=1e-4,
        report_to="none",
        use_cpu=not bench.is_cuda,
        save_strategy="steps" if "save_steps" in options else "no",
        disable_tqdm=True,
        report_html=False,
        **{"per_device_train_batch_size": 8, "max_length": 512, **options},
    )
    return AtroposTrainer(model, args, peft_config=LoraConfig(target_modules="all-linear") if peft else None)
