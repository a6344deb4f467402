"""A module beside it, one rollout at a time from `completion`, and options that only a signature names; as infinimath_env.py."""

from __future__ import annotations

from typing import Any

from atroposlib.envs.base import BaseEnv, BaseEnvConfig, ScoredDataItem
from atroposlib.utils.tokenize_for_trainer import tokenize_for_trainer

from .rules import reward


class RuledConfig(BaseEnvConfig):
    first: int


class RuledShape(BaseEnv):
    def __init__(self, config: RuledConfig, server_configs: list[Any], slurm: bool = True, testing: bool = False):
        super().__init__(config, server_configs, slurm, testing)

    async def setup(self) -> None:
        self.number = 0

    async def get_next_item(self) -> str:
        return f"What is {self.config.first}+2?"

    async def collect_trajectory(self, item: str) -> tuple[ScoredDataItem, list[Any]]:
        messages = [{"role": "user", "content": item}]
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        answer = (await self.server.completion(prompt=prompt, n=1, max_tokens=16)).choices[0].text
        tokens = tokenize_for_trainer(self.tokenizer, [*messages, {"role": "assistant", "content": answer}])
        self.number += 1
        return ScoredDataItem(tokens=tokens["tokens"], masks=tokens["masks"], scores=reward(answer, self.number)), []

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is evaluated."""


if __name__ == "__main__":
    RuledShape.cli()
