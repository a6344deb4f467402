"""The causal shift, chunked logprobs and entropy, scores in pieces, and the hidden states of real models."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny_models import tiny_llama
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trl_atropos.policy import log_softmax
from trl_atropos.policy.logprobs import (
    TokenScores,
    align_with_targets,
    capture_hidden_states,
    next_token_targets,
    score_hidden_states,
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

    @pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4)])
    def test_last_dimension_is_shifted(self, shape):
        values = torch.arange(math.prod(shape)).reshape(shape)
        for shifted, fill in ((next_token_targets(values), -100), (align_with_targets(values), 0)):
            assert shifted.shape == shape
            assert torch.equal(shifted[..., :-1], values[..., 1:])
            assert (shifted[..., -1] == fill).all()

    def test_seed_bug_1_first_response_token_is_trained_with_its_own_advantage(self):
        # Prompt 1 2, response 3 4 5, advantages aligned with their tokens. The seed cut `[:, :-1]` off the mask and
        # `[:, 1:]` off the labels: it trained [4, 5] with the advantages of [3, 4].
        labels = torch.tensor([-100, -100, 3, 4, 5])
        advantages = torch.tensor([0.0, 0.0, 0.3, 0.4, 0.5])
        targets = next_token_targets(labels)
        is_trained = targets != -100
        assert targets[is_trained].tolist() == [3, 4, 5]
        assert align_with_targets(advantages)[is_trained].tolist() == torch.tensor([0.3, 0.4, 0.5]).tolist()
        # Token 3 at index 2 is predicted at index 1.
        assert is_trained.tolist() == [False, True, True, True, False]

    def test_label_of_the_first_token_is_gone(self):
        assert next_token_targets(torch.tensor([7, 8])).tolist() == [8, -100]

    def test_single_token_predicts_nothing(self):
        assert next_token_targets(torch.tensor([7])).tolist() == [-100]
        assert align_with_targets(torch.tensor([0.5])).tolist() == [0.0]

    def test_dtype_is_kept_and_the_fill_is_zero(self):
        assert align_with_targets(torch.tensor([False, True])).tolist() == [True, False]
        assert align_with_targets(torch.tensor([1.0, math.nan, 2.0]))[-1].item() == 0.0

    def test_labels_are_not_changed(self):
        labels = torch.tensor([[7, 8, 9]])
        next_token_targets(labels)
        assert labels.tolist() == [[7, 8, 9]]


def reference(logits: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    log_softmax = torch.log_softmax(logits.double() / temperature.double()[:, None], dim=-1)
    logprobs = log_softmax.gather(-1, targets[:, None]).squeeze(-1)
    return logprobs, -(log_softmax.exp() * log_softmax).sum(-1)


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor of the given dtypes that an operation inside it makes; views count as their size."""

    def __init__(self, *dtypes: torch.dtype):
        super().__init__()
        self.dtypes = dtypes
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.dtype in self.dtypes:
                self.numel = max(self.numel, tensor.numel())
        return result


def saved_for_backward(compute: Callable[[], object]) -> list[Tensor]:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    return saved


@pytest.fixture
def few_rows_at_a_time(monkeypatch) -> Callable[[int], None]:
    """Sets how many logits are worked on at a time, which otherwise are more than any test has."""
    return lambda numel: monkeypatch.setitem(log_softmax.MAX_TEMPORARY_LOGITS, "cpu", numel)


