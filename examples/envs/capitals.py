"""An Atropos environment that a small model learns on a CPU: name the capital of a country, and nothing else.

    python examples/envs/capitals.py serve --env.rollout_server_url http://127.0.0.1:8000 \
        --env.tokenizer_name MODEL --openai.model_name MODEL --openai.tokenizer_name MODEL \
        --openai.base_url http://127.0.0.1:9001/v1

It needs `run-api`, and `trl vllm-serve` with the `/generate` route of trl_atropos: `trl-atropos launch` starts both.
"""

from __future__ import annotations

import random
from typing import Any

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataGroup


PROMPT = "Country: {country}\nCapital:"
STOP = ["\n"]
MAX_TOKENS = 8
TEMPERATURE = 1.0
GROUP_SIZE = 8
MAX_TOKEN_LENGTH = 64
SEED = 42
REWARD_EXACT = 1.0  # the capital, with or without a full stop
REWARD_FIRST = 0.5  # the capital, then something else
REWARD_INSIDE = 0.25  # the capital somewhere in the answer

# Countries whose capital a 135M model names in a quarter to a half of its samples: what is never sampled cannot be
# reinforced, and what is always sampled has nothing to learn.
CAPITALS = dict(
    pair.split(": ")
    for pair in """\
Afghanistan: Kabul, Argentina: Buenos Aires, Austria: Vienna, Belgium: Brussels, Bulgaria: Sofia, Canada: Ottawa,
China: Beijing, Estonia: Tallinn, Finland: Helsinki, Germany: Berlin, Iraq: Baghdad, Ireland: Dublin, Japan: Tokyo,
Mexico: Mexico City, Peru: Lima, Romania: Bucharest, South Korea: Seoul, Sudan: Khartoum, Syria: Damascus,
Thailand: Bangkok""".replace("\n", " ").split(", ")
)


def make_prompt(country: str) -> str:
    """Return the text that the model continues."""
    return PROMPT.format(country=country)


def compute_reward(completion: str, capital: str) -> float:
    """Return a reward in [0, 1]: full for the capital alone, part of it where more is said, 0 for another city."""
    answer = completion.strip()
    if answer.removesuffix(".") == capital:
        return REWARD_EXACT
    if answer.startswith(capital):
        return REWARD_FIRST
    return REWARD_INSIDE if capital in answer else 0.0


class CapitalsEnv(BaseEnv):
    """One group per country: several completions of the same prompt, each with its reward."""

    name = "capitals"

    @classmethod
    def config_init(cls) -> tuple[BaseEnvConfig, list[APIServerConfig]]:
        """Return the defaults, which `--env.*` and `--openai.*` change."""
        env_config = BaseEnvConfig(
            wandb_name=cls.name,
            use_wandb=False,
            group_size=GROUP_SIZE,
            max_token_length=MAX_TOKEN_LENGTH,
            total_steps=-1,  # as many as the trainer registers
            steps_per_eval=0,
            max_batches_offpolicy=1,
            # Groups in which all rewards tie push nothing, but without them the reward curve would only show the
            # countries that the policy is still unsure about.
            ensure_scores_are_not_same=False,
        )
        # A list: for a single object BaseEnv ignores the base URL.
        return env_config, [APIServerConfig(server_type="vllm", base_url="http://127.0.0.1:9001/v1", api_key="x")]

    async def setup(self) -> None:
        """Shuffle the countries; the order repeats with the seed."""
        self.random = random.Random(SEED)
        self.countries: list[str] = []

    async def get_next_item(self) -> str:
        """Return the next country; every country comes once before any comes again."""
        if not self.countries:
            self.countries = self.random.sample(sorted(CAPITALS), k=len(CAPITALS))
        return self.countries.pop()

    async def collect_trajectories(self, item: str) -> tuple[ScoredDataGroup, list[Any]]:
        """Sample one group through ManagedServer, which keeps the exact tokens and their logprobs, and score it."""
        async with self.server.managed_server(tokenizer=self.tokenizer) as managed:
            completions = await managed.completion(
                prompt=make_prompt(item),
                n=self.config.group_size,
                max_tokens=MAX_TOKENS,
                temperature=TEMPERATURE,
                stop=STOP,
            )
            nodes = managed.get_state()["nodes"]
        group = ScoredDataGroup(
            tokens=[node.tokens for node in nodes],
            masks=[node.masked_tokens for node in nodes],
            scores=[compute_reward(choice.text, CAPITALS[item]) for choice in completions.choices],
            inference_logprobs=[node.logprobs for node in nodes],
        )
        return group, []

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the training reward is this example's only measure, and `steps_per_eval` is 0."""


if __name__ == "__main__":
    CapitalsEnv.cli()
