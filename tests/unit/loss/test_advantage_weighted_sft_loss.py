"""The public advantage-weighted cross entropy: against transformers' loss, and what it does with bad input."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import tiny_llama
from torch import Tensor

from trl_atropos.loss.weighted_sft import advantage_weighted_sft_loss, expand_advantages


VOCAB_SIZE = 11
INPUT_IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 1, 2]])
LOSS_MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 1]])


@pytest.fixture
def logits() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*INPUT_IDS.shape, VOCAB_SIZE, generator=generator, requires_grad=True)


def expected_loss(logits: Tensor, advantages: Tensor) -> Tensor:
    """Token by token, from the definition."""
    rows, positions = LOSS_MASK.nonzero(as_tuple=True)
    log_softmax = logits.log_softmax(dim=-1)
    terms = [
        advantages[row, position] * log_softmax[row, position - 1, INPUT_IDS[row, position]]
        for row, position in zip(rows.tolist(), positions.tolist(), strict=True)
    ]
    return -sum(terms) / len(terms)


class TestValue:
    def test_with_advantages_1_loss_and_gradient_are_those_of_transformers(self):
        model = tiny_llama(vocab_size=VOCAB_SIZE, hidden_size=16, initializer_range=0.3)

        def with_gradient(loss: Tensor) -> tuple[Tensor, Tensor]:
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])

        labels = INPUT_IDS.masked_fill(LOSS_MASK == 0, -100)
        theirs = with_gradient(model(input_ids=INPUT_IDS, labels=labels).loss)
        ours = with_gradient(
            advantage_weighted_sft_loss(model(input_ids=INPUT_IDS).logits, INPUT_IDS, torch.ones(2, 5), LOSS_MASK)
        )
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)
        assert (ours[1] - theirs[1]).norm() < 1e-6 * theirs[1].norm()

    def test_each_token_is_weighed_with_its_own_advantage(self, logits):
        advantages = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
        loss = advantage_weighted_sft_loss(logits, INPUT_IDS, advantages, LOSS_MASK)
        torch.testing.assert_close(loss, expected_loss(logits, advantages))

    @pytest.mark.parametrize("shape", [(2,), (2, 1)])
    def test_one_advantage_for_each_rollout(self, logits, shape):
        loss = advantage_weighted_sft_loss(logits, INPUT_IDS, torch.tensor([2.0, -1.0]).reshape(shape), LOSS_MASK)
        torch.testing.assert_close(loss, expected_loss(logits, torch.tensor([[2.0], [-1.0]]).expand(2, 5)))

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16])
    def test_any_dtype_of_the_mask(self, logits, dtype):
        loss = advantage_weighted_sft_loss(logits, INPUT_IDS, torch.ones(2), LOSS_MASK.to(dtype))
        torch.testing.assert_close(loss, expected_loss(logits, torch.ones(2, 5)))

    def test_empty_mask_gives_zero_with_a_graph(self, logits):
        loss = advantage_weighted_sft_loss(logits, INPUT_IDS, torch.ones(2), torch.zeros(2, 5))
        loss.backward()
        assert loss.item() == 0.0
        assert (logits.grad == 0).all()

    def test_first_token_never_counts(self, logits):
        # Nothing predicts it: neither its logprob nor its place in the denominator exists.
        with_first = LOSS_MASK.clone()
        with_first[:, 0] = 1
        advantages = torch.ones(2, 5)
        advantages[:, 0] = math.nan
        loss = advantage_weighted_sft_loss(logits, INPUT_IDS, advantages, with_first)
        torch.testing.assert_close(loss, expected_loss(logits, torch.ones(2, 5)))

    def test_num_trained_tokens_makes_two_micro_batches_sum_to_the_whole(self, logits):
        # 3 + 3 trained tokens; a mean of each half would make the sum twice the whole.
        advantages = torch.tensor([2.0, -1.0])
        halves = [
            advantage_weighted_sft_loss(
                logits[row], INPUT_IDS[row], advantages[row], LOSS_MASK[row], num_trained_tokens=6
            )
            for row in (slice(0, 1), slice(1, 2))
        ]
        whole = advantage_weighted_sft_loss(logits, INPUT_IDS, advantages, LOSS_MASK)
        torch.testing.assert_close(sum(halves), whole)

    def test_gradient_is_the_numerical_one(self, logits):
        advantages = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
        assert torch.autograd.gradcheck(
            lambda logits: advantage_weighted_sft_loss(logits, INPUT_IDS, advantages, LOSS_MASK),
            (logits.detach().double().requires_grad_(),),
        )


class TestBadInput:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_non_finite_advantage_is_ignored_where_untrained(self, logits, value):
        advantages = torch.ones(2, 5).masked_fill(LOSS_MASK == 0, value)
        loss = advantage_weighted_sft_loss(logits, INPUT_IDS, advantages, LOSS_MASK)
        loss.backward()
        torch.testing.assert_close(loss, expected_loss(logits, torch.ones(2, 5)))
        assert logits.grad.isfinite().all()

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_non_finite_advantage_is_refused_where_trained(self, logits, value):
        advantages = torch.ones(2, 5)
        advantages[1, 2] = value
        with pytest.raises(ValueError, match=r"^1 of 6 trained advantages are not finite.*loss_mask"):
            advantage_weighted_sft_loss(logits, INPUT_IDS, advantages, LOSS_MASK)

    @pytest.mark.parametrize("value", [0.5, 2.0, -1.0, math.nan])
    def test_mask_that_weighs_is_refused(self, logits, value):
        mask = LOSS_MASK.float()
        mask[0, 3] = value
        with pytest.raises(ValueError, match=r"loss_mask has values other than 0 and 1.*multiply the advantages"):
            advantage_weighted_sft_loss(logits, INPUT_IDS, torch.ones(2), mask)

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((2, 4, VOCAB_SIZE), r"logits has shape \(2, 4, 11\), input_ids has shape \(2, 5\)"),
            ((10, VOCAB_SIZE), r"logits has shape \(10, 11\), input_ids has shape \(2, 5\)"),
        ],
    )
    def test_logits_of_other_tokens_are_refused(self, shape, message):
        with pytest.raises(ValueError, match=message):
            advantage_weighted_sft_loss(torch.zeros(shape), INPUT_IDS, torch.ones(2), LOSS_MASK)

    @pytest.mark.parametrize("shape", [(2, 4), (2,), (2, 1), (1, 5)])
    def test_mask_of_another_shape_is_refused(self, logits, shape):
        message = rf"input_ids has shape \(2, 5\), loss_mask has shape \({', '.join(map(str, shape))},?\)"
        with pytest.raises(ValueError, match=message):
            advantage_weighted_sft_loss(logits, INPUT_IDS, torch.ones(2), torch.ones(shape))

    @pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 5), (2, 4), (5, 2), (2, 5, 1)])
    def test_advantages_of_another_shape_are_refused(self, logits, shape):
        named = str(shape).replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(ValueError, match=rf"advantages has shape {named}, expected \(2, 5\), \(2, 1\) or \(2,\)"):
            advantage_weighted_sft_loss(logits, INPUT_IDS, torch.ones(shape), LOSS_MASK)


@pytest.mark.parametrize(
    ("advantages", "expanded"),
    [
        ([1.0, 2.0], [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]),
        ([[1.0], [2.0]], [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]),
        ([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_expand_advantages(advantages, expanded, dtype):
    result = expand_advantages(torch.tensor(advantages, dtype=dtype), torch.Size((2, 3)))
    assert result.dtype == torch.float32
    assert result.tolist() == expanded
