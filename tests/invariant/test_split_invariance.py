"""The gradient of an optimizer step does not depend on how its rollouts are split over ranks and micro-batches.

The splits with two ranks are two real processes with a gloo group, DDP and accelerate's own launch variables.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import run_ranks
from peft import LoraConfig, get_peft_model
from tiny_models import perturb, tiny_llama
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

from trl_atropos.cli.launch.processes import free_port
from trl_atropos.data.micro_batches import deal_by_tokens
from trl_atropos.data.steps import with_advantages
from trl_atropos.errors import NonFiniteGradientError
from trl_atropos.loss.losses import LossFunction, LossInputs, LossOutputs
from trl_atropos.loss.options import LOSS_TYPES
from trl_atropos.policy.layouts import LAYOUTS
from trl_atropos.trainer.atropos_config import AtroposConfig
from trl_atropos.trainer.atropos_trainer import AtroposTrainer
from trl_atropos.trainer.callbacks import StepCallback
from trl_atropos.trainer.preflight import ServerFacts
from trl_atropos.types import Rollout, RolloutGroup, RolloutOrigin


VOCAB_SIZE = 64
NUM_ROLLOUTS = 8
# (ranks, gradient_accumulation_steps, per_device_train_batch_size): 8 rollouts each
SPLITS = [(1, 1, 8), (1, 4, 2), (1, 8, 1), (2, 2, 2), (2, 1, 4)]
CASES: dict[str, dict[str, Any]] = {
    **{loss_type: {"loss_type": loss_type} for loss_type in LOSS_TYPES},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "weighted_sft-global": {"loss_type": "weighted_sft", "advantage_normalization": "global"},
    "dapo-global": {"loss_type": "dapo", "advantage_normalization": "global"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "correction": {"loss_type": "dapo", "vllm_importance_sampling_correction": True,
                   "vllm_importance_sampling_mode": "sequence_truncate", "vllm_importance_sampling_clip_max": 1.5},
    "off_policy_mask": {"loss_type": "grpo", "off_policy_mask_threshold": 0.05},
    "beta": {"loss_type": "grpo", "beta": 0.3, "ref_logprobs": "require"},
    "entropy": {"loss_type": "dr_grpo", "entropy_coef": 0.1},
    "top_entropy": {"loss_type": "dapo", "top_entropy_quantile": 0.4},
    "distillation": {"loss_type": "dapo", "distillation_coef": 0.7},
    **{layout: {"loss_type": "dapo", "sequence_layout": layout} for layout in LAYOUTS},
}  # fmt: skip
# float32 rounds sums of other lengths differently; a wrong denominator is off by tens of percent.
RELATIVE_ERROR = 1e-6
# The weight of a rollout is the exponential of a sum over its tokens, which makes their rounding larger.
VESPO_RELATIVE_ERROR = 4e-6

Gradient = dict[str, torch.Tensor]


def policy() -> LlamaForCausalLM:
    """The model of these tests."""
    return tiny_llama(vocab_size=VOCAB_SIZE, initializer_range=0.1)


def ragged_rollouts() -> list[Rollout]:
    """Two groups of four rollouts with 4 to 18 tokens, of which 1 to 12 are trained; one has no inference logprobs.

    The rollouts of a group begin alike, and two of them train equal tokens.
    """
    generator = torch.Generator().manual_seed(1)
    rollouts = []
    shared = torch.randint(VOCAB_SIZE, (2, 18), generator=generator)
    for number, (length, num_prompt, num_shared) in enumerate(
        [(4, 3, 3), (9, 2, 2), (18, 6, 9), (7, 4, 6), (12, 5, 1), (5, 1, 2), (16, 10, 2), (11, 2, 0)]
    ):
        input_ids = torch.randint(VOCAB_SIZE, (length,), generator=generator)
        input_ids[:num_shared] = shared[number // 4, :num_shared]
        labels = input_ids.masked_fill(torch.arange(length) < num_prompt, -100)
        # Near the uniform policy, so that some ratios are clipped and some are not.
        logprobs, ref_logprobs = -math.log(VOCAB_SIZE) + 0.4 * torch.randn(2, length, generator=generator)
        teacher_token_ids = torch.stack([torch.randperm(VOCAB_SIZE, generator=generator)[:3] for _ in range(length)])
        teacher_logprobs = torch.log(torch.tensor([0.5, 0.2, 0.1])).expand(length, 3)
        rollouts.append(
            Rollout(
                input_ids=input_ids,
                labels=labels,
                reward=float(torch.randn((), generator=generator)),
                inference_logprobs=None if number == 5 else logprobs.clamp(max=-0.01),
                ref_logprobs=ref_logprobs.clamp(max=-0.01),
                set_advantage_to_zero=number == 2,
                temperature=0.8 if number == 6 else None,
                teacher_token_ids=None if number == 3 else teacher_token_ids,
                teacher_logprobs=None if number == 3 else teacher_logprobs,
                origin=RolloutOrigin(env_id=0, group=number // 4, rollout=number % 4),
            )
        )
    groups = [RolloutGroup(tuple(rollouts[:4])), RolloutGroup(tuple(rollouts[4:]))]
    return with_advantages(groups, "group")


def make_trainer(
    split: tuple[int, int, int],
    directory: str | Path,
    model: torch.nn.Module | None = None,
    loss_fn: LossFunction | None = None,
    **options: Any,
) -> AtroposTrainer:
    _, accumulation, micro_batch_size = split
    args = AtroposConfig(
        **{
            "output_dir": str(directory),
            "use_cpu": True,
            "report_to": "none",
            "gradient_checkpointing": False,
            "per_device_train_batch_size": micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "inference_logprobs": "use",
            "advantage_clipping": [-1.2, 1.2],
            **options,
        }
    )
    trainer = AtroposTrainer(model or policy(), args, loss_fn=loss_fn)
    trainer._server_facts = ServerFacts(
        backend="trl_atropos_shm", dtype=torch.float32, has_processed_logprobs=True, knows_policy_versions=False
    )
    return trainer


def step_gradient(
    trainer: AtroposTrainer, split: tuple[int, int, int], rollouts: Sequence[Rollout], rank: int = 0
) -> tuple[Gradient, float]:
    """Gradient and loss of one optimizer step: the calls that `Trainer.train` makes, without the optimizer."""
    num_ranks, accumulation, size = split
    dealt = [rollouts[i * size : (i + 1) * size] for i in range(num_ranks * accumulation)][rank::num_ranks]
    return gradient_of_items(trainer, [[micro_batch] for micro_batch in dealt], num_ranks)


def gradient_of_items(trainer: AtroposTrainer, items: Sequence[Any], num_ranks: int) -> tuple[Gradient, float]:
    """The same, of what a rank's stream yields in one step."""
    model = trainer.model
    model.zero_grad()
    wrapped = DistributedDataParallel(model) if num_ranks > 1 else model
    trainer.model_wrapped = wrapped
    trainer.current_gradient_accumulation_steps = len(items)
    batches, num_items = trainer.get_batch_samples(iter(items), len(items), trainer.args.device)
    loss = 0.0
    for number, batch in enumerate(batches):
        is_last = number == len(batches) - 1
        trainer.accelerator.gradient_state._set_sync_gradients(is_last)
        with nullcontext() if is_last else trainer.accelerator.no_sync(wrapped):
            loss += trainer.training_step(wrapped, batch, num_items).item()
    gradient = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return gradient, loss / num_ranks


