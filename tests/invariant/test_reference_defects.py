"""The defects of the reference implementation that the project grew from, one named test each: none may come back.

The numbers are those of the list in the design notes. The inverted clip of Atropos' example trainer is tested in
tests/unit/loss/test_losses.py; that a publish reaches weights that are not the trainer's own (defect 8), in
tests/e2e/test_publish.py.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from test_split_invariance import assert_same_gradient, make_trainer, ragged_rollouts, step_gradient

from trl_atropos import advantage_weighted_sft_loss, normalize_advantages
from trl_atropos.loss.advantages import advantage_statistics
from trl_atropos.types import Rollout


def rollout_of(labels: Sequence[int], advantages: Sequence[float], tokens: Sequence[int] = (1, 2, 3, 4, 5)) -> Rollout:
    return Rollout(torch.tensor(tokens), torch.tensor(labels), reward=0.0, advantages=torch.tensor(advantages))


def collated(tmp_path, rollouts: list[Rollout], **options):
    trainer = make_trainer((1, 1, len(rollouts)), tmp_path, advantage_clipping=None, **options)
    (((batch,),), _) = trainer.get_batch_samples(iter([[rollouts]]), 1, torch.device("cpu"))
    return batch


def test_1_the_first_response_token_is_trained_and_every_token_has_its_own_advantage(tmp_path):
    # The reference cut masks and advantages at the right and labels at the left: trained [4, 5], not [3, 4, 5], each
    # with the advantage of its left neighbour.
    batch = collated(tmp_path, [rollout_of([-100, -100, 3, 4, 5], [0.0, 0.0, 0.3, 0.4, 0.5])])
    assert batch["targets"][batch["token_index"]].tolist() == [3, 4, 5]
    torch.testing.assert_close(batch["advantages"], torch.tensor([0.3, 0.4, 0.5]))
    # They are predicted by tokens 1, 2 and 3.
    assert batch["prediction_index"][batch["token_index"]].tolist() == [1, 2, 3]


def test_1_holds_for_the_loss_on_logits_too():
    logits = torch.zeros(1, 5, 8, requires_grad=True)
    input_ids, mask = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[0, 0, 1, 1, 1]])
    advantages = torch.tensor([[9.0, 9.0, 0.3, 0.4, 0.5]])
    advantage_weighted_sft_loss(logits, input_ids, advantages, mask, num_trained_tokens=1).backward()
    # d loss / d logit of the target = -A (1 - 1/8) where it is predicted, 0 at the other positions.
    ours = [logits.grad[0, t, t + 2].item() for t in range(4)]
    assert ours == pytest.approx([0.0, -0.3 * 7 / 8, -0.4 * 7 / 8, -0.5 * 7 / 8])


def test_2_global_is_not_batch(tmp_path):
    options = {"loss_type": "weighted_sft", "advantage_clipping": None}
    gradients = [
        step_gradient(make_trainer((1, 4, 2), tmp_path, advantage_normalization=mode, **options), (1, 4, 2), r)[0]
        for mode, r in (("global", ragged_rollouts()), ("batch", ragged_rollouts()))
    ]
    with pytest.raises(AssertionError):
        assert_same_gradient(*gradients, relative_error=1e-2)


def test_3_global_normalisation_does_not_see_micro_batches():
    # [1, 1, -3, 5] has mean 1 and unbiased variance (0 + 0 + 16 + 16) / 3: -3 and 5 become -+4 / 3.266 = -+1.2247.
    # Two halves on their own would give 0, 0 and -+0.7071.
    advantages = torch.tensor([1.0, 1.0, -3.0, 5.0])
    mask = torch.ones(4, dtype=torch.bool)
    whole = normalize_advantages(advantages, mask, "global")
    torch.testing.assert_close(whole, torch.tensor([0.0, 0.0, -1.2247449, 1.2247449]), rtol=1e-6, atol=1e-6)
    halves = advantage_statistics([advantages[:2], advantages[2:]], [mask[:2], mask[2:]])
    assert (halves.mean, halves.std) == pytest.approx((1.0, (32 / 3) ** 0.5))


def test_4_more_micro_batches_do_not_make_the_gradient_larger(tmp_path):
    # The reference divided the loss after the backward pass.
    norms = []
    for split in ((1, 1, 8), (1, 8, 1)):
        gradient, _ = step_gradient(make_trainer(split, tmp_path), split, ragged_rollouts())
        norms.append(torch.cat([g.flatten() for g in gradient.values()]).norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_5_a_token_weighs_the_same_whatever_shares_its_micro_batch(tmp_path):
    # 1 and 12 trained tokens in two micro-batches: a mean of means gives the single token 12 times the weight of another.
    rollouts = ragged_rollouts()
    pair = [replace(rollouts[0], set_advantage_to_zero=False), replace(rollouts[2], set_advantage_to_zero=False)]
    trainer = make_trainer((1, 2, 1), tmp_path)
    batches, num_items = trainer.get_batch_samples(iter([[[pair[0]]], [[pair[1]]]]), 2, torch.device("cpu"))
    weights = torch.cat([batch["token_weights"] for (batch,) in batches])
    assert num_items == 13
    torch.testing.assert_close(weights, torch.full((13,), 1 / 13))


class TestDefect6:
    def test_one_trained_token_keeps_its_advantage(self):
        # The standard deviation of one value is NaN.
        advantages, mask = torch.tensor([5.0, 0.7, 5.0]), torch.tensor([False, True, False])
        assert normalize_advantages(advantages, mask, "global").tolist() == [0.0, pytest.approx(0.7), 0.0]

    def test_an_integer_mask_does_not_make_integer_advantages(self):
        logits = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
        input_ids, ones = torch.tensor([[0, 1, 2]]), torch.ones(1, 3, dtype=torch.int64)
        loss = advantage_weighted_sft_loss(logits, input_ids, ones, ones)
        expected = torch.nn.functional.cross_entropy(logits[0, :-1], input_ids[0, 1:])
        torch.testing.assert_close(loss, expected)


class TestDefect7:
    def test_what_the_caller_gives_is_not_changed(self, tmp_path):
        rollouts = ragged_rollouts()
        before = copy.deepcopy(rollouts)
        step_gradient(make_trainer((1, 2, 4), tmp_path), (1, 2, 4), rollouts)
        for ours, theirs in zip(rollouts, before, strict=True):
            for name in ("input_ids", "labels", "advantages", "inference_logprobs"):
                left, right = getattr(ours, name), getattr(theirs, name)
                assert left is right is None or torch.equal(left, right)

    def test_the_loss_does_not_choose_half_precision_by_itself(self, tmp_path):
        trainer = make_trainer((1, 1, 8), tmp_path, bf16=False)
        dtypes = []
        for module in (trainer.model.model.layers[0].mlp, trainer.model.lm_head):
            module.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
        step_gradient(trainer, (1, 1, 8), ragged_rollouts())
        assert set(dtypes) == {torch.float32}

    def test_nothing_imports_flash_attn(self):
        script = "import sys, trl_atropos.trainer.atropos_trainer; sys.exit('flash_attn' in sys.modules)"
        subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
