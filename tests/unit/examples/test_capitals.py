"""The example environment: prompt, reward, order, and what it posts."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import yaml
from capitals import CAPITALS, CapitalsEnv, compute_reward, make_prompt


EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def test_launch_file_asks_for_two_trained_countries_and_two_others_with_the_prompt_of_the_environment() -> None:
    prompts = yaml.safe_load((EXAMPLES / "configs" / "quickstart_launch.yaml").read_text())["prompts"]
    trained = {make_prompt(country) for country in CAPITALS}
    assert [prompt in trained for prompt in prompts] == [True, True, False, False]
    before, after = make_prompt("|").split("|")[0], make_prompt("|").split("|")[-1]
    assert all(prompt.startswith(before) and prompt.endswith(after) for prompt in prompts)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (" Lima", 1.0),
        (" Lima.\n", 1.0),
        (" Lima, the largest city", 0.5),
        (" Lima.\n\nThe", 0.5),
        (" the city of Lima.", 0.25),
        (" Cusco.", 0.0),
        (" lima", 0.0),
        ("", 0.0),
    ],
)
def test_reward_falls_with_what_is_said_besides_the_capital(completion: str, reward: float) -> None:
    assert compute_reward(completion, "Lima") == reward


def test_capitals_are_clean_names() -> None:
    assert CAPITALS["Argentina"] == "Buenos Aires" and CAPITALS["Thailand"] == "Bangkok"
    names = [*CAPITALS, *CAPITALS.values()]
    assert all(name and name == name.strip() and not set(name) & set(",:\n") for name in names)
    assert len(set(CAPITALS.values())) == len(CAPITALS)


def test_config_is_a_list_of_one_vllm_server_without_wandb() -> None:
    env_config, server_configs = CapitalsEnv.config_init()
    assert [config.server_type for config in server_configs] == ["vllm"]
    assert not env_config.use_wandb
    assert env_config.wandb_name == "capitals"


def test_items_come_in_seeded_order_each_country_once_per_round() -> None:
    async def draw(count: int) -> list[str]:
        # Without __init__, which would load a tokenizer: the order depends on setup() alone.
        env = CapitalsEnv.__new__(CapitalsEnv)
        await env.setup()
        return [await env.get_next_item() for _ in range(count)]

    first = asyncio.run(draw(2 * len(CAPITALS)))
    assert first == asyncio.run(draw(2 * len(CAPITALS)))
    assert sorted(first[: len(CAPITALS)]) == sorted(first[len(CAPITALS) :]) == sorted(CAPITALS)
    assert first[: len(CAPITALS)] != first[len(CAPITALS) :]