def run_rank(rank: int, port: int, directory: str) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)
    results: dict[Any, Any] = {}
    for split in SPLITS:
        if split[0] != 2:
            continue
        for case, options in CASES.items():
            trainer = make_trainer(split, directory, **options)
            assert trainer.accelerator.num_processes == 2
            gradient, loss = step_gradient(trainer, split, ragged_rollouts(), rank)
            losses = torch.tensor([loss], dtype=torch.float64)
            dist.all_reduce(losses)
            results[split, case] = gradient, losses.item()
    # Rank 1 has nothing after a dropped group, and must still join every collective.
    trainer = make_trainer((2, 1, 4), directory)
    results["rank_without_data"], _ = step_gradient(trainer, (2, 1, 4), ragged_rollouts()[:4], rank)
    if rank == 0:
        torch.save(results, Path(directory) / "gradients.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def gradients_of_two_ranks(tmp_path_factory) -> dict[Any, Any]:
    directory = tmp_path_factory.mktemp("ranks")
    run_ranks(run_rank, (free_port(), str(directory)), num_ranks=2)
    return torch.load(directory / "gradients.pt", weights_only=False)


def assert_same_gradient(ours: Gradient, expected: Gradient, relative_error: float = RELATIVE_ERROR) -> None:
    scale = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    distance = torch.cat([(ours[name] - expected[name]).flatten() for name in expected]).norm()
    assert scale > 1e-3
    assert distance / scale < relative_error


@pytest.fixture(scope="module")
def whole_batch_gradients(tmp_path_factory) -> dict[str, tuple[Gradient, float]]:
    directory = tmp_path_factory.mktemp("whole")
    return {
        case: step_gradient(make_trainer((1, 1, 8), directory, **options), (1, 1, 8), ragged_rollouts())
        for case, options in CASES.items()
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("split", SPLITS[1:], ids=lambda split: "x".join(map(str, split)))
def test_any_split_gives_the_same_gradient_and_loss(
    tmp_path, gradients_of_two_ranks, whole_batch_gradients, split, case
):
    expected, expected_loss = whole_batch_gradients[case]
    if split[0] == 2:
        gradient, loss = gradients_of_two_ranks[split, case]
    else:
        gradient, loss = step_gradient(make_trainer(split, tmp_path, **CASES[case]), split, ragged_rollouts())
    assert_same_gradient(gradient, expected, VESPO_RELATIVE_ERROR if case == "vespo" else RELATIVE_ERROR)
    assert loss == pytest.approx(expected_loss, rel=1e-5)


def test_every_case_is_another_gradient(whole_batch_gradients):
    # Guards the guard: an option that does nothing would pass every comparison. bnpo is dapo by definition, and so are
    # the layouts.
    different = [case for case in CASES if case not in ("bnpo", *LAYOUTS)]
    for number, case in enumerate(different):
        for other in different[:number]:
            with pytest.raises(AssertionError):
                assert_same_gradient(whole_batch_gradients[case][0], whole_batch_gradients[other][0], 1e-4)
    for same in ("bnpo", *LAYOUTS):
        assert_same_gradient(whole_batch_gradients[same][0], whole_batch_gradients["dapo"][0])


@pytest.mark.parametrize("max_tokens", [20, 30, 200])
def test_a_token_budget_gives_the_same_gradient(tmp_path, whole_batch_gradients, max_tokens):
    options = {"max_tokens_per_micro_batch": max_tokens, "max_length": 20}
    trainer = make_trainer((1, 1, 8), tmp_path, **CASES["dapo"], **options)
    ((*micro_batches,),) = deal_by_tokens(ragged_rollouts(), max_tokens=max_tokens, layout="tree", world_size=1)
    assert (len(micro_batches) == 1) == (max_tokens == 200)
    gradient, loss = gradient_of_items(trainer, [micro_batches], 1)
    assert_same_gradient(gradient, whole_batch_gradients["dapo"][0])
    assert loss == pytest.approx(whole_batch_gradients["dapo"][1], rel=1e-5)


def test_the_order_of_the_rollouts_does_not_matter(tmp_path):
    expected, _ = step_gradient(make_trainer((1, 1, 8), tmp_path), (1, 1, 8), ragged_rollouts())
    reversed_order, _ = step_gradient(make_trainer((1, 4, 2), tmp_path), (1, 4, 2), ragged_rollouts()[::-1])
    assert_same_gradient(reversed_order, expected)


def test_a_rank_without_data_adds_nothing_and_does_not_hang(tmp_path, gradients_of_two_ranks):
    expected, _ = step_gradient(make_trainer((1, 1, 4), tmp_path), (1, 1, 4), ragged_rollouts()[:4])
    assert_same_gradient(gradients_of_two_ranks["rank_without_data"], expected)


def test_an_empty_micro_batch_adds_nothing(tmp_path):
    expected, _ = step_gradient(make_trainer((1, 1, 4), tmp_path), (1, 1, 4), ragged_rollouts()[:4])
    with_empty, _ = step_gradient(make_trainer((1, 4, 2), tmp_path), (1, 4, 2), ragged_rollouts()[:4])
    assert_same_gradient(with_empty, expected)


def test_batch_normalization_depends_on_the_split_as_its_help_says(tmp_path):
    # Guards the guard: a comparison that is too weak would find these equal, too.
    options = {"advantage_normalization": "batch", "loss_type": "weighted_sft"}
    whole, _ = step_gradient(make_trainer((1, 1, 8), tmp_path, **options), (1, 1, 8), ragged_rollouts())
    split, _ = step_gradient(make_trainer((1, 4, 2), tmp_path, **options), (1, 4, 2), ragged_rollouts())
    with pytest.raises(AssertionError):
        assert_same_gradient(split, whole, relative_error=1e-2)


class TestAgainstTheModelsOwnLoss:
    def test_weighted_sft_with_all_advantages_1_is_supervised_finetuning(self, tmp_path):
        rollouts = [replace(r, advantages=torch.ones(r.num_tokens), set_advantage_to_zero=False, temperature=None)
                    for r in ragged_rollouts()]  # fmt: skip
        options = {"loss_type": "weighted_sft", "advantage_clipping": None}
        ours, loss = step_gradient(make_trainer((1, 4, 2), tmp_path, **options), (1, 4, 2), rollouts)

        model = policy()
        input_ids, labels = (
            pad_sequence([getattr(r, name) for r in rollouts], batch_first=True, padding_value=padding)
            for name, padding in (("input_ids", 0), ("labels", -100))
        )
        expected = model(input_ids=input_ids, labels=labels).loss
        expected.backward()

        assert loss == pytest.approx(expected.item(), rel=1e-6)
        assert_same_gradient(ours, {name: parameter.grad for name, parameter in model.named_parameters()})

    def test_the_loss_is_the_sum_over_tokens_divided_by_all_trained_tokens(self, tmp_path):
        # By hand: -sum(A * logprob at the sampling temperature) / number of trained tokens.
        rollouts = ragged_rollouts()
        options = {"loss_type": "weighted_sft", "advantage_clipping": None, "temperature": 0.7}
        _, loss = step_gradient(make_trainer((1, 2, 4), tmp_path, **options), (1, 2, 4), rollouts)

        model, total, num_trained = policy().eval(), 0.0, 0
        for rollout in rollouts:
            temperature = rollout.temperature or 0.7
            with torch.no_grad():
                logits = model(rollout.input_ids[None]).logits[0].double() / temperature
            for t in range(1, rollout.num_tokens):
                if rollout.labels[t] != -100:
                    advantage = 0.0 if rollout.set_advantage_to_zero else rollout.advantages[t].item()
                    total -= advantage * logits[t - 1].log_softmax(-1)[rollout.labels[t]].item()
                    num_trained += 1
        assert loss == pytest.approx(total / num_trained, rel=1e-5)


class TestSetAdvantageToZero:
    @staticmethod
    def group(*, flagged: bool) -> list[Rollout]:
        rollouts = [replace(r, advantages=None, set_advantage_to_zero=False) for r in ragged_rollouts()[:4]]
        if flagged:
            rollouts[0] = replace(rollouts[0], set_advantage_to_zero=True)
        return with_advantages([RolloutGroup(tuple(rollouts))], "none")

    def gradient(self, tmp_path, rollouts: Sequence[Rollout], **options: Any) -> Gradient:
        options = {"loss_type": "weighted_sft", "advantage_clipping": None, **options}
        return step_gradient(make_trainer((1, 1, 4), tmp_path, **options), (1, 1, 4), rollouts)[0]

    def test_it_pushes_nothing_itself(self, tmp_path):
        only_flagged = [replace(self.group(flagged=True)[0])]
        gradient = self.gradient(tmp_path, only_flagged)
        assert all(not tensor.any() for tensor in gradient.values())

    def test_its_reward_and_its_tokens_still_count_for_the_others(self, tmp_path):
        # The same gradient as with its advantages at 0 by hand: the mean of the group and the number of trained tokens
        # are those of all four rollouts.
        by_hand = self.group(flagged=False)
        by_hand[0] = replace(by_hand[0], advantages=torch.zeros(by_hand[0].num_tokens))
        flagged = self.group(flagged=True)
        rewards = [rollout.reward for rollout in flagged]
        assert flagged[1].advantages.max().item() == pytest.approx(
            max(rewards[1] - sum(rewards) / 4, 0.0), rel=1e-6, abs=1e-7
        )
        assert_same_gradient(self.gradient(tmp_path, flagged), self.gradient(tmp_path, by_hand))

    def test_it_counts_in_the_statistics_and_is_set_to_0_after_them(self, tmp_path):
        trainer = make_trainer((1, 1, 4), tmp_path, advantage_normalization="global", advantage_clipping=None)
        group = self.group(flagged=True)
        advantages = torch.cat([rollout.advantages[rollout.labels != -100] for rollout in group]).double()
        (((batch,),), num_items) = trainer.get_batch_samples(iter([[group]]), 1, torch.device("cpu"))

        assert num_items == advantages.numel()
        # The first rollout trains one token.
        assert batch["advantages"][0] == 0.0
        # Normalised with the mean and the unbiased standard deviation of all trained tokens, its own included.
        expected = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        torch.testing.assert_close(batch["advantages"][1:].double(), expected[1:], rtol=1e-5, atol=1e-6)


class WeightsAfterEachStep(TrainerCallback):
    """Copies the weights when training begins and after every optimizer step."""

    def __init__(self) -> None:
        self.snapshots: list[Gradient] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: torch.nn.Module, **kwargs: Any) -> None:
        self.snapshots.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    on_step_end = on_train_begin


def endless_data(items: list[Any]) -> DataLoader:
    """What `AtroposTrainer.get_train_dataloader` returns, without servers: one item per call of `training_step`."""
    return DataLoader(items, batch_size=None, collate_fn=lambda item: item)


class TestNonFiniteLoss:
    @pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
    def test_it_stops_before_any_weight_changes_and_names_the_rollout(self, tmp_path, max_grad_norm):
        def diverging_loss(inputs: LossInputs) -> LossOutputs:
            is_bad = inputs.rollout_index == 6
            return LossOutputs(torch.where(is_bad, math.inf, 1.0) * inputs.trainer_logprobs, {})

        options = {"max_grad_norm": max_grad_norm, "learning_rate": 0.01, "max_steps": 5, "save_strategy": "no"}
        trainer = make_trainer((1, 1, 8), tmp_path, loss_fn=diverging_loss, **options)
        trainer.pop_callback(StepCallback)
        trainer.get_train_dataloader = lambda: endless_data([[ragged_rollouts()]] * 5)
        before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        with pytest.raises(NonFiniteGradientError) as caught:
            Trainer.train(trainer)
        assert "step 1 is not finite, because of environment 0, group 1, rollout 2." in caught.value.what
        assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_a_loss_function_of_ones_own_replaces_the_loss(tmp_path, whole_batch_gradients):
    def weighted_sft(inputs: LossInputs) -> LossOutputs:
        return LossOutputs(-inputs.advantages * inputs.trainer_logprobs, {})

    trainer = make_trainer((1, 4, 2), tmp_path, loss_fn=weighted_sft)
    gradient, _ = step_gradient(trainer, (1, 4, 2), ragged_rollouts())
    assert_same_gradient(gradient, whole_batch_gradients["weighted_sft"][0])


class TestReference:
    def test_a_frozen_copy_is_the_starting_policy(self, tmp_path):
        # At the start KL and its gradient are 0; after the policy moved they are not.
        options = {"loss_type": "dapo", "beta": 0.5}
        trainer = make_trainer((1, 1, 8), tmp_path, **options)
        at_start, _ = step_gradient(trainer, (1, 1, 8), ragged_rollouts())
        without, _ = step_gradient(make_trainer((1, 1, 8), tmp_path), (1, 1, 8), ragged_rollouts())
        assert_same_gradient(at_start, without, 1e-5)
        with torch.no_grad():
            trainer.model.lm_head.weight.mul_(1.5)
        moved = policy()
        moved.load_state_dict(trainer.model.state_dict())
        after, _ = step_gradient(trainer, (1, 1, 8), ragged_rollouts())
        without, _ = step_gradient(make_trainer((1, 1, 8), tmp_path, moved), (1, 1, 8), ragged_rollouts())
        with pytest.raises(AssertionError):
            assert_same_gradient(after, without, 1e-2)

    @pytest.mark.parametrize("is_fresh", [True, False])
    def test_an_adapters_start_and_logprobs_of_the_wire_are_the_same_reference(self, tmp_path, is_fresh):
        def adapted() -> torch.nn.Module:
            torch.manual_seed(3)
            # A fresh adapter starts from the base, one that was trained from itself.
            config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=is_fresh)
            return get_peft_model(policy(), config)

        options = {"loss_type": "grpo", "beta": 0.5}
        with_adapter = make_trainer((1, 2, 4), tmp_path, adapted(), **options)
        # The same policy, its reference given by the wire: that of the start, computed here.
        base = adapted().eval()
        rollouts = []
        for rollout in ragged_rollouts():
            with torch.no_grad():
                logits = base(rollout.input_ids[None]).logits[0] / (rollout.temperature or 1.0)
            logprobs = logits.log_softmax(-1)[:-1].gather(-1, rollout.input_ids[1:, None])[:, 0]
            rollouts.append(replace(rollout, ref_logprobs=torch.cat([torch.zeros(1), logprobs])))
        from_wire = make_trainer(
            (1, 2, 4),
            tmp_path,
            adapted(),
            ref_logprobs="require",
            **options,
        )
        gradients = []
        for trainer in (with_adapter, from_wire):
            # The policy moves away from where it started.
            perturb(trainer.model, seed=5, scale=0.1)
            batches, num_items = trainer.get_batch_samples(iter([[rollouts]]), 1, torch.device("cpu"))
            trainer.training_step(trainer.model, batches[0], num_items)
            named = trainer.model.named_parameters()
            gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        assert_same_gradient(*gradients, relative_error=1e-5)


