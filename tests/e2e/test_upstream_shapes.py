"""A file of each kind that upstream has, beside the trajectory API and an oracle: a group comes, and a step is trained on it.

Upstream's own files are not here, and the wheel has none: `python tests/upstream/run.py CHECKOUT` runs those.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from oracle import Answers, Oracle, Policy
from recipes import Recipe
from run import Workplace, deliver, train
from servers import add_chat_template, save_tiny_model


SHAPES = Path(__file__).parents[1] / "upstream" / "shapes"
RIGHT_AND_WRONG = (("$answer",), ("$wrong",))
KINDS = {
    "managed.py": (Recipe(*RIGHT_AND_WRONG, max_tokens=32), ["wandb", "server_list"]),
    "conversation.py": (
        Recipe(*RIGHT_AND_WRONG, max_tokens=32),
        ["openai_config", "one_server", "wandb", "wandb_name", "api_key", "return_dict"],
    ),
    "ruled/environment.py": (
        Recipe(*RIGHT_AND_WRONG, options=("--env.first", "1"), max_tokens=32),
        ["relative_import", "env_config_cls", "server_list", "wandb", "wandb_name", "api_key", "return_dict"],
    ),
    "loader.py": (Recipe(*RIGHT_AND_WRONG, max_tokens=32), ["wandb", "wandb_name", "advantages"]),
}
# Both sides compute in float32, in another order.
MAX_LOGPROB_ERROR = 1e-3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    directory = tmp_path_factory.mktemp("upstream")
    model = add_chat_template(save_tiny_model(directory / "model", tied=True, seed=0))
    return Workplace(directory, SHAPES, model)


@pytest.fixture(scope="module")
def policy(place: Workplace) -> Policy:
    return Policy(place.directory / "model")


@pytest.fixture(scope="module")
def delivered(place, policy):
    return {file: deliver(file, recipe, place, policy) for file, (recipe, _) in KINDS.items()}


@pytest.mark.parametrize("seed", range(4))
def test_a_group_of_conversations_is_answered_alike_whatever_is_asked_in_between(policy, seed):
    answers = Answers(("yes", "sure"), ("no", "never"))
    questions = ["Is it?", "Was it?", "Will it be?"]
    conversations = [[question] for question in questions for _ in range(4)]
    with Oracle(policy, answers) as together:
        for _ in range(2):
            for number in random.Random(seed).sample(range(len(conversations)), len(conversations)):
                conversations[number].append(together.next_text("\n".join(conversations[number])))
    for question in questions:
        with Oracle(policy, answers) as alone:
            alike = [[question, alone.next_text(question)] for _ in range(4)]
            for conversation in alike:
                conversation.append(alone.next_text("\n".join(conversation)))
        # Two of four are right in the first turn, each in other words.
        assert sorted(first for _, first, _ in alike) == ["never", "no", "sure", "yes"]
        assert sorted(alike) == sorted(one for one in conversations if one[0] == question)


@pytest.mark.parametrize("error_rate", [0.0, 0.25, 1.0])
def test_as_many_answers_are_wrong_as_the_rate_says(policy, error_rate):
    with Oracle(policy, Answers(("right",), ("wrong",)), error_rate) as oracle:
        to_many = [oracle.next_text(f"Question {number}?") for number in range(1000)]
        to_one = [oracle.next_text("Once more?") for _ in range(8)]
    # Three standard deviations of a binomial distribution at 0.25: 3 * sqrt(1000 * 0.25 * 0.75) = 41.
    assert to_many.count("wrong") == pytest.approx(1000 * error_rate, abs=41 if 0 < error_rate < 1 else 0)
    assert to_one.count("wrong") == 8 * error_rate


@pytest.mark.parametrize("file", KINDS)
def test_every_kind_of_file_delivers(delivered, file):
    recipe, shims = KINDS[file]
    result = delivered[file]
    assert result["outcome"] == "delivered", result
    assert sorted(result["shims"]) == sorted(shims)
    assert result["num_rollouts"] == recipe.num_rollouts
    assert result["has_logprobs"] is (file == "managed.py")


def test_answers_are_right_and_wrong_as_the_data_set_says(delivered):
    # At an error rate of one half two of four are right.
    assert sorted(delivered["managed.py"]["rewards"]) == [0, 0, 1, 1]


def test_a_step_is_trained_on_each(delivered, place, policy):
    (steps,) = train(place, policy, {file: result["temperature"] for file, result in delivered.items()})
    assert set(steps) == set(KINDS)
    for file, step in steps.items():
        assert math.isfinite(step["loss"]), file
        assert step["grad_norm"] > 0, file
        assert step["num_trained_tokens"] == delivered[file]["num_trained_tokens"], file
    # The oracle's logprobs are those of the model, and no other file sends any.
    differences = {file: step.get("sampling/sampling_logp_difference/max") for file, step in steps.items()}
    assert differences.pop("managed.py") < MAX_LOGPROB_ERROR
    assert set(differences.values()) == {None}