class TestTokenLogprobsAndEntropy:
    def test_two_tokens_by_hand(self):
        # logits / T = [ln 3, 0] -> probabilities 3/4, 1/4; entropy -(3/4) ln(3/4) - (1/4) ln(1/4)
        logits = torch.tensor([[2 * math.log(3), 0.0], [math.log(3), 0.0]])
        logprobs, entropy = token_logprobs_and_entropy(logits, torch.tensor([0, 1]), torch.tensor([2.0, 1.0]))
        torch.testing.assert_close(logprobs, torch.tensor([math.log(0.75), math.log(0.25)]))
        expected = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
        torch.testing.assert_close(entropy, torch.tensor([expected, expected]))

    @settings(deadline=None, max_examples=60)
    @given(
        num_tokens=st.integers(1, 9),
        vocab_size=st.integers(1, 50),
        # Below the vocabulary size it is still one row at a time.
        max_temporary_logits=st.integers(1, 500),
        scale=st.sampled_from([0.1, 1.0, 30.0]),
        offset=st.sampled_from([0.0, -100.0, 100.0]),
        seed=st.integers(0, 2**16),
    )
    def test_equals_float64_log_softmax(self, num_tokens, vocab_size, max_temporary_logits, scale, offset, seed):
        generator = torch.Generator().manual_seed(seed)
        logits = scale * torch.randn(num_tokens, vocab_size, generator=generator) + offset
        targets = torch.randint(vocab_size, (num_tokens,), generator=generator)
        temperature = 0.5 + torch.rand(num_tokens, generator=generator)
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setitem(log_softmax.MAX_TEMPORARY_LOGITS, "cpu", max_temporary_logits)
            logprobs, entropy = token_logprobs_and_entropy(logits, targets, temperature)
        expected_logprobs, expected_entropy = reference(logits, targets, temperature)
        # float32 resolves 6e-8 of a logprob. Logits of size 100 are only resolved to 4e-6, which must not show.
        torch.testing.assert_close(logprobs.double(), expected_logprobs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-6, atol=1e-5)

    # 13 logits a row: chunks of 1, of 3 and of all 7 rows.
    @pytest.mark.parametrize("max_temporary_logits", [1, 39, 1000])
    @pytest.mark.parametrize("of", ["logprobs", "entropy", "both"])
    def test_gradient_equals_that_of_log_softmax(self, few_rows_at_a_time, max_temporary_logits, of):
        few_rows_at_a_time(max_temporary_logits)
        logits = torch.randn(7, 13, requires_grad=True)
        reference_logits = logits.detach().double().requires_grad_()
        targets, temperature = torch.randint(13, (7,)), 0.5 + torch.rand(7)
        weights = torch.randn(2, 7)
        weights[0] *= of != "entropy"
        weights[1] *= of != "logprobs"

        def loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
            terms = {"logprobs": (logprobs,), "entropy": (entropy,), "both": (logprobs, entropy)}[of]
            rows = {"logprobs": weights[:1], "entropy": weights[1:], "both": weights}[of]
            return (torch.stack(terms) * rows).sum()

        loss(*token_logprobs_and_entropy(logits, targets, temperature)).backward()
        loss(*reference(reference_logits, targets, temperature)).backward()
        assert logits.grad.abs().max() > 0.01
        torch.testing.assert_close(logits.grad.double(), reference_logits.grad, rtol=0, atol=1e-6)

    # With and without tokens of probability 0; 4 logits a row, 2 rows at a time.
    @pytest.mark.parametrize("num_forbidden", [0, 1, 3])
    def test_gradcheck(self, few_rows_at_a_time, num_forbidden):
        few_rows_at_a_time(8)
        logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        is_forbidden = torch.arange(4) >= 4 - num_forbidden
        targets = torch.tensor([0, 3, 1, 1, 2]).clamp(max=3 - num_forbidden)
        temperature = torch.tensor([0.7, 1.0, 1.3, 0.5, 2.0], dtype=torch.float64)
        assert torch.autograd.gradcheck(
            lambda logits: token_logprobs_and_entropy(
                logits.masked_fill(is_forbidden, -math.inf), targets, temperature
            ),
            (logits,),
        )

    def test_entropy_gradient_by_hand(self):
        # Probabilities p = 3/4, 1/4: d H / d z_i = -p_i (ln p_i + H) = -(3/16) ln 3 for the first token, and the
        # opposite for the second: with H = ln 4 - (3/4) ln 3, ln(3/4) + H = (1/4) ln 3.
        logits = torch.tensor([[math.log(3), 0.0]], requires_grad=True)
        token_logprobs_and_entropy(logits, torch.tensor([0]))[1].sum().backward()
        expected = 3 / 16 * math.log(3)
        torch.testing.assert_close(logits.grad, torch.tensor([[-expected, expected]]))

    def test_bfloat16_logits_are_computed_with_in_float32(self):
        logits = torch.randn(6, 32).bfloat16().requires_grad_()
        targets = torch.randint(32, (6,))
        logprobs, entropy = token_logprobs_and_entropy(logits, targets, 0.7)
        expected, expected_entropy = reference(logits.detach(), targets, torch.full((6,), 0.7))
        assert logprobs.dtype == entropy.dtype == torch.float32
        torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(entropy.double(), expected_entropy, rtol=0, atol=1e-5)
        (logprobs + entropy).sum().backward()
        assert logits.grad.dtype == torch.bfloat16

    def test_forbidden_token_has_no_part_in_the_entropy(self):
        # Two equal tokens and one of probability 0: entropy ln 2, at its maximum, so its gradient is 0.
        logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
        logprobs, entropy = token_logprobs_and_entropy(logits, torch.tensor([0]))
        assert entropy.item() == pytest.approx(math.log(2), rel=1e-6)
        (logprobs + entropy).sum().backward()
        # onehot - softmax = [1 - 1/2, -1/2, 0]
        torch.testing.assert_close(logits.grad, torch.tensor([[0.5, -0.5, 0.0]]))

    def test_token_too_unlikely_for_float32_has_a_finite_gradient(self):
        # exp(-200) is 0 in float32: p ln p is 0 there, and its logprob is still -200.
        logits = torch.tensor([[0.0, -200.0]], requires_grad=True)
        logprobs, entropy = token_logprobs_and_entropy(logits, torch.tensor([1]))
        assert (logprobs.item(), entropy.item()) == (-200.0, 0.0)
        (logprobs + entropy).sum().backward()
        torch.testing.assert_close(logits.grad, torch.tensor([[-1.0, 1.0]]))

    def test_no_tokens_are_connected_to_the_logits(self):
        logits = torch.randn(0, 5, requires_grad=True)
        logprobs, entropy = token_logprobs_and_entropy(logits, torch.zeros(0, dtype=torch.int64))
        assert logprobs.shape == entropy.shape == (0,)
        (logprobs.sum() + entropy.sum()).backward()
        assert logits.grad.shape == (0, 5)

    def test_no_float32_tensor_exceeds_a_chunk_forward_or_backward(self, few_rows_at_a_time):
        few_rows_at_a_time(8 * 50)
        logits = torch.randn(64, 50).bfloat16().requires_grad_()
        targets = torch.randint(50, (64,))
        with LargestTensor(torch.float32) as largest:
            logprobs, entropy = token_logprobs_and_entropy(logits, targets, 0.7)
            (logprobs + entropy).sum().backward()
        assert largest.numel == 8 * 50

    def test_nothing_of_logit_size_is_kept_for_the_backward_but_the_logits(self):
        logits = torch.randn(64, 50, requires_grad=True)
        saved = saved_for_backward(lambda: token_logprobs_and_entropy(logits, torch.randint(50, (64,))))
        large = [tensor for tensor in saved if tensor.numel() >= logits.numel()]
        assert [tensor.data_ptr() for tensor in large] == [logits.data_ptr()]

    @pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
    def test_bad_temperature_is_refused(self, temperature):
        logits, targets = torch.zeros(2, 3), torch.tensor([0, 1])
        with pytest.raises(ValueError, match=rf"temperature of a token is {temperature}\b.*`--temperature`"):
            token_logprobs_and_entropy(logits, targets, temperature)
        with pytest.raises(ValueError, match=rf"temperature of a token is {temperature}\b"):
            token_logprobs_and_entropy(logits, targets, torch.tensor([1.0, temperature]))

    def test_shapes_that_do_not_fit_are_refused(self):
        with pytest.raises(ValueError, match=r"logits has shape \(2, 3\), targets has shape \(4,\)"):
            token_logprobs_and_entropy(torch.zeros(2, 3), torch.zeros(4, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"logits has shape \(1, 2, 3\)"):
            token_logprobs_and_entropy(torch.zeros(1, 2, 3), torch.zeros(2, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"temperature has shape \(3,\)"):
            token_logprobs_and_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), torch.ones(3))


