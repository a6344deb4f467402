"""Layers that carry a state run over the pieces of trees as over each path alone, with gradients."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from scoring_cases import RECURRENT, recurrent
from torch import Tensor, nn

from trl_atropos.policy import tree_states
from trl_atropos.policy.layouts import Layout, tree_layout
from trl_atropos.policy.scoring import model_inputs
from trl_atropos.policy.tree_attention import TREE_SDPA, register_tree_attention
from trl_atropos.policy.tree_states import branch_states, layers_with_states, tree_pieces, unbranch_states


TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=12).map(torch.tensor)


def pieces_of(sequences: Sequence[Tensor]) -> tuple[Layout, list[tree_states.Piece]]:
    layout = tree_layout([sequences])
    assert layout.subtree_end is not None
    return layout, tree_pieces(layout.subtree_end, layout.position_ids)


def path_through(pieces: Sequence[tree_states.Piece], token: int) -> list[int]:
    """The positions over which a layer runs until it gives the output of a token."""
    (piece,) = [piece for piece in pieces if token in piece.positions[piece.num_copies :].tolist()]
    own = piece.positions.tolist()
    path = own[: own.index(token) + 1]
    while piece.parent is not None:
        piece = pieces[piece.parent]
        path = piece.positions.tolist() + path
    return path


class TestPieces:
    @given(st.lists(TOKENS, min_size=1, max_size=8))
    def test_each_token_is_put_out_once_behind_its_own_path(self, sequences):
        layout, pieces = pieces_of(sequences)
        own = torch.cat([piece.positions[piece.num_copies :] for piece in pieces])
        assert own.sort().values.tolist() == list(range(layout.input_ids.shape[1]))
        for positions in layout.token_positions:
            for number, token in enumerate(positions.tolist()):
                assert path_through(pieces, token) == positions[: number + 1].tolist()

    @given(st.lists(TOKENS, min_size=1, max_size=8))
    def test_what_others_go_on_from_is_long_enough(self, sequences):
        _, pieces = pieces_of(sequences)
        for number, piece in enumerate(pieces):
            assert piece.has_children == any(other.parent == number for other in pieces)
            assert piece.parent is None or piece.parent < number
            if piece.has_children:
                assert len(piece.positions) >= tree_states.MIN_INNER_TOKENS

    def test_a_prompt_is_one_and_each_completion_another(self):
        prompt = torch.zeros(30, dtype=torch.int64)
        completions = [torch.full((length,), length) for length in (5, 9, 12)]
        _, pieces = pieces_of([torch.cat([prompt, completion]) for completion in completions])
        assert [(len(piece.positions), piece.parent) for piece in pieces] == [(30, None), (5, 0), (9, 0), (12, 0)]

    def test_a_token_that_all_begin_with_stands_in_front_of_each(self):
        first = torch.tensor([1])
        _, pieces = pieces_of([torch.cat([first, torch.full((10,), number)]) for number in (2, 3)])
        assert [(piece.positions[0], piece.num_copies, piece.parent) for piece in pieces] == [
            (0, 0, None),
            (0, 1, None),
        ]


def sequences() -> list[Tensor]:
    """Of two prompts, one of which goes on in two turns; some pieces are shorter than every convolution."""
    generator = torch.Generator().manual_seed(0)

    def tokens(number: int) -> Tensor:
        return torch.randint(3, 60, (number,), generator=generator)

    prompt, other = tokens(9), tokens(2)
    turn = torch.cat([prompt, tokens(5)])
    ends = [(turn, 7), (turn, 3), (turn, 0), (prompt, 11), (prompt, 1), (other, 4), (other, 1)]
    return [*(torch.cat([start, tokens(number)]) for start, number in ends), tokens(12)]


def gradient_of(model: nn.Module, logits: Tensor) -> Tensor:
    """Of all trained weights, of a loss that every logit has a part in."""
    model.zero_grad()
    logits.log_softmax(-1).square().mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def logits_alone(model: nn.Module) -> Tensor:
    return torch.cat([model(input_ids=sequence[None], use_cache=False).logits[0] for sequence in sequences()])


def logits_of_the_tree(model: nn.Module) -> Tensor:
    register_tree_attention()
    model.set_attn_implementation(TREE_SDPA)
    layout = tree_layout([sequences()])
    assert layout.subtree_end is not None
    branch_states(model).take(layout.subtree_end, layout.position_ids)
    batch = {"input_ids": layout.input_ids, "position_ids": layout.position_ids, "subtree_end": layout.subtree_end}
    logits = model(**model_inputs(batch, TREE_SDPA, torch.float32), use_cache=False).logits[0]
    return torch.cat([logits[positions] for positions in layout.token_positions])


@pytest.mark.parametrize("min_inner_tokens", [2, 8])
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("name", RECURRENT)
def test_logits_and_gradient_are_those_of_each_alone(name, recomputes, min_inner_tokens, monkeypatch):
    monkeypatch.setattr(tree_states, "MIN_INNER_TOKENS", min_inner_tokens)
    model = recurrent(name).train()
    alone = logits_alone(model)
    expected = gradient_of(model, alone)
    if recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    logits = logits_of_the_tree(model)
    torch.testing.assert_close(logits, alone, rtol=0, atol=2e-5)
    gradient = gradient_of(model, logits)
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


def test_an_adapter_is_trained_through_them():
    model = get_peft_model(recurrent("bamba"), LoraConfig(r=2, target_modules=["in_proj"], init_lora_weights=False))
    alone = logits_alone(model)
    expected = gradient_of(model, alone)
    gradient = gradient_of(model, logits_of_the_tree(model))
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


class TestCalls:
    def test_one_before_which_no_tree_is_said_is_given_none(self):
        model = recurrent("bamba")
        with torch.no_grad():
            before = logits_alone(model)
            logits_of_the_tree(model)
            assert torch.equal(logits_alone(model), before)

    def test_of_another_length_than_the_tree_are_an_error(self):
        model = recurrent("bamba")
        branch_states(model).take(torch.tensor([[3, 3, 3]]), torch.arange(3)[None])
        with pytest.raises(RuntimeError, match="for a tree of 3 tokens"):
            model(input_ids=torch.tensor([[1, 2, 3, 4]]), use_cache=False)

    def test_all_who_score_with_a_model_share_them(self):
        model = recurrent("bamba")
        assert branch_states(model) is branch_states(model)
        unbranch_states(model)
        unbranch_states(model)
        assert not model._forward_pre_hooks

    @pytest.mark.parametrize(("name", "number"), [("lfm2", 1), ("falcon_h1", 2), ("bamba", 1), ("qwen3_5", 1)])
    def test_the_layers_that_carry_a_state_are_found(self, name, number):
        assert len(layers_with_states(recurrent(name))) == number
