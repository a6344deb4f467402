"""Train the model behind phone_agent.py: tasks, and what each conversation is worth. On two CPU cores:

    trl-atropos launch -c examples/configs/launch_phone_agent.yaml

docs/tutorial_agents.md walks through it.
"""

from __future__ import annotations

from typing import Any

from openai import AsyncOpenAI
from phone_agent import PHONE_BOOK, answer

from trl_atropos import AgentEnv


REWARD_CALL = 0.2  # some call that the server's parser understood
REWARD_ARGUMENT = 0.5  # a call with the name that was asked for


class PhoneAgent(AgentEnv):
    """One group per person: several conversations, each with its reward."""

    name = "phone-agent"
    tasks = tuple(PHONE_BOOK)[:20]  # the last four are left to be asked for afterwards

    async def setup(self) -> None:
        """Make the one client of all attempts, beside the gateway."""
        await super().setup()
        self.client = AsyncOpenAI(base_url="http://unused", api_key="unused")

    async def run_agent(self, task: str, base_url: str) -> list[dict[str, Any]]:
        """Return the conversation of the agent, which is given the session's URL and nothing else."""
        return await answer(task, self.client.with_options(base_url=base_url))

    def compute_reward(self, task: str, outcome: list[dict[str, Any]]) -> float:
        """Return 1 for the right number out of the tool, a part for a call without it, and 0 for a number out of thin air."""
        calls = [call["function"] for message in outcome for call in message.get("tool_calls", [])]
        results = [message["content"] for message in outcome if message["role"] == "tool"]
        last = outcome[-1]
        if PHONE_BOOK[task] not in results:
            return REWARD_CALL if calls else 0.0
        is_said = last["role"] == "assistant" and PHONE_BOOK[task] in last.get("content", "")
        return 1.0 if is_said else REWARD_ARGUMENT


if __name__ == "__main__":
    PhoneAgent.cli()
