"""Logprobs and entropy from hidden states, forward and backward, at the vocabulary of Qwen3, in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trl_atropos.policy import log_softmax
from trl_atropos.policy.logprobs import score_hidden_states

from .bench import Bench


def run(bench: Bench) -> None:
    vocab, hidden = (1000, 32) if bench.is_tiny else (151_936, 1024)
    bench.report(compiled=str(log_softmax.why_not_compiled(bench.device.type) or "yes"))
    for num_tokens in (64, 128) if bench.is_tiny else (2048, 8192, 16_384):
        inputs = make_inputs(bench, num_tokens, vocab, hidden)

        def ours(inputs=inputs) -> Tensor:
            scores = score_hidden_states(
                lambda rows: F.linear(rows, inputs["weight"]), inputs["states"], inputs["targets"], vocab_size=vocab
            )
            return scores.logprobs.sum() + 0.01 * scores.entropy.sum()

        def floor(inputs=inputs) -> Tensor:
            return F.cross_entropy(F.linear(inputs["states"], inputs["weight"]), inputs["targets"], reduction="sum")

        def not_compiled(inputs=inputs, ours=ours) -> dict[str, Any]:
            with few_rows_at_a_time():
                return step(bench, inputs, ours)

        bench.attempt(lambda i=inputs, f=ours: step(bench, i, f), num_tokens=num_tokens, variant="as it is")
        bench.attempt(not_compiled, num_tokens=num_tokens, variant="a few rows at a time")
        variant = "F.cross_entropy, all logits at once, no entropy"
        bench.attempt(lambda i=inputs, f=floor: step(bench, i, f), num_tokens=num_tokens, variant=variant)


@contextmanager
def few_rows_at_a_time() -> Iterator[None]:
    before = log_softmax.why_not_compiled
    log_softmax.why_not_compiled = lambda device_type: "to compare"
    try:
        yield
    finally:
        log_softmax.why_not_compiled = before


def make_inputs(bench: Bench, num_tokens: int, vocab: int, hidden: int) -> dict[str, Tensor]:
    generator = torch.Generator(bench.device).manual_seed(0)
    weight = torch.randn(vocab, hidden, device=bench.device, generator=generator) * 0.02
    states = torch.randn(num_tokens, hidden, device=bench.device, generator=generator)
    return {
        "weight": weight.requires_grad_(),
        "states": states.requires_grad_(),
        "targets": torch.randint(vocab, (num_tokens,), device=bench.device, generator=generator),
    }


def step(bench: Bench, inputs: dict[str, Tensor], loss: Callable[[], Tensor]) -> dict[str, Any]:
    def once() -> None:
        inputs["weight"].grad = inputs["states"].grad = None
        with torch.autocast(bench.device.type, torch.bfloat16):
            value = loss()
        value.backward()

    timed = bench.time(once)
    return {**timed, "grad_norm": inputs["states"].grad.norm().item()}
