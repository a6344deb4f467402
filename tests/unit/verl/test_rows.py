from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from trl_atropos.errors import NonFiniteGradientError
from trl_atropos.loss.losses import LossInputs, LossOutputs, make_loss_function
from trl_atropos.loss.options import StepOptions
from trl_atropos.types import Rollout
from trl_atropos.verl.loss import RolloutLoss
from trl_atropos.verl.rows import Rows, make_rows


def rollout(num_prompt: int, advantages: Sequence[float], num_after: int = 0, **fields: Any) -> Rollout:
    """Prompt, as many trained tokens as advantages, and tokens of a turn that is not trained."""
    length = num_prompt + len(advantages) + num_after
    input_ids = torch.arange(1, length + 1)
    labels = torch.full((length,), -100)
    trained = slice(num_prompt, num_prompt + len(advantages))
    labels[trained] = input_ids[trained]
    columns = {"advantages": torch.zeros(length), "inference_logprobs": torch.full((length,), torch.nan)}
    columns["advantages"][trained] = torch.tensor(advantages)
    columns["inference_logprobs"][trained] = -torch.arange(1.0, len(advantages) + 1)
    return Rollout(input_ids, labels, 0.0, **columns, **fields)


def rows(rollouts: Sequence[Rollout], num_rows: int, **options: Any) -> Rows:
    return make_rows(
        rollouts,
        num_rows,
        StepOptions(**options),
        temperature=1.0,
        max_length=16,
        pad_token_id=0,
        device=torch.device("cpu"),
    )


def unnested(rows: Rows, name: str) -> list[list[float]]:
    return [row.tolist() for row in rows.columns[name].unbind()]


def test_columns_stand_where_their_token_is_predicted():
    made = rows([rollout(2, [0.5, -1.0], num_after=3)], 1)
    # The turn after the last trained token predicts nothing that is trained.
    assert unnested(made, "input_ids") == [[1, 2, 3, 4]]
    assert unnested(made, "position_ids") == [[0, 1, 2, 3]]
    assert unnested(made, "loss_mask") == [[0, 0, 1, 1]]
    assert unnested(made, "is_trained") == [[0, 1, 1, 0]]
    assert unnested(made, "advantages") == [[0, 0.5, -1.0, 0]]
    assert unnested(made, "inference_logprobs") == [[0, -1.0, -2.0, 0]]
    # dapo: one over the trained tokens of the step.
    assert unnested(made, "token_weights") == [[0, 0.5, 0.5, 0]]
    assert unnested(made, "ref_logprobs")[0][1:3] == pytest.approx([math.nan] * 2, nan_ok=True)


def test_rows_without_a_rollout_are_not_counted():
    made = rows([rollout(1, [1.0, 1.0]), rollout(3, [])], 4, loss_type="grpo")
    assert unnested(made, "input_ids") == [[1, 2, 3], [0, 0], [0, 0], [0, 0]]
    assert unnested(made, "loss_mask")[1:] == [[0, 0]] * 3
    # Two rollouts, of which one has two trained tokens: 1 / (2 x 2).
    assert unnested(made, "token_weights") == [[0.25, 0.25, 0], [0, 0], [0, 0], [0, 0]]
    assert made.columns["row"].tolist() == [0, 1, 2, 3]
    assert len(made.names) == 4


def test_temperatures_are_those_of_sampling():
    rollouts = [rollout(1, [1.0], temperature=0.5), rollout(1, [1.0])]
    made = make_rows(
        rollouts, 3, StepOptions(), temperature=0.8, max_length=16, pad_token_id=0, device=torch.device("cpu")
    )
    assert made.columns["sampling_temperature"].tolist() == pytest.approx([0.5, 0.8, 1.0])


def loss_of(made: Rows, which: Sequence[int], loss: RolloutLoss, log_probs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The loss of the rows `which` as verl asks for it: their logprobs and their columns."""
    loss.names = made.names

    def pick(rows: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor([rows[row] for row in which], layout=torch.jagged)

    data: dict[str, Any] = {
        name: pick(column.unbind()) if column.is_nested else column[list(which)]
        for name, column in made.columns.items()
    }
    num_tokens = int(made.columns["loss_mask"].values().sum())
    value, metrics = loss({"log_probs": pick(log_probs)}, {**data, "dp_size": 1, "batch_num_tokens": num_tokens})
    assert metrics == {}
    return value


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "weighted_sft"])
def test_losses_of_any_cut_add_up(loss_type):
    rollouts = [rollout(2, [0.5, -1.0, 2.0]), rollout(1, [1.0], num_after=2), rollout(3, []), rollout(1, [0.3] * 4)]
    made = rows(rollouts, 5, loss_type=loss_type)
    torch.manual_seed(0)
    log_probs = [-torch.rand(ids.numel()) for ids in made.columns["input_ids"].unbind()]
    loss = RolloutLoss(make_loss_function(StepOptions(loss_type=loss_type)), StepOptions(loss_type=loss_type))
    whole = loss_of(made, range(5), loss, log_probs)
    for cut in ([[0, 1], [2, 3], [4]], [[4, 0], [3], [1, 2]]):
        assert sum(loss_of(made, part, loss, log_probs) for part in cut).item() == pytest.approx(
            whole.item(), rel=1e-6
        )


def test_the_seeds_loss_is_its_closed_form():
    made = rows([rollout(2, [0.5, -1.0]), rollout(1, [2.0])], 2, loss_type="weighted_sft")
    options = StepOptions(loss_type="weighted_sft")
    log_probs = [torch.tensor([-9.0, -0.25, -0.5, -9.0]), torch.tensor([-1.5, -9.0])]
    # Entries 1 and 2 of the first row and entry 0 of the second predict trained tokens, three in all.
    expected = -(0.5 * -0.25 + -1.0 * -0.5 + 2.0 * -1.5) / 3
    loss = RolloutLoss(make_loss_function(options), options)
    assert loss_of(made, [0, 1], loss, log_probs).item() == pytest.approx(expected)


def test_a_loss_that_is_not_finite_has_no_finite_gradient_and_is_named():
    def infinite(inputs: LossInputs) -> LossOutputs:
        return LossOutputs(torch.where(inputs.rollout_index == 1, torch.inf, 0.0) + inputs.trainer_logprobs, {})

    made = rows([rollout(1, [1.0]), rollout(1, [1.0])], 2)
    log_probs = [torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)]
    loss = RolloutLoss(infinite, StepOptions())
    loss_of(made, [0, 1], loss, log_probs).backward()
    assert log_probs[0].grad.isnan().any()
    with pytest.raises(NonFiniteGradientError, match="step 3"):
        loss.watch.check(3, torch.device("cpu"))
