"""An environment as upstream's files are: a server configuration without a list around it, W&B on, no `wandb_name`, one trajectory
at a time, and tokens from `tokenize_for_trainer`.
"""

from __future__ import annotations

from typing import Any

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataItem
from atroposlib.utils.tokenize_for_trainer import tokenize_for_trainer


class UpstreamShapeEnv(BaseEnv):
    name = "upstream_shape"

    @classmethod
    def config_init(cls) -> tuple[BaseEnvConfig, APIServerConfig]:
        env_config = BaseEnvConfig(
            use_wandb=True, group_size=2, max_token_length=128, steps_per_eval=0, ensure_scores_are_not_same=False
        )
        return env_config, APIServerConfig(base_url="http://localhost:9001/v1")

    async def setup(self) -> None:
        self.number = 0

    async def get_next_item(self) -> int:
        self.number += 1
        return self.number % 10

    async def collect_trajectory(self, item: int) -> tuple[ScoredDataItem, list[Any]]:
        messages = [{"role": "user", "content": f"{item}+1"}]
        answer = await self.server.chat_completion(messages=messages, n=1, max_tokens=6)
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        tokens = tokenize_for_trainer(self.tokenizer, messages, include_messages=True)
        return ScoredDataItem(**tokens, scores=float(item % 2)), []

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is evaluated."""


if __name__ == "__main__":
    UpstreamShapeEnv.cli()
