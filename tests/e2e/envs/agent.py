"""An agent of the OpenAI SDK that asks twice, as an environment."""

from __future__ import annotations

from typing import Any

from openai import AsyncOpenAI

from trl_atropos import AgentEnv


class AskTwice(AgentEnv):
    """The more of the letter, the better."""

    name = "ask-twice"
    tasks = ("e", "o")

    async def run_agent(self, task: Any, base_url: str) -> str:
        messages: list[Any] = []
        async with AsyncOpenAI(base_url=base_url, api_key="x") as client:
            for text in (f"Write {task}.", "More."):
                messages.append({"role": "user", "content": text})
                answer = await client.chat.completions.create(
                    model="gpt-4o", messages=messages, max_tokens=24, temperature=0.2, top_p=0.5
                )
                messages.append(answer.choices[0].message.model_dump(exclude_none=True))
        return "".join(message["content"] for message in messages if message["role"] == "assistant")

    def compute_reward(self, task: Any, outcome: str) -> float:
        return outcome.count(task) / 24


if __name__ == "__main__":
    AskTwice.cli()