class TestNonFiniteGradient:
    @pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_it_stops_before_any_weight_changes(self, tmp_path, value, max_grad_norm):
        trainer = make_trainer(
            (1, 1, 8), tmp_path, max_grad_norm=max_grad_norm, learning_rate=0.01, max_steps=5, save_strategy="no"
        )
        weights = WeightsAfterEachStep()
        trainer.add_callback(weights)
        # No servers here: nothing to publish to, and the rollouts are at hand.
        trainer.pop_callback(StepCallback)
        trainer.get_train_dataloader = lambda: endless_data([[ragged_rollouts()]] * 5)
        trainer.model.lm_head.weight.register_hook(
            lambda gradient: gradient * (value if trainer.state.global_step == 1 else 1)
        )

        # transformers' own loop, which decides what comes before what.
        with pytest.raises(NonFiniteGradientError) as caught:
            Trainer.train(trainer)

        assert "The gradient norm of step 2 is" in caught.value.what
        assert "--learning_rate" in caught.value.fix
        before, after_step_1 = weights.snapshots
        assert not torch.equal(after_step_1["lm_head.weight"], before["lm_head.weight"])
        assert all(torch.equal(value, after_step_1[name]) for name, value in trainer.model.state_dict().items())

    @pytest.mark.parametrize("scale", [2.0**16, 1.0])
    def test_an_overflow_of_float16_leaves_its_step_out(self, tmp_path, scale):
        trainer = make_trainer((1, 1, 8), tmp_path, learning_rate=0.01, max_steps=3, save_strategy="no")
        weights = WeightsAfterEachStep()
        trainer.add_callback(weights)
        trainer.pop_callback(StepCallback)
        trainer.get_train_dataloader = lambda: endless_data([[ragged_rollouts()]] * 5)
        # That of accelerate for fp16, which needs a GPU.
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.model.lm_head.weight.register_hook(
            lambda gradient: gradient * (math.inf if trainer.state.global_step == 1 else 1)
        )
        if scale == 1.0:
            # Nothing is left to halve: the gradient itself is not finite.
            with pytest.raises(NonFiniteGradientError, match="gradient norm of step 2"):
                Trainer.train(trainer)
            return
        Trainer.train(trainer)
        _, first, second, third = weights.snapshots
        assert torch.equal(second["lm_head.weight"], first["lm_head.weight"])
        assert not torch.equal(third["lm_head.weight"], second["lm_head.weight"])
        assert trainer.accelerator.scaler.get_scale() == scale / 2
        skipped = [entry["perf/skipped_steps_frac"] for entry in trainer.state.log_history if "loss" in entry]
        assert skipped == [0.0, 1.0, 0.0]

    def test_a_finite_gradient_passes_through(self, tmp_path):
        trainer = make_trainer((1, 1, 8), tmp_path)
        gradient, _ = step_gradient(trainer, (1, 1, 8), ragged_rollouts())
        expected = torch.cat([tensor.flatten() for tensor in gradient.values()]).norm().item()
        assert float(trainer._get_grad_norm(trainer.model)) == pytest.approx(expected, rel=1e-5)


