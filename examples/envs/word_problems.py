"""An Atropos environment on a data set of questions and answers in GSM8K's format.

    trl-atropos launch -c examples/configs/quickstart_launch.yaml -- python examples/envs/word_problems.py serve

It takes examples/data/word_problems.jsonl, or whatever `datasets` can load: `--env.dataset_path openai/gsm8k
--env.dataset_name main`, or the path of a .jsonl file with `question` and `answer`, which ends in `#### NUMBER`. The model needs
a chat template.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataGroup
from datasets import Dataset, load_dataset
from pydantic import Field


SAMPLE = Path(__file__).resolve().parents[1] / "data" / "word_problems.jsonl"
INSTRUCTION = (
    "Solve the problem. Think step by step and end with the answer, a number, on a line of its own.\n\n{question}"
)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
MAX_TOKENS = 64
SEED = 42
REWARD_RIGHT = 1.0
REWARD_NUMBER = 0.1  # a number, but another one: something to climb from for a model that hardly ever gives one


class WordProblemsConfig(BaseEnvConfig):
    """Options of the environment beside those of every environment."""

    dataset_path: str = Field(default=str(SAMPLE), description="A .jsonl file, or a data set's id on the Hub")
    dataset_name: str | None = Field(default=None, description="Configuration of the data set on the Hub")
    dataset_split: str = Field(default="train", description="Split of the data set")


def load_problems(config: WordProblemsConfig) -> Dataset:
    """Return the questions and answers in an order that repeats with the seed."""
    if Path(config.dataset_path).is_file():
        problems = load_dataset("json", data_files=config.dataset_path, split="train")
    else:
        problems = load_dataset(config.dataset_path, config.dataset_name, split=config.dataset_split)
    return problems.shuffle(seed=SEED)


def last_number(text: str) -> float | None:
    """Return the number that a text ends with, as GSM8K's answers and most solutions do; None without one."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def compute_reward(completion: str, answer: str) -> float:
    """Return a reward in [0, 1]: full for the right number at the end, little for another one, 0 for none."""
    number = last_number(completion)
    if number is None:
        return 0.0
    return REWARD_RIGHT if number == last_number(answer) else REWARD_NUMBER


class WordProblemsEnv(BaseEnv):
    """One group per problem: several solutions, each with its reward."""

    name = "word_problems"
    env_config_cls = WordProblemsConfig

    @classmethod
    def config_init(cls) -> tuple[WordProblemsConfig, list[APIServerConfig]]:
        """Return the defaults, which `--env.*` and `--openai.*` change."""
        env_config = WordProblemsConfig(
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
        """Load the data."""
        self.problems = load_problems(self.config)
        self.num_asked = 0

    async def get_next_item(self) -> dict[str, str]:
        """Return the next problem; after the last one the first comes again."""
        self.num_asked += 1
        return self.problems[(self.num_asked - 1) % len(self.problems)]

    async def collect_trajectories(self, item: dict[str, str]) -> tuple[ScoredDataGroup, list[Any]]:
        """Sample one group through ManagedServer, which keeps the exact tokens and their logprobs, and score it."""
        messages = [{"role": "user", "content": INSTRUCTION.format(question=item["question"])}]
        async with self.server.managed_server(tokenizer=self.tokenizer) as managed:
            answers = await managed.chat_completion(
                messages=messages, n=self.config.group_size, max_tokens=MAX_TOKENS, temperature=1.0
            )
            nodes = managed.get_state()["nodes"]
        group = ScoredDataGroup(
            tokens=[node.tokens for node in nodes],
            masks=[node.masked_tokens for node in nodes],
            scores=[compute_reward(choice.message.content, item["answer"]) for choice in answers.choices],
            inference_logprobs=[node.logprobs for node in nodes],
        )
        return group, []

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `steps_per_eval` is 0."""


if __name__ == "__main__":
    WordProblemsEnv.cli()
