"""ManagedServer, a data set of the hub, and a server configuration without a list around it; as gsm8k_server.py."""

from __future__ import annotations

from typing import Any

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataGroup
from datasets import load_dataset


class ManagedShape(BaseEnv):
    name = "managed"

    @classmethod
    def config_init(cls) -> tuple[BaseEnvConfig, APIServerConfig]:
        server = APIServerConfig(model_name="m", base_url="http://localhost:9001/v1", api_key="x", server_type="vllm")
        return BaseEnvConfig(use_wandb=True, wandb_name="managed"), server

    async def setup(self) -> None:
        self.rows = load_dataset("gsm8k", "main", split="train")
        self.number = 0

    async def get_next_item(self) -> dict[str, str]:
        self.number += 1
        return self.rows[self.number % len(self.rows)]

    async def collect_trajectories(self, item: dict[str, str]) -> tuple[ScoredDataGroup, list[Any]]:
        messages = [{"role": "user", "content": item["question"]}]
        async with self.server.managed_server(tokenizer=self.tokenizer) as managed:
            answers = await managed.chat_completion(messages=messages, n=self.config.group_size, max_tokens=32)
            nodes = managed.get_state()["nodes"]
        expected = item["answer"].rpartition("#### ")[2]
        group = ScoredDataGroup(
            tokens=[node.tokens for node in nodes],
            masks=[node.masked_tokens for node in nodes],
            inference_logprobs=[node.logprobs for node in nodes],
            scores=[float(choice.message.content == expected) for choice in answers.choices],
        )
        return group, []

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is evaluated."""


if __name__ == "__main__":
    ManagedShape.cli()
