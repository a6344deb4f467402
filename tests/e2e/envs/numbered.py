"""An environment whose groups are numbers, so that every one is known again in a trainer, and that writes down which were taken.

It asks no inference server: what is tested is what becomes of a group. All else is BaseEnv's: registration, waiting, retries.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataGroup
from pydantic import Field


PAUSE_S = 0.02
BASE = 50
GROUP_SIZE = 2


def make_tokens(number: int) -> list[list[int]]:
    """The tokens of a group that no other number has: its three digits to the base 50 are the prompt. 125,000 numbers."""
    digits = [10 + number // BASE**place % BASE for place in (2, 1, 0)]
    return [[1, *digits, 2, 3 + rollout, *[5 + number % 3] * (1 + number % 4)] for rollout in range(GROUP_SIZE)]


class NumberedEnvConfig(BaseEnvConfig):
    first_number: int = Field(default=0, description="Number of the first group of this process.")
    record_path: str = Field(
        default="", description="Gets a line for each group, before it is posted and when it was taken."
    )


class NumberedEnv(BaseEnv):
    name = "numbered"
    env_config_cls = NumberedEnvConfig

    @classmethod
    def config_init(cls) -> tuple[NumberedEnvConfig, list[APIServerConfig]]:
        env_config = NumberedEnvConfig(
            wandb_name=cls.name,
            use_wandb=False,
            group_size=GROUP_SIZE,
            max_token_length=32,
            total_steps=1_000_000,
            steps_per_eval=0,
            max_num_workers=4,
            max_batches_offpolicy=4,
            ensure_scores_are_not_same=False,
        )
        server = APIServerConfig(server_type="vllm", base_url="http://127.0.0.1:9/v1", api_key="x", health_check=False)
        return env_config, [server]

    async def setup(self) -> None:
        self.number = self.config.first_number
        self.record = os.open(self.config.record_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    async def get_next_item(self) -> int:
        return 0

    async def collect_trajectories(self, item: int) -> tuple[ScoredDataGroup, list[Any]]:
        await asyncio.sleep(PAUSE_S)
        # Not by the item, which comes again when BaseEnv ends a worker while it posts.
        number, self.number = self.number, self.number + 1
        tokens = make_tokens(number)
        group = ScoredDataGroup(
            tokens=tokens,
            masks=[[-100] * 4 + row[4:] for row in tokens],
            scores=[float((number + rollout) % 3) for rollout in range(GROUP_SIZE)],
            inference_logprobs=[[1.0] * 4 + [-4.0] * len(row[4:]) for row in tokens],
        )
        return group, []

    async def _send_scored_data_to_api(self, scored_data: Any) -> None:
        (group,) = scored_data if isinstance(scored_data, list) else (scored_data,)
        digits = [token - 10 for token in group["tokens"][0][1:4]]
        number = (digits[0] * BASE + digits[1]) * BASE + digits[2]
        os.write(self.record, f"sent {number}\n".encode())
        # Raises unless the API took it: it refuses none of these.
        await super()._send_scored_data_to_api(scored_data)
        os.write(self.record, f"taken {number}\n".encode())

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is evaluated."""


if __name__ == "__main__":
    NumberedEnv.cli()