def test_micro_batches_are_not_averaged_for_a_model_that_takes_no_loss_arguments(tmp_path):
    # For such models transformers divides by the number of micro-batches, unless the trainer says that it did.
    expected, _ = step_gradient(make_trainer((1, 1, 8), tmp_path), (1, 1, 8), ragged_rollouts())
    trainer = make_trainer((1, 4, 2), tmp_path)
    trainer.model_accepts_loss_kwargs = False
    gradient, _ = step_gradient(trainer, (1, 4, 2), ragged_rollouts())
    assert_same_gradient(gradient, expected)


def test_logits_are_computed_at_trained_positions_only(tmp_path):
    trainer = make_trainer((1, 2, 4), tmp_path, sequence_layout="padded")
    trainer._get_forward()
    shapes: list[tuple[int, ...]] = []
    trainer.model.lm_head.register_forward_hook(lambda head, args, logits: shapes.append(tuple(logits.shape)))
    step_gradient(trainer, (1, 2, 4), ragged_rollouts())
    # In the model's own forward none: 4 rows of no position. Then the trained tokens, length - prompt: 1 + 7 + 12 + 3
    # = 23, and 7 + 4 + 6 + 9 = 26.
    assert shapes == [(4, 0, VOCAB_SIZE), (23, VOCAB_SIZE), (4, 0, VOCAB_SIZE), (26, VOCAB_SIZE)]


