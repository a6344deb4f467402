"""A multi-turn environment with a tool: the policy writes, a calculator answers, a user asks on, the policy writes again.

What the policy writes does not matter: the tests are about which tokens are whose.
"""

from __future__ import annotations

from typing import Any

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataGroup


MAX_TOKENS = 6
NUM_TURNS = 3


class CalculatorEnv(BaseEnv):
    name = "calculator"

    @classmethod
    def config_init(cls) -> tuple[BaseEnvConfig, list[APIServerConfig]]:
        env_config = BaseEnvConfig(
            wandb_name=cls.name,
            use_wandb=False,
            group_size=2,
            max_token_length=128,
            total_steps=-1,
            steps_per_eval=0,
            max_batches_offpolicy=1,
            ensure_scores_are_not_same=False,
            include_messages=True,
        )
        return env_config, [APIServerConfig(server_type="vllm", base_url="http://127.0.0.1:9001/v1", api_key="x")]

    async def setup(self) -> None:
        self.number = 0

    async def get_next_item(self) -> int:
        self.number += 1
        return self.number % 10

    async def collect_trajectories(self, item: int) -> tuple[ScoredDataGroup, list[Any]]:
        group = ScoredDataGroup(tokens=[], masks=[], scores=[], inference_logprobs=[], messages=[])
        for _ in range(self.config.group_size):
            messages = [{"role": "user", "content": f"{item}+1"}]
            async with self.server.managed_server(tokenizer=self.tokenizer) as managed:
                for turn in range(NUM_TURNS):
                    answer = await managed.chat_completion(
                        messages=messages, n=1, max_tokens=MAX_TOKENS, temperature=1.0
                    )
                    text = answer.choices[0].message.content
                    messages.append({"role": "assistant", "content": text})
                    if turn < NUM_TURNS - 1:
                        messages += [{"role": "tool", "content": f"={item + 1}"}, {"role": "user", "content": "ok?"}]
                (node,) = managed.get_state()["nodes"]
            group["tokens"].append(node.tokens)
            group["masks"].append(node.masked_tokens)
            group["inference_logprobs"].append(node.logprobs)
            group["scores"].append(float(len(text) % 2))
            group["messages"].append(messages)
        return group, []

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is evaluated."""


if __name__ == "__main__":
    CalculatorEnv.cli()