HIDDEN_SIZE, VOCAB_SIZE = 32, 64


class SoftCapped(nn.Linear):
    """A head whose model squashes its logits, as Gemma 2 does."""

    def forward(self, input: Tensor) -> Tensor:
        return 3.0 * torch.tanh(super().forward(input) / 3.0)


def make_head(kind: str) -> nn.Module:
    if kind == "lora":
        # Random instead of zero adapters: both factors then have a gradient.
        lora_config = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
        wrapped = nn.ModuleDict({"lm_head": nn.Linear(HIDDEN_SIZE, VOCAB_SIZE, bias=False)})
        return inject_adapter_in_model(lora_config, wrapped)["lm_head"]
    if kind == "soft_capped":
        return SoftCapped(HIDDEN_SIZE, VOCAB_SIZE, bias=False)
    return nn.Linear(HIDDEN_SIZE, VOCAB_SIZE, bias=kind == "bias")


HEADS = ["weight", "bias", "lora", "soft_capped"]
NUM_SCORED, NUM_TEACHER_TOKENS = 11, 3


def scoring_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(NUM_SCORED, HIDDEN_SIZE, generator=generator),
        "targets": torch.randint(VOCAB_SIZE, (NUM_SCORED,), generator=generator),
        "temperature": 0.5 + torch.rand(NUM_SCORED, generator=generator),
        "teacher_token_ids": torch.randint(VOCAB_SIZE, (NUM_SCORED, NUM_TEACHER_TOKENS), generator=generator),
    }


