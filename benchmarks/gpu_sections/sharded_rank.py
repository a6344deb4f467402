"""What each rank of `sharded` runs: `accelerate launch ... -m gpu_sections.sharded_rank DIRECTORY VARIANT DEVICE`.

Trains a small policy on recorded groups, then stages it as a publish does, loads what was staged into a model that is
not sharded, quantised or adapted, and compares the two.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_atropos import AtroposTrainer
from trl_atropos.weight_sync.base import PolicyLayout
from trl_atropos.weight_sync.weights.source import PolicyWeights
from trl_atropos.weight_sync.weights.staging import StagedPolicy

from .bench import Bench
from .training import make_trainer, small_policy, what_it_did


VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"peft": True},
    "beta": {"beta": 0.05},
    "qlora": {"peft": True, "bf16": True},
}


def main(directory: Path, variant: str, device: torch.device) -> None:
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if device.type == "cuda" and torch.cuda.device_count() < num_ranks:
        # All of them on the one card: read by accelerate and DeepSpeed, which would each take a card of its own.
        os.environ["LOCAL_RANK"] = "0"
    bench = Bench("sharded", device, is_tiny=True)
    model = quantised(bench, directory / "base") if variant == "qlora" else None
    trainer = make_trainer(
        bench,
        directory / "groups.jsonl",
        str(directory / "run"),
        model=model,
        # The same batch, whoever has a part of it.
        per_device_train_batch_size=8 // num_ranks,
        **{"bf16": True, **VARIANTS[variant]},
    )
    trainer.train()
    result = {**what_it_did(trainer), "distributed": str(trainer.accelerator.distributed_type)}
    result["policy"] = type(trainer.model_wrapped).__name__
    result.update(publish(bench, trainer))
    print(json.dumps(result), flush=True)


def quantised(bench: Bench, directory: Path) -> Any:
    small_policy(bench).to(torch.bfloat16).save_pretrained(directory)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=quantization, device_map={"": 0})


def publish(bench: Bench, trainer: AtroposTrainer) -> dict[str, Any]:
    """Stages the policy, and compares the logprobs of what arrives with those of what is trained."""
    source = PolicyWeights(trainer.accelerator.unwrap_model(trainer.model_wrapped), torch.float32)
    specs = source.manifest()
    layout = PolicyLayout(specs)
    memory = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    start = time.perf_counter()
    StagedPolicy(layout).stage(source, specs, [memory])
    bench.synchronize()
    stage_s = time.perf_counter() - start
    served = small_policy(bench)
    # The head is tied to the embedding, and not a tensor of its own.
    missing = served.load_state_dict({spec.name: layout.view(memory, spec) for spec in specs}, strict=False)
    if missing.unexpected_keys or set(missing.missing_keys) - {"lm_head.weight"}:
        raise RuntimeError(f"The manifest is not that of the policy: {missing}")
    tokens = torch.randint(500, (1, 64), generator=torch.Generator().manual_seed(1)).to(bench.device)
    trained, arrived = logprobs(trainer.model_wrapped, tokens), logprobs(served, tokens)
    before = logprobs(small_policy(bench), tokens)
    return {
        "is_collective": source.is_collective,
        "stage_s": stage_s,
        "max_logprob_diff": (trained - arrived).abs().max().item(),
        "max_logprob_diff_to_before": (before - arrived).abs().max().item(),
    }


@torch.no_grad()
def logprobs(model: Any, tokens: Tensor) -> Tensor:
    """Of every next token, computed in bfloat16 by autocast, as trained."""
    model.eval()
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits = model(input_ids=tokens, use_cache=False).logits
    return logits.float().log_softmax(-1)[0, :-1].gather(-1, tokens[0, 1:, None])[:, 0]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], torch.device(sys.argv[3]))
