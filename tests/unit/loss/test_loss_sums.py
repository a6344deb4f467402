"""From token losses to the loss of a step: weights, order of tokens, split into micro-batches, numerical gradient."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import at_ratios, loss_inputs, options_of
from torch import Tensor

from trl_atropos.loss.loss_types import AGGREGATIONS, LOSS_TYPES
from trl_atropos.loss.losses import LossInputs, make_loss_function, policy_loss, token_weights
from trl_atropos.loss.options import LossOptions
from trl_atropos.policy.logprobs import token_logprobs_and_entropy


# Two rollouts of 2 and 1 trained tokens in the micro-batch, and one without; in the step 5 rollouts and 6 trained tokens.
@pytest.mark.parametrize(
    ("aggregation", "weights"),
    [
        ("token", [1 / 6, 1 / 6, 1 / 6]),
        ("rollout", [1 / (5 * 2), 1 / (5 * 2), 1 / 5]),
        ("constant", [1 / (5 * 10)] * 3),
        ("rollout_sum", [1 / 5] * 3),
    ],
)
def test_token_weights(aggregation, weights):
    counts = {"num_trained_tokens": 6, "num_rollouts": 5, "max_completion_length": 10}
    result = token_weights(torch.tensor([0, 0, 1]), torch.tensor([2, 1, 0]), aggregation, **counts)
    assert result.dtype == torch.float32
    assert result.tolist() == pytest.approx(weights)


def test_token_weights_of_an_unknown_aggregation_are_refused():
    with pytest.raises(ValueError, match=r"'mean'.*constant, rollout, rollout_sum, token"):
        token_weights(
            torch.tensor([0]),
            torch.tensor([1]),
            "mean",
            num_trained_tokens=1,
            num_rollouts=1,
            max_completion_length=1,
        )


def weights_of(inputs: LossInputs, loss_type: str, *, num_trained_tokens: int, num_rollouts: int) -> Tensor:
    return token_weights(
        inputs.rollout_index,
        torch.bincount(inputs.rollout_index, minlength=inputs.num_rollouts),
        AGGREGATIONS[loss_type],
        num_trained_tokens=num_trained_tokens,
        num_rollouts=num_rollouts,
        max_completion_length=10,
    )


# Rollouts of 2 tokens with A = 1, and of 1 token with A = -3; on policy, logprobs -2. The token losses are -A = -1, -1, 3;
# times the logprob 2, 2, -6 for cispo, vespo and weighted_sft; times the gate 2 / t = 2 or 2 / 1.05 for sapo.
@pytest.mark.parametrize(
    ("loss_type", "loss"),
    [
        ("weighted_sft", (2 + 2 - 6) / 3),
        ("grpo", ((-1 - 1) / 2 + 3) / 2),
        ("dr_grpo", (-1 - 1 + 3) / (2 * 10)),
        ("bnpo", (-1 - 1 + 3) / 3),
        ("dapo", (-1 - 1 + 3) / 3),
        ("cispo", (2 + 2 - 6) / 3),
        ("sapo", (2 * (-1 - 1) / 2 + 2 / 1.05 * 3) / 2),
        ("luspo", ((-1 - 1) + 3) / 2),
        ("vespo", (2 + 2 - 6) / 3),
    ],
)
def test_loss_of_a_step(loss_type, loss):
    inputs = at_ratios([1.0] * 3, [1.0, 1.0, -3.0], lengths=[2, 1])
    weights = weights_of(inputs, loss_type, num_trained_tokens=3, num_rollouts=2)
    token_losses = make_loss_function(options_of(loss_type))(inputs).token_losses
    assert (token_losses * weights).sum().item() == pytest.approx(loss, rel=1e-6)


ALL_OPTIONS = [
    *(options_of(loss_type) for loss_type in LOSS_TYPES),
    LossOptions(loss_type="grpo", importance_sampling_level="sequence", off_policy_mask_threshold=0.1),
    LossOptions(loss_type="luspo", importance_sampling_level="sequence", delta=1.5, beta=0.1),
    LossOptions(loss_type="dapo", vllm_importance_sampling_correction=True),
    LossOptions(
        loss_type="sapo", vllm_importance_sampling_correction=True, vllm_importance_sampling_mode="token_mask"
    ),
]


class TestInvariance:
    """Rollouts of 0 to 4 trained tokens, off policy."""

    @staticmethod
    def random_inputs(seed: int, lengths: list[int]) -> LossInputs:
        generator = torch.Generator().manual_seed(seed)
        trainer, inference, reference = -3 * torch.rand(3, sum(lengths), generator=generator, dtype=torch.float64)
        advantages = torch.randn(sum(lengths), generator=generator)
        return loss_inputs(trainer, advantages, inference, lengths=lengths, ref_logprobs=reference)

    @staticmethod
    def select(inputs: LossInputs, tokens: Tensor, first_rollout: int, num_rollouts: int) -> LossInputs:
        columns = ("trainer_logprobs", "advantages", "entropy", "inference_logprobs", "ref_logprobs")
        return LossInputs(
            **{name: getattr(inputs, name)[tokens] for name in columns},
            rollout_index=inputs.rollout_index[tokens] - first_rollout,
            num_rollouts=num_rollouts,
        )

    @settings(deadline=None, max_examples=60)
    @given(
        lengths=st.lists(st.integers(0, 4), min_size=1, max_size=6),
        cut=st.integers(0, 6),
        options=st.sampled_from(ALL_OPTIONS),
        seed=st.integers(0, 2**16),
    )
    def test_two_micro_batches_give_the_gradient_of_one(self, lengths, cut, options, seed):
        # Seed bug 5: a mean of the means of micro-batches weighs the tokens of short ones more.
        cut = min(cut, len(lengths))
        whole = self.random_inputs(seed, lengths)
        is_first = whole.rollout_index < cut
        parts = (self.select(whole, is_first, 0, cut), self.select(whole, ~is_first, cut, len(lengths) - cut))

        def gradient(micro_batches: Sequence[LossInputs]) -> Tensor:
            step = {"num_trained_tokens": sum(lengths), "num_rollouts": len(lengths)}
            losses = [
                (policy_loss(part, options).token_losses * weights_of(part, options.loss_type, **step)).sum()
                for part in micro_batches
            ]
            return torch.autograd.grad(sum(losses), whole.trainer_logprobs)[0]

        torch.testing.assert_close(gradient(parts), gradient([whole]), rtol=1e-12, atol=1e-12)

    @settings(deadline=None, max_examples=60)
    @given(
        lengths=st.lists(st.integers(0, 4), min_size=1, max_size=5),
        options=st.sampled_from(ALL_OPTIONS),
        seed=st.integers(0, 2**16),
    )
    def test_order_of_tokens_does_not_matter(self, lengths, options, seed):
        inputs = self.random_inputs(seed, lengths)
        order = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(seed))
        shuffled = self.select(inputs, order, 0, len(lengths))
        torch.testing.assert_close(
            policy_loss(shuffled, options).token_losses,
            policy_loss(inputs, options).token_losses[order],
            rtol=1e-12,
            atol=1e-12,
        )


# Of the weights that cispo, vespo and the correction do not differentiate, a numerical gradient sees the change.
@pytest.mark.parametrize(
    "options",
    [
        options
        for options in ALL_OPTIONS
        if options.loss_type not in ("cispo", "vespo") and not options.vllm_importance_sampling_correction
    ],
    ids=lambda options: f"{options.loss_type}-{options.importance_sampling_level}",
)
def test_gradient_from_the_logits_is_the_numerical_one(options):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(5, (6,), generator=generator)
    inference, reference = -3 * torch.rand(2, 6, generator=generator, dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -2.0, -2.0, 0.5, 0.5], dtype=torch.float64)

    def token_losses(logits: Tensor) -> Tensor:
        logprobs, entropy = token_logprobs_and_entropy(logits, targets)
        rollout_index = torch.tensor([0, 0, 1, 1, 1, 2])
        inputs = LossInputs(logprobs, advantages, entropy, rollout_index, 3, inference, reference)
        return policy_loss(inputs, options).token_losses

    assert torch.autograd.gradcheck(token_losses, (logits,))
