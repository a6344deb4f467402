"""The causal shift, chunked logprobs and entropy, and logits at selected positions of real models."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from trl_atropos.logprobs import (
    align_with_targets,
    next_token_targets,
    select_positions_before,
    token_logprobs_and_entropy,
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class TestCausalShift:
    def test_targets_are_the_next_labels(self):
        labels = torch.tensor([[-100, 5, 6, -100], [-100, -100, -100, 9]])
        assert next_token_targets(labels).tolist() == [[5, 6, -100, -100], [-100, -100, 9, -100]]

    def test_seed_bug_1_first_response_token_is_trained_with_its_own_advantage(self):
        # Prompt 1 2, response 3 4 5, advantages aligned with their tokens. The seed cut `[:, :-1]` off the mask and
        # `[:, 1:]` off the labels: it trained [4, 5] with the advantages of [3, 4].
        labels = torch.tensor([[-100, -100, 3, 4, 5]])
        advantages = torch.tensor([[0.0, 0.0, 0.3, 0.4, 0.5]])
        targets = next_token_targets(labels)
        is_trained = targets != -100
        assert targets[is_trained].tolist() == [3, 4, 5]
        assert align_with_targets(advantages)[is_trained].tolist() == torch.tensor([0.3, 0.4, 0.5]).tolist()
        # Token 3 at index 2 is predicted at index 1.
        assert is_trained.tolist() == [[False, True, True, True, False]]

    def test_label_of_the_first_token_is_gone(self):
        assert next_token_targets(torch.tensor([[7, 8]])).tolist() == [[8, -100]]

    def test_single_token_predicts_nothing(self):
        assert next_token_targets(torch.tensor([[7]])).tolist() == [[-100]]
        assert align_with_targets(torch.tensor([[0.5]])).tolist() == [[0.0]]

    def test_dtype_is_kept_and_the_fill_is_zero(self):
        assert align_with_targets(torch.tensor([[False, True]])).tolist() == [[True, False]]
        assert align_with_targets(torch.tensor([[1.0, math.nan, 2.0]]))[0, -1].item() == 0.0


def reference(logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor) -> tuple[torch.Tensor, ...]:
    log_softmax = torch.log_softmax(logits.double() / temperature.double()[:, None], dim=-1)
    logprobs = log_softmax.gather(-1, targets[:, None]).squeeze(-1)
    return logprobs, -(log_softmax.exp() * log_softmax).sum(-1)


class LargestFloat32(TorchDispatchMode):
    """Records the size of the largest float32 tensor that an operation inside it makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.numel = max(self.numel, tensor.numel())
        return result


