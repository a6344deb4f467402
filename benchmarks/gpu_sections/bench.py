"""What the sections share: reporting, timing, models with random weights, and rollouts."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rollouts import as_rollouts
from transformers import Qwen3Config, Qwen3ForCausalLM

from trl_atropos.types import Rollout


@dataclass(frozen=True)
class Bench:
    """A section on its device."""

    section: str
    device: torch.device
    is_tiny: bool

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def report(self, **fields: Any) -> None:
        print(
            json.dumps({"section": self.section, **{key: rounded(value) for key, value in fields.items()}}), flush=True
        )

    def attempt(self, function: Callable[[], dict[str, Any]], **fields: Any) -> None:
        """Report what a function measures, or how it failed; out of memory is a result too."""
        try:
            self.report(**fields, **function())
        # Whatever one variant raises, the others are still to be measured.
        except Exception as exc:
            self.report(**fields, error=f"{type(exc).__name__}: {exc}"[:300])
        if self.is_cuda:
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def time(self, function: Callable[[], object], repeats: int = 5, warmup: int = 2) -> dict[str, float]:
        """Median and best seconds of a call, and the most memory that it held beyond what was there before."""
        if self.is_tiny:
            repeats = warmup = 1
        times, held = [], 0
        for number in range(warmup + repeats):
            self.synchronize()
            if self.is_cuda and number == warmup:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            start = time.perf_counter()
            function()
            self.synchronize()
            times.append(time.perf_counter() - start)
        peak = {"peak_gb": (torch.cuda.max_memory_allocated() - held) / 1e9} if self.is_cuda else {}
        return {"s": statistics.median(times[warmup:]), "best_s": min(times[warmup:]), "first_s": times[0], **peak}


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def qwen3(bench: Bench, **changes: Any) -> Qwen3ForCausalLM:
    """A Qwen3 of 0.6B parameters with random weights in float32, or a tiny one."""
    large = {
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    small = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    sizes = {**(small if bench.is_tiny else large), "tie_word_embeddings": True, "max_position_embeddings": 40_960}
    torch.manual_seed(0)
    with bench.device:
        return Qwen3ForCausalLM(Qwen3Config(**{**sizes, **changes}))


def make_rollouts(prompt_length: int, lengths: Sequence[int], vocab_size: int) -> list[Rollout]:
    """A group of rollouts of one prompt, with completions of these lengths."""
    generator = torch.Generator().manual_seed(0)
    prompt, completions, advantages = torch.randint(vocab_size, (prompt_length,), generator=generator), [], []
    for length in lengths:
        completions.append(torch.randint(vocab_size, (length,), generator=generator))
        advantages.append(torch.randn((), generator=generator))
    return as_rollouts(prompt, completions, advantages)


def case_lengths(case: str) -> tuple[int, list[int]]:
    """`PROMPT/COMPLETION/ROLLOUTS`: the length of the prompt and those of the completions, ragged from a half up."""
    prompt, completion, number = map(int, case.split("/"))
    return prompt, [completion - completion * i // (2 * number) for i in range(number)]