def sum_of(scores: TokenScores) -> Tensor:
    """A loss in which every score has a weight of its own."""
    generator = torch.Generator().manual_seed(2)
    total = torch.zeros(())
    for column in (scores.logprobs, scores.entropy, scores.teacher_token_logprobs):
        if column is not None:
            total = total + (column * torch.randn(column.shape, generator=generator)).sum()
    return total


def gradients_of(loss: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True))


def trained_parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def assert_equal_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    """Up to `rtol` of the largest entry of each tensor; none of them may be zero altogether."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=rtol * scale, msg=name)


class TestScoreHiddenStates:
    def score(
        self, head: nn.Module, inputs: dict[str, Tensor], max_logits: int
    ) -> tuple[TokenScores, dict[str, Tensor]]:
        hidden_states = inputs["hidden_states"].clone().requires_grad_()
        scores = score_hidden_states(
            head, **{**inputs, "hidden_states": hidden_states}, vocab_size=VOCAB_SIZE, max_logits=max_logits
        )
        tensors = {"hidden_states": hidden_states, **trained_parameters(head)}
        return scores, gradients_of(sum_of(scores), tensors)

    # Of 11 rows: pieces of one row (also for less than a row), of 4 rows with a rest of 3, and all in one.
    @pytest.mark.parametrize("max_logits", [1, VOCAB_SIZE, 4 * VOCAB_SIZE + 1, NUM_SCORED * VOCAB_SIZE])
    @pytest.mark.parametrize("kind", HEADS)
    def test_equals_plain_log_softmax(self, kind, max_logits):
        head, inputs = make_head(kind), scoring_inputs()
        scores, gradients = self.score(head, inputs, max_logits)
        hidden_states = inputs["hidden_states"].clone().requires_grad_()
        logits = head(hidden_states)
        logprobs, entropy = reference(logits, inputs["targets"], inputs["temperature"])
        teacher_token_logprobs = logits.double().log_softmax(-1).gather(-1, inputs["teacher_token_ids"])
        expected = TokenScores(logprobs.float(), entropy.float(), teacher_token_logprobs.float())
        for name in ("logprobs", "entropy", "teacher_token_logprobs"):
            torch.testing.assert_close(getattr(scores, name), getattr(expected, name), rtol=0, atol=2e-6, msg=name)
        tensors = {"hidden_states": hidden_states, **trained_parameters(head)}
        assert len(tensors) == {"weight": 2, "bias": 3, "lora": 3, "soft_capped": 2}[kind]
        assert_equal_gradients(gradients, gradients_of(sum_of(expected), tensors), rtol=1e-5)

    @pytest.mark.parametrize("kind", HEADS)
    def test_pieces_equal_the_whole_under_bfloat16_autocast(self, kind):
        head, inputs = make_head(kind), scoring_inputs()
        with torch.autocast("cpu", torch.bfloat16):
            whole, whole_gradients = self.score(head, inputs, NUM_SCORED * VOCAB_SIZE)
            pieces, gradients = self.score(head, inputs, 4 * VOCAB_SIZE)
        for name in ("logprobs", "entropy", "teacher_token_logprobs"):
            torch.testing.assert_close(getattr(pieces, name), getattr(whole, name), rtol=0, atol=1e-6, msg=name)
        # bfloat16 has 8 bits: the sum over three pieces is rounded to 2^-9 at each of them.
        assert_equal_gradients(gradients, whole_gradients, rtol=2**-7)

    def test_autocast_ends_before_the_backward(self):
        # As in a Trainer: the forward is under autocast, the backward outside; pieces are projected again there.
        head, inputs = make_head("weight"), scoring_inputs()
        gradients = []
        for max_logits in (NUM_SCORED * VOCAB_SIZE, 4 * VOCAB_SIZE):
            hidden_states = inputs["hidden_states"].clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                scores = score_hidden_states(
                    head, hidden_states, inputs["targets"], vocab_size=VOCAB_SIZE, max_logits=max_logits
                )
            tensors = {"hidden_states": hidden_states, **trained_parameters(head)}
            gradients.append(gradients_of(sum_of(scores), tensors))
        assert_equal_gradients(gradients[1], gradients[0], rtol=2**-7)

    def test_gradient_of_the_head_loses_no_digits_over_many_pieces_under_autocast(self):
        # 128 pieces that share one bfloat16 copy of the head add up their gradients in bfloat16: the error grows with
        # their number. Each piece is rounded once, as the whole is, where they are added up in float32.
        head, hidden_states = make_head("weight"), torch.randn(512, HIDDEN_SIZE)
        targets = torch.randint(VOCAB_SIZE, (512,))

        def gradient(rows: int, is_autocast: bool) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
                scores = score_hidden_states(
                    head, hidden_states, targets, vocab_size=VOCAB_SIZE, max_logits=rows * VOCAB_SIZE
                )
            return torch.autograd.grad(scores.logprobs.sum(), head.weight)[0]

        exact = gradient(512, is_autocast=False)
        error_of_whole, error_of_pieces = ((gradient(rows, is_autocast=True) - exact).norm() for rows in (512, 4))
        assert 0 < error_of_pieces < 1.5 * error_of_whole

    @pytest.mark.parametrize("max_logits", [1, NUM_SCORED * VOCAB_SIZE])
    def test_temperature_may_be_a_number(self, max_logits):
        head, inputs = make_head("weight"), scoring_inputs()
        arguments = {"vocab_size": VOCAB_SIZE, "max_logits": max_logits}
        expected = score_hidden_states(
            head, inputs["hidden_states"], inputs["targets"], torch.full((NUM_SCORED,), 0.7), **arguments
        )
        for temperature in (0.7, torch.tensor(0.7)):
            scores = score_hidden_states(head, inputs["hidden_states"], inputs["targets"], temperature, **arguments)
            assert torch.equal(scores.logprobs, expected.logprobs)
            assert scores.teacher_token_logprobs is None

    @pytest.mark.parametrize("max_logits", [1, 100])
    def test_teacher_tokens_are_scored_at_temperature_1(self, max_logits):
        # Logits ln 2, ln 1, ln 1: probabilities 1/2, 1/4, 1/4 at temperature 1; 4/6, 1/6, 1/6 at temperature 1/2.
        hidden_states = torch.tensor([[math.log(2), 0.0, 0.0]]).repeat(2, 1)
        scores = score_hidden_states(
            nn.Identity(),
            hidden_states,
            torch.tensor([0, 1]),
            0.5,
            vocab_size=3,
            teacher_token_ids=torch.tensor([[0, 1], [2, 2]]),
            max_logits=max_logits,
        )
        torch.testing.assert_close(scores.logprobs, torch.tensor([4 / 6, 1 / 6]).log())
        torch.testing.assert_close(scores.teacher_token_logprobs, torch.tensor([[1 / 2, 1 / 4], [1 / 4, 1 / 4]]).log())

    @pytest.mark.parametrize("num_teacher_tokens", [None, 0, 2])
    def test_no_tokens_are_connected_to_hidden_states_and_head(self, num_teacher_tokens):
        head, hidden_states = make_head("bias"), torch.randn(0, HIDDEN_SIZE, requires_grad=True)
        nothing = torch.zeros(0, dtype=torch.int64)
        ids = None if num_teacher_tokens is None else torch.zeros(0, num_teacher_tokens, dtype=torch.int64)
        scores = score_hidden_states(
            head, hidden_states, nothing, nothing.float(), vocab_size=VOCAB_SIZE, teacher_token_ids=ids
        )
        assert scores.logprobs.shape == scores.entropy.shape == (0,)
        sum_of(scores).backward()
        assert hidden_states.grad.shape == (0, HIDDEN_SIZE)
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_no_tensor_exceeds_the_logits_of_a_piece_forward_or_backward(self, dtype):
        # Hidden states 64 x 2, head 50 x 2: whatever is larger than 128 is made of logits.
        head = nn.Linear(2, 50).to(dtype)
        hidden_states = torch.randn(64, 2, dtype=dtype, requires_grad=True)
        targets, ids = torch.randint(50, (64,)), torch.randint(50, (64, 2))

        def largest(rows: int) -> int:
            with LargestTensor(torch.float32, torch.bfloat16, torch.bool, torch.int64) as largest:
                scores = score_hidden_states(
                    head, hidden_states, targets, vocab_size=50, teacher_token_ids=ids, max_logits=rows * 50
                )
                sum_of(scores).backward()
            return largest.numel

        assert largest(rows=8) == 8 * 50
        assert largest(rows=64) == 64 * 50

    def test_logits_are_not_kept_for_the_backward(self):
        head, hidden_states = nn.Linear(8, 50), torch.randn(64, 8, requires_grad=True)

        def score(rows: int) -> Callable[[], TokenScores]:
            return lambda: score_hidden_states(
                head, hidden_states, torch.randint(50, (64,)), vocab_size=50, max_logits=rows * 50
            )

        # The sizes of what is saved: the whole keeps its 64 x 50 logits, pieces nothing larger than the head.
        assert max(tensor.numel() for tensor in saved_for_backward(score(64))) == 64 * 50
        assert sum(tensor.numel() for tensor in saved_for_backward(score(8))) <= 64 * 8 + 50 * 8 + 64

    @pytest.mark.parametrize("max_logits", [2 * 3, 100])
    def test_shapes_that_do_not_fit_are_refused(self, max_logits):
        # In pieces of 2 rows, too, where each piece alone would fit.
        arguments = {"vocab_size": 3, "max_logits": max_logits}
        targets = torch.zeros(4, dtype=torch.int64)
        with pytest.raises(ValueError, match="targets has shape"):
            score_hidden_states(nn.Identity(), torch.zeros(6, 3), targets, **arguments)
        with pytest.raises(ValueError, match="temperature has shape"):
            score_hidden_states(nn.Identity(), torch.zeros(4, 3), targets, torch.ones(6), **arguments)

    @pytest.mark.parametrize("max_logits", [1, 100])
    def test_bad_temperature_is_refused(self, max_logits):
        with pytest.raises(ValueError, match=r"temperature of a token is 0\.0\."):
            score_hidden_states(
                nn.Identity(),
                torch.zeros(2, 3),
                torch.tensor([0, 1]),
                torch.tensor([1.0, 0.0]),
                vocab_size=3,
                max_logits=max_logits,
            )


NUM_ROLLOUTS, NUM_TOKENS = 3, 8


@pytest.fixture(params=["untied", "tied", "lora_on_lm_head"])
def model(request) -> nn.Module:
    model = tiny_llama(
        tied=request.param == "tied",
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        initializer_range=0.2,
        max_position_embeddings=32,
    )
    if request.param == "lora_on_lm_head":
        lora_config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        model = get_peft_model(model, lora_config)
    return model


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(VOCAB_SIZE, (NUM_ROLLOUTS, NUM_TOKENS), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 6:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


# Rows of 8: positions 2 to 4 of rollout 0 and 1 and 4 of rollout 1; out of order, and 3 twice, as in a prefix tree,
# where several tokens follow one.
INDEX = torch.tensor([2, 3, 12, 4, 3, 9])


def full_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits.flatten(0, 1)


class TestCaptureHiddenStates:
    def test_hidden_states_are_those_of_the_base_model_and_no_logits_are_made(self, model, batch):
        with capture_hidden_states(model.get_output_embeddings()) as captured:
            assert captured.value is None
            logits = model(**batch).logits
        assert logits.shape == (NUM_ROLLOUTS, 0, VOCAB_SIZE)
        expected = model(**batch, output_hidden_states=True).hidden_states[-1]
        assert captured.value.shape == (NUM_ROLLOUTS, NUM_TOKENS, HIDDEN_SIZE)
        assert torch.equal(captured.value, expected)

    @pytest.mark.parametrize("max_logits", [2 * VOCAB_SIZE, 100 * VOCAB_SIZE])
    def test_scores_and_gradients_equal_those_of_the_full_forward(self, model, batch, max_logits):
        head = model.get_output_embeddings()
        targets = torch.randint(VOCAB_SIZE, INDEX.shape)
        with capture_hidden_states(head) as captured:
            empty = model(**batch).logits
        hidden_states = captured.value.flatten(0, 1)[INDEX]
        scores = score_hidden_states(head, hidden_states, targets, 0.7, vocab_size=VOCAB_SIZE, max_logits=max_logits)
        expected = TokenScores(*reference(full_logits(model, batch)[INDEX], targets, torch.full(INDEX.shape, 0.7)))
        torch.testing.assert_close(scores.logprobs.double(), expected.logprobs, rtol=0, atol=1e-5)
        torch.testing.assert_close(scores.entropy.double(), expected.entropy, rtol=0, atol=1e-5)
        parameters = trained_parameters(model)
        gradients = gradients_of(sum_of(scores) + empty.sum(), parameters)
        assert_equal_gradients(gradients, gradients_of(sum_of(expected), parameters), rtol=1e-5)

    def test_empty_logits_alone_give_zero_gradients_for_all_parameters(self, model, batch):
        with capture_hidden_states(model.get_output_embeddings()):
            total = model(**batch).logits.sum()
        assert total.item() == 0
        total.backward()
        for name, parameter in trained_parameters(model).items():
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


class TestSelectPositionsBefore:
    def test_logits_and_gradients_equal_those_of_the_full_forward(self, model, batch):
        with select_positions_before(model.get_output_embeddings(), INDEX):
            selected = model(**batch).logits
        assert selected.shape == (1, 6, VOCAB_SIZE)
        full = full_logits(model, batch)[INDEX]
        torch.testing.assert_close(selected[0], full, rtol=0, atol=1e-6)
        weights, parameters = torch.randn(full.shape), trained_parameters(model)
        assert any("lm_head" in name or "embed_tokens" in name for name in parameters)
        gradients = gradients_of((selected[0] * weights).sum(), parameters)
        assert_equal_gradients(gradients, gradients_of((full * weights).sum(), parameters), rtol=1e-5)

    def test_no_positions_give_zero_gradients_for_all_parameters(self, model, batch):
        nothing = torch.zeros(0, dtype=torch.int64)
        with select_positions_before(model.get_output_embeddings(), nothing):
            logits = model(**batch).logits
        assert logits.shape == (1, 0, VOCAB_SIZE)
        token_logprobs_and_entropy(logits[0], nothing)[0].sum().backward()
        for name, parameter in trained_parameters(model).items():
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name

    def test_order_is_that_of_shifted_labels(self, model, batch):
        labels = torch.full_like(batch["input_ids"], -100)
        labels[0, 3:6] = batch["input_ids"][0, 3:6]
        labels[1, [2, 5]] = batch["input_ids"][1, [2, 5]]
        targets = next_token_targets(labels).flatten()
        (index,) = (targets != -100).nonzero(as_tuple=True)
        with select_positions_before(model.get_output_embeddings(), index):
            logits = model(**batch).logits[0]
        logprobs, _ = token_logprobs_and_entropy(logits, targets[index])
        log_softmax = model(**batch).logits.log_softmax(-1)
        # Each logprob by its own pair of indices: token t of rollout b is predicted at t - 1.
        expected = [
            log_softmax[b, t - 1, batch["input_ids"][b, t]] for b, t in [(0, 3), (0, 4), (0, 5), (1, 2), (1, 5)]
        ]
        torch.testing.assert_close(logprobs, torch.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "context",
    [capture_hidden_states, lambda head: select_positions_before(head, INDEX)],
    ids=["capture_hidden_states", "select_positions_before"],
)
class TestHook:
    def test_model_is_as_before_afterwards(self, model, batch, context):
        head = model.get_output_embeddings()
        before = model(**batch).logits
        with pytest.raises(KeyError), context(head):
            raise KeyError
        assert not head._forward_pre_hooks
        with context(head):
            model(**batch)
        assert not head._forward_pre_hooks
        assert torch.equal(model(**batch).logits, before)

    def test_head_that_is_not_called_is_reported(self, model, batch, context):
        with (
            pytest.raises(RuntimeError, match=r"did not call the output head Linear\b.*`--use_liger_kernel`"),
            context(nn.Linear(HIDDEN_SIZE, VOCAB_SIZE)),
        ):
            model(**batch)

    def test_hidden_states_of_another_shape_are_refused(self, context):
        head = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE)
        with pytest.raises(RuntimeError, match=r"Linear received an input of shape \(6, 32\)"), context(head):
            head(torch.zeros(6, HIDDEN_SIZE))
        assert not head._forward_pre_hooks

    def test_head_that_is_called_by_keyword_is_refused(self, context):
        head = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE)
        with pytest.raises(RuntimeError, match=r"input of shape None, .*calls its head by keyword"), context(head):
            head(input=torch.zeros(3, 8, HIDDEN_SIZE))
