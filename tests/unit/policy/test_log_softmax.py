"""The compiled passes over the logits, which a GPU gets, against those that work on a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from trl_atropos.policy import log_softmax
from trl_atropos.policy.log_softmax import check_temperature, log_softmax_at, why_not_compiled


@pytest.fixture
def compiles(monkeypatch) -> Iterator[None]:
    """Compiles on this CPU, too: the same functions through the same compiler, with C++ in the place of Triton."""
    monkeypatch.setattr(log_softmax, "why_not_compiled", lambda device_type: None)
    yield
    log_softmax._compiled.cache_clear()
    torch.compiler.reset()


def scored(logits: Tensor, token_ids: Tensor, temperatures: Tensor, of: str) -> list[Tensor]:
    logits = logits.clone().requires_grad_()
    generator = torch.Generator().manual_seed(1)
    logprobs, entropy = log_softmax_at(logits, token_ids, temperatures)
    terms = {"logprobs": [logprobs], "entropy": [entropy], "both": [logprobs, entropy]}[of]
    sum((term * torch.randn(term.shape, generator=generator)).sum() for term in terms).backward()
    return [logprobs.detach(), entropy.detach(), logits.grad]


def test_compiled_passes_give_the_numbers_of_a_few_rows_at_a_time(compiles, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    for num_tokens, num_ids, of, dtype in (
        (7, 1, "both", torch.float32),
        (5, 1, "logprobs", torch.float32),
        (1, 1, "both", torch.float32),
        (6, 3, "both", torch.float32),
        (9, 1, "entropy", torch.bfloat16),
    ):
        logits = (3 * torch.randn(num_tokens, 50, generator=generator)).to(dtype)
        logits[0, 3] = -torch.inf
        token_ids = torch.randint(4, 50, (num_tokens, num_ids), generator=generator)
        temperatures = 0.5 + torch.rand(num_tokens, generator=generator)
        fused = scored(logits, token_ids, temperatures, of)
        with monkeypatch.context() as context:
            context.setattr(log_softmax, "why_not_compiled", lambda device_type: "not here")
            few_rows = scored(logits, token_ids, temperatures, of)
        for ours, expected in zip(fused, few_rows, strict=True):
            assert ours.dtype == expected.dtype
            # bfloat16 gradients are rounded once on either side.
            torch.testing.assert_close(ours, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_no_token_is_scored_without_a_compiler(compiles):
    logits = torch.zeros(0, 5, requires_grad=True)
    logprobs, entropy = log_softmax_at(logits, torch.zeros(0, 1, dtype=torch.int64), 1.0)
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad is not None and logits.grad.shape == (0, 5)


def test_a_cpu_works_on_a_few_rows_and_says_so():
    assert why_not_compiled("cpu") == "cpu works on a few rows at a time"


def test_a_device_that_nothing_can_be_compiled_for_says_why(monkeypatch):
    why_not_compiled.cache_clear()

    def refuses(*args, **kwargs):
        raise RuntimeError("no C compiler was found\nand more")

    monkeypatch.setattr(torch, "compile", refuses)
    try:
        assert why_not_compiled("cuda") == "RuntimeError: no C compiler was found"
    finally:
        why_not_compiled.cache_clear()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf"), torch.tensor([1.0, 0.0])])
def test_temperatures_that_are_not_positive_and_finite_are_refused(temperature):
    with pytest.raises(ValueError, match="The sampling temperature of a token is"):
        check_temperature(temperature)
