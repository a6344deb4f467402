"""An Atropos environment on the tasks of reasoning-gym, which makes as many as are asked for and checks the answers.

    pip install reasoning-gym
    trl-atropos launch -c examples/configs/quickstart_launch.yaml -- python examples/envs/reasoning.py serve

Another of its more than 100 tasks: `--env.task spell_backward --env.task_config '{"min_word_len": 3, "max_word_len": 4}'`. The
model needs a chat template.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataGroup
from pydantic import Field


try:
    import reasoning_gym
except ModuleNotFoundError:
    sys.exit(
        "The package reasoning-gym is not installed, and the tasks come from it. Run `pip install reasoning-gym`."
    )


INSTRUCTION = "{question}\n\nEnd with a line that holds the answer and nothing else."
ONE_DIGIT = '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}'
MAX_TOKENS = 32
SEED = 42


class ReasoningConfig(BaseEnvConfig):
    """Options of the environment beside those of every environment."""

    task: str = Field(default="basic_arithmetic", description="Name of a data set of reasoning-gym")
    task_config: str = Field(default=ONE_DIGIT, description="Its options, as a JSON object")
    num_problems: int = Field(default=1000, description="Problems before the first comes again")


def make_problems(config: ReasoningConfig) -> Any:
    """Return the data set of a task; the problems repeat with the seed."""
    options = json.loads(config.task_config)
    return reasoning_gym.create_dataset(config.task, size=config.num_problems, seed=SEED, **options)


def find_answer(completion: str) -> str:
    """Return what the last line says, behind its last `=` or `:`."""
    lines = completion.strip().splitlines() or [""]
    return lines[-1].replace(":", "=").rpartition("=")[2].strip().removesuffix(".")


class ReasoningEnv(BaseEnv):
    """One group per problem: several answers, each scored by the task itself, 0 to 1."""

    name = "reasoning"
    env_config_cls = ReasoningConfig

    @classmethod
    def config_init(cls) -> tuple[ReasoningConfig, list[APIServerConfig]]:
        """Return the defaults, which `--env.*` and `--openai.*` change."""
        env_config = ReasoningConfig(
            wandb_name=cls.name,
            use_wandb=False,
            group_size=8,
            max_token_length=256,
            total_steps=-1,  # as many as the trainer registers
            steps_per_eval=0,
            max_batches_offpolicy=1,
            ensure_scores_are_not_same=False,
        )
        # A list: for a single object BaseEnv ignores the base URL.
        return env_config, [APIServerConfig(server_type="vllm", base_url="http://127.0.0.1:9001/v1", api_key="x")]

    async def setup(self) -> None:
        """Make the problems."""
        self.problems = make_problems(self.config)
        self.num_asked = 0

    async def get_next_item(self) -> dict[str, Any]:
        """Return the next problem; after the last one the first comes again."""
        self.num_asked += 1
        return self.problems[(self.num_asked - 1) % len(self.problems)]

    async def collect_trajectories(self, item: dict[str, Any]) -> tuple[ScoredDataGroup, list[Any]]:
        """Sample one group through ManagedServer, which keeps the exact tokens and their logprobs, and score it."""
        messages = [{"role": "user", "content": INSTRUCTION.format(question=item["question"])}]
        async with self.server.managed_server(tokenizer=self.tokenizer) as managed:
            answers = await managed.chat_completion(
                messages=messages, n=self.config.group_size, max_tokens=MAX_TOKENS, temperature=1.0
            )
            nodes = managed.get_state()["nodes"]
        texts = [choice.message.content for choice in answers.choices]
        group = ScoredDataGroup(
            tokens=[node.tokens for node in nodes],
            masks=[node.masked_tokens for node in nodes],
            scores=[float(self.problems.score_answer(find_answer(text), item)) for text in texts],
            inference_logprobs=[node.logprobs for node in nodes],
        )
        return group, []

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `steps_per_eval` is 0."""


if __name__ == "__main__":
    ReasoningEnv.cli()
