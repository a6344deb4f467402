"""Rollouts of a data set, which nobody samples, with one advantage each; as sft_loader_server.py."""

from __future__ import annotations

from typing import Any

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataGroup


class LoaderShape(BaseEnv):
    name = "loader"

    @classmethod
    def config_init(cls) -> tuple[BaseEnvConfig, list[APIServerConfig]]:
        return BaseEnvConfig(), [APIServerConfig(model_name="m", base_url="http://localhost:9001/v1", api_key="x")]

    async def setup(self) -> None:
        """Nothing is needed."""

    async def get_next_item(self) -> str:
        return "Three."

    async def collect_trajectories(self, item: str) -> tuple[ScoredDataGroup, list[Any]]:
        tokens = self.tokenizer.encode(item)
        count = self.config.group_size
        group = ScoredDataGroup(tokens=[tokens] * count, masks=[[-100, *tokens[1:]]] * count, scores=[1] * count)
        group["advantages"] = [1] * count
        return group, []

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is evaluated."""


if __name__ == "__main__":
    LoaderShape.cli()
