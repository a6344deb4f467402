"""Several turns, tokens from `tokenize_for_trainer`, several default servers, and an old name; as the games of upstream."""

from __future__ import annotations

from typing import Any

from atroposlib.envs.base import BaseEnv, BaseEnvConfig, OpenaiConfig, ScoredDataGroup
from atroposlib.utils.tokenize_for_trainer import tokenize_for_trainer


class ConversationShape(BaseEnv):
    name = "conversation"

    @classmethod
    def config_init(cls) -> tuple[BaseEnvConfig, list[OpenaiConfig]]:
        servers = [OpenaiConfig(model_name="m", base_url=f"http://localhost:{port}/v1") for port in (9001, 9002)]
        return BaseEnvConfig(), servers

    async def setup(self) -> None:
        """Nothing is needed."""

    async def get_next_item(self) -> str:
        return "What is 1+2?"

    async def collect_trajectories(self, item: str) -> tuple[ScoredDataGroup, list[Any]]:
        group = ScoredDataGroup(tokens=[], masks=[], scores=[])
        for _ in range(self.config.group_size):
            messages = [{"role": "user", "content": item}]
            for turn in ("Sure?", None):
                answer = await self.server.chat_completion(messages=messages, n=1, max_tokens=16)
                messages.append({"role": "assistant", "content": answer.choices[0].message.content})
                if turn is not None:
                    messages.append({"role": "user", "content": turn})
            tokens = tokenize_for_trainer(self.tokenizer, messages, train_on_all_assistant_turns=True)
            group["tokens"].append(tokens["tokens"])
            group["masks"].append(tokens["masks"])
            group["scores"].append(sum(message["content"] == "3" for message in messages) + len(group["scores"]) / 10)
        return group, []

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is evaluated."""


if __name__ == "__main__":
    ConversationShape.cli()