def test_tokens_that_rollouts_share_are_computed_and_projected_once(tmp_path):
    trainer = make_trainer((1, 1, 8), tmp_path, sequence_layout="tree")
    trainer._get_forward()
    rollout = replace(ragged_rollouts()[2], teacher_token_ids=None, teacher_logprobs=None)
    twins = [rollout, replace(rollout, origin=RolloutOrigin(0, 0, 3))]
    shapes: list[tuple[int, ...]] = []
    trainer.model.lm_head.register_forward_hook(lambda head, args, logits: shapes.append(tuple(logits.shape)))
    (((batch,),), num_items) = trainer.get_batch_samples(iter([[twins]]), 1, torch.device("cpu"))
    trainer.training_step(trainer.model, [batch], num_items)
    # 18 tokens of which the last predicts nothing; 12 trained tokens in each of the two.
    assert batch["input_ids"].shape == (1, 17)
    assert (num_items, shapes) == (24, [(1, 0, VOCAB_SIZE), (12, VOCAB_SIZE)])


def test_floating_point_operations_are_those_of_all_micro_batches(tmp_path):
    trainer = make_trainer((1, 1, 8), tmp_path)
    micro_batches = [ragged_rollouts()[:4], ragged_rollouts()[4:]]
    ((item,), _) = trainer.get_batch_samples(iter([micro_batches]), 1, torch.device("cpu"))
    num_tokens = sum(batch["input_ids"].numel() for batch in item)
    # transformers' estimate: 6 for each token and each parameter that is not an embedding.
    assert trainer.floating_point_ops(item) == 6 * num_tokens * trainer.model.num_parameters(exclude_embeddings=True)