class TestTokenLogprobsAndEntropy:
    def test_two_tokens_by_hand(self):
        # logits / T = [ln 3, 0] -> probabilities 3/4, 1/4; entropy -(3/4) ln(3/4) - (1/4) ln(1/4)
        logits = torch.tensor([[2 * math.log(3), 0.0], [math.log(3), 0.0]])
        logprobs, entropy = token_logprobs_and_entropy(logits, torch.tensor([0, 1]), torch.tensor([2.0, 1.0]))
        torch.testing.assert_close(logprobs, torch.tensor([math.log(0.75), math.log(0.25)]))
        expected = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
        torch.testing.assert_close(entropy, torch.tensor([expected, expected]))

    @settings(deadline=None, max_examples=40)
    @given(
        num_tokens=st.integers(1, 9),
        vocab_size=st.integers(1, 50),
        chunk_tokens=st.integers(1, 10),
        scale=st.sampled_from([0.1, 1.0, 30.0]),
        offset=st.sampled_from([0.0, -100.0, 100.0]),
        seed=st.integers(0, 2**16),
    )
    def test_equals_float64_log_softmax(self, num_tokens, vocab_size, chunk_tokens, scale, offset, seed):
        generator = torch.Generator().manual_seed(seed)
        logits = scale * torch.randn(num_tokens, vocab_size, generator=generator) + offset
        targets = torch.randint(vocab_size, (num_tokens,), generator=generator)
        temperature = 0.5 + torch.rand(num_tokens, generator=generator)
        logprobs, entropy = token_logprobs_and_entropy(logits, targets, temperature, chunk_tokens)
        expected_logprobs, expected_entropy = reference(logits, targets, temperature)
        # float32 resolves 6e-8 of a logprob. Logits of size 100 are only resolved to 4e-6, which must not show.
        torch.testing.assert_close(logprobs.double(), expected_logprobs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-6, atol=1e-5)

    def test_gradient_equals_that_of_log_softmax(self):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(7, 13, generator=generator)
        targets = torch.randint(13, (7,), generator=generator)
        temperature = 0.5 + torch.rand(7, generator=generator)
        weights = torch.randn(7, generator=generator)

        chunked_logits = logits.clone().requires_grad_()
        logprobs, _ = token_logprobs_and_entropy(chunked_logits, targets, temperature, chunk_tokens=3)
        (weights * logprobs).sum().backward()
        reference_logits = logits.double().requires_grad_()
        expected, _ = reference(reference_logits, targets, temperature)
        (weights.double() * expected).sum().backward()
        torch.testing.assert_close(chunked_logits.grad.double(), reference_logits.grad, rtol=0, atol=1e-6)

    def test_gradcheck(self):
        logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        targets = torch.tensor([0, 3, 1, 1, 2])
        assert torch.autograd.gradcheck(
            lambda logits: token_logprobs_and_entropy(logits, targets, 0.7, chunk_tokens=2)[0], (logits,)
        )

    def test_bfloat16_logits_are_computed_with_in_float32(self):
        logits = torch.randn(6, 32).bfloat16().requires_grad_()
        targets = torch.randint(32, (6,))
        logprobs, entropy = token_logprobs_and_entropy(logits, targets, 0.7)
        expected, expected_entropy = reference(logits.detach(), targets, torch.full((6,), 0.7))
        torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(entropy.double(), expected_entropy, rtol=0, atol=1e-5)
        logprobs.sum().backward()
        assert logits.grad.dtype == torch.bfloat16

    def test_entropy_has_no_gradient(self):
        logits = torch.randn(2, 3, requires_grad=True)
        logprobs, entropy = token_logprobs_and_entropy(logits, torch.tensor([0, 1]))
        assert logprobs.requires_grad
        assert not entropy.requires_grad

    def test_forbidden_token_has_no_part_in_the_entropy(self):
        # Two equal tokens and one of probability 0: entropy ln 2.
        logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
        logprobs, entropy = token_logprobs_and_entropy(logits, torch.tensor([0]))
        assert entropy.item() == pytest.approx(math.log(2), rel=1e-6)
        logprobs.sum().backward()
        # onehot - softmax = [1 - 1/2, -1/2, 0]
        torch.testing.assert_close(logits.grad, torch.tensor([[0.5, -0.5, 0.0]]))

    def test_no_tokens_are_connected_to_the_logits(self):
        logits = torch.randn(0, 5, requires_grad=True)
        logprobs, entropy = token_logprobs_and_entropy(logits, torch.zeros(0, dtype=torch.int64))
        assert logprobs.shape == entropy.shape == (0,)
        logprobs.sum().backward()
        assert logits.grad.shape == (0, 5)

    def test_no_float32_tensor_exceeds_a_chunk_forward_or_backward(self):
        num_tokens, vocab_size, chunk_tokens = 64, 50, 8
        logits = torch.randn(num_tokens, vocab_size).bfloat16().requires_grad_()
        targets = torch.randint(vocab_size, (num_tokens,))
        with LargestFloat32() as largest:
            logprobs, _ = token_logprobs_and_entropy(logits, targets, 0.7, chunk_tokens)
            logprobs.sum().backward()
        assert largest.numel == chunk_tokens * vocab_size

    def test_nothing_of_logit_size_is_kept_for_the_backward_but_the_logits(self):
        logits = torch.randn(64, 50, requires_grad=True)
        kept: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            token_logprobs_and_entropy(logits, torch.randint(50, (64,)))
        large = [tensor for tensor in kept if tensor.numel() >= logits.numel()]
        assert [tensor.data_ptr() for tensor in large] == [logits.data_ptr()]

    @pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
    def test_bad_temperature_is_refused(self, temperature):
        logits, targets = torch.zeros(2, 3), torch.tensor([0, 1])
        with pytest.raises(ValueError, match=rf"temperature of a token is {temperature}"):
            token_logprobs_and_entropy(logits, targets, temperature)
        with pytest.raises(ValueError, match=rf"temperature of a token is {temperature}"):
            token_logprobs_and_entropy(logits, targets, torch.tensor([1.0, temperature]))

    def test_shapes_that_do_not_fit_are_refused(self):
        with pytest.raises(ValueError, match=r"logits has shape \(2, 3\), targets has shape \(4,\)"):
            token_logprobs_and_entropy(torch.zeros(2, 3), torch.zeros(4, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"logits has shape \(1, 2, 3\)"):
            token_logprobs_and_entropy(torch.zeros(1, 2, 3), torch.zeros(2, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"temperature has shape \(3,\)"):
            token_logprobs_and_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), torch.ones(3))

    def test_chunk_of_no_rows_is_refused(self):
        with pytest.raises(ValueError, match="chunk_tokens is 0"):
            token_logprobs_and_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), chunk_tokens=0)


