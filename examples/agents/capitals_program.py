"""A program of its own that runs agents, as one in any language could: it asks a gateway for sessions and says what each was worth.

    trl-atropos launch -c examples/configs/launch_agents.yaml

The launch starts the gateway and names it in TRL_ATROPOS_GATEWAY_URL and TRL_ATROPOS_GATEWAY_KEY.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import uuid
from typing import Any

import httpx
from openai import AsyncOpenAI, OpenAIError


CAPITALS = {"France": "Paris", "Germany": "Berlin", "Ireland": "Dublin", "Japan": "Tokyo", "Peru": "Lima"}
QUESTIONS = ("What is the capital of {country}?", "Say the name of the city, and nothing else.")
GROUP_SIZE = int(os.environ.get("TRL_ATROPOS_GROUP_SIZE", "8"))


async def answer(country: str, base_url: str) -> str:
    """Run the agent, which knows nothing of training."""
    messages: list[Any] = []
    async with AsyncOpenAI(base_url=base_url, api_key="unused") as client:
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question.format(country=country)})
            reply = await client.chat.completions.create(model="policy", messages=messages, max_tokens=24)
            messages.append({"role": "assistant", "content": reply.choices[0].message.content})
    return messages[-1]["content"] or ""


def compute_reward(country: str, outcome: str) -> float:
    """Return 1 for the capital alone, part of it where more is said, 0 for another city."""
    if outcome.strip().removesuffix(".") == CAPITALS[country]:
        return 1.0
    return 0.25 if CAPITALS[country] in outcome else 0.0


async def attempt(gateway: httpx.AsyncClient, country: str, group: str) -> None:
    """Run the agent once, in a session of its own. The sessions of a group are compared."""
    opened = (await gateway.post("/session", json={"group": group})).raise_for_status().json()
    session = f"/session/{opened['session_id']}"
    try:
        outcome = await answer(country, opened["base_url"])
    except OpenAIError:
        await gateway.post(f"{session}/discard")
        raise
    finished = await gateway.post(f"{session}/finish", json={"reward": compute_reward(country, outcome)})
    finished.raise_for_status()


async def main() -> None:
    """Attempt one country after the other, until the launch ends this process."""
    key = os.environ["TRL_ATROPOS_GATEWAY_KEY"]
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(
        base_url=os.environ["TRL_ATROPOS_GATEWAY_URL"], headers=headers, timeout=600.0
    ) as gateway:
        for country in itertools.cycle(CAPITALS):
            group = f"{country} {uuid.uuid4()}"
            await asyncio.gather(*(attempt(gateway, country, group) for _ in range(GROUP_SIZE)))
            print(f"{GROUP_SIZE} attempts at {country}", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
