"""An agent that knows nothing of training: it asks for a capital, asks again, and says what it ended up with.

    trl-atropos env examples/agents/capitals_agent.py serve --env.rollout_server_url http://127.0.0.1:8000 \
        --env.tokenizer_name MODEL --openai.model_name MODEL --openai.base_url http://127.0.0.1:9001/v1

It needs a trajectory API and `trl vllm-serve`; docs/agents.md explains what happens in between.
"""

from __future__ import annotations

from typing import Any

from openai import AsyncOpenAI

from trl_atropos import AgentEnv


CAPITALS = {"France": "Paris", "Germany": "Berlin", "Ireland": "Dublin", "Japan": "Tokyo", "Peru": "Lima"}
QUESTIONS = ("What is the capital of {country}?", "Say the name of the city, and nothing else.")


async def answer(country: str, base_url: str) -> str:
    """Run the agent; this function could as well stand in a program of somebody else."""
    messages: list[Any] = []
    async with AsyncOpenAI(base_url=base_url, api_key="unused") as client:
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question.format(country=country)})
            reply = await client.chat.completions.create(model="policy", messages=messages, max_tokens=16)
            messages.append({"role": "assistant", "content": reply.choices[0].message.content})
    return messages[-1]["content"] or ""


class CapitalsAgent(AgentEnv):
    """One group per country: several attempts of the agent, each with its reward."""

    name = "capitals-agent"
    tasks = tuple(CAPITALS)

    async def run_agent(self, task: str, base_url: str) -> str:
        """Return the last answer of the agent."""
        return await answer(task, base_url)

    def compute_reward(self, task: str, outcome: str) -> float:
        """Return 1 for the capital alone, part of it where more is said, 0 for another city."""
        if outcome.strip().removesuffix(".") == CAPITALS[task]:
            return 1.0
        return 0.25 if CAPITALS[task] in outcome else 0.0


if __name__ == "__main__":
    CapitalsAgent.cli()