NUM_ROLLOUTS, NUM_TOKENS, VOCAB_SIZE = 3, 8, 64


@pytest.fixture(params=["untied", "tied", "lora_on_lm_head"])
def model(request) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
        tie_word_embeddings=request.param == "tied",
    )
    model = LlamaForCausalLM(config)
    if request.param == "lora_on_lm_head":
        # Random instead of zero adapters: both factors then have a gradient.
        lora_config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        model = get_peft_model(model, lora_config)
    return model


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(VOCAB_SIZE, (NUM_ROLLOUTS, NUM_TOKENS), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 6:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@pytest.fixture
def positions() -> torch.Tensor:
    positions = torch.zeros(NUM_ROLLOUTS, NUM_TOKENS, dtype=torch.bool)
    positions[0, 2:5] = True
    positions[1, 1] = positions[1, 4] = True
    return positions


def gradients_of(model: nn.Module, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad((logits * weights).sum(), list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


class TestSelectPositionsBefore:
    def test_logits_and_gradients_equal_those_of_the_full_forward(self, model, batch, positions):
        with select_positions_before(model.get_output_embeddings(), positions):
            selected = model(**batch).logits
        full = model(**batch).logits[positions]
        assert selected.shape == (1, 5, VOCAB_SIZE)
        torch.testing.assert_close(selected[0], full, rtol=0, atol=1e-6)
        of_selected, of_full = gradients_of(model, selected[0]), gradients_of(model, full)
        assert any("lm_head" in name or "embed_tokens" in name for name in of_full)
        for name, expected in of_full.items():
            # Gradients here are sums of 5 x 64 terms and reach 1e2; 1e-6 relative to the largest of a tensor.
            atol = 1e-6 * max(1.0, expected.abs().max().item())
            torch.testing.assert_close(of_selected[name], expected, rtol=0, atol=atol, msg=name)

    def test_no_positions_give_zero_gradients_for_all_parameters(self, model, batch):
        nothing = torch.zeros(NUM_ROLLOUTS, NUM_TOKENS, dtype=torch.bool)
        with select_positions_before(model.get_output_embeddings(), nothing):
            logits = model(**batch).logits
        assert logits.shape == (1, 0, VOCAB_SIZE)
        logprobs, _ = token_logprobs_and_entropy(logits[0], torch.zeros(0, dtype=torch.int64))
        logprobs.sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert not parameter.grad.any(), name

    def test_order_is_that_of_masked_labels(self, model, batch, positions):
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, 1:][positions[:, :-1]] = batch["input_ids"][:, 1:][positions[:, :-1]]
        targets = next_token_targets(labels)
        assert torch.equal(targets != -100, positions)
        with select_positions_before(model.get_output_embeddings(), positions):
            logits = model(**batch).logits[0]
        logprobs, _ = token_logprobs_and_entropy(logits, targets[positions])
        log_softmax = model(**batch).logits.log_softmax(-1)
        # Each logprob by its own pair of indices: token t of rollout b is predicted at t - 1.
        expected = [
            log_softmax[b, t - 1, batch["input_ids"][b, t]] for b, t in [(0, 3), (0, 4), (0, 5), (1, 2), (1, 5)]
        ]
        torch.testing.assert_close(logprobs, torch.stack(expected), rtol=0, atol=1e-5)

    def test_model_is_as_before_afterwards(self, model, batch, positions):
        head = model.get_output_embeddings()
        before = model(**batch).logits
        with pytest.raises(KeyError), select_positions_before(head, positions):
            raise KeyError
        with select_positions_before(head, positions):
            model(**batch)
        assert not head._forward_pre_hooks
        assert torch.equal(model(**batch).logits, before)

    def test_logits_to_keep_is_refused(self, model, batch, positions):
        head = model.get_output_embeddings()
        with (
            pytest.raises(RuntimeError, match=r"\(3, 2, 32\), expected .*\(3, 8, 'H'\).*logits_to_keep"),
            select_positions_before(head, positions),
        ):
            model(**batch, logits_to_keep=2)
        assert not head._forward_pre_hooks

    def test_head_that_is_not_called_is_reported(self, model, batch, positions):
        with (
            pytest.raises(RuntimeError, match="did not call the output head Linear"),
            select_positions_before(nn.Linear(32, VOCAB_SIZE), positions),
        ):
            model(**batch)
