"""pydantic-ai: an agent with a tool, twice in one conversation."""

import json
import sys

from pydantic_ai import Agent, Tool
from pydantic_ai.models.openai import OpenAIChatModel


def add(a: int, b: int) -> int:
    """Add two integers."""
    return a + b


agent = Agent(
    OpenAIChatModel("policy"),
    instructions="Be brief.",
    tools=[Tool(add, strict=False)],
    model_settings={"max_tokens": 16},
)
first = agent.run_sync(json.load(sys.stdin))
second = agent.run_sync("Go on.", message_history=first.all_messages())
print(second.output)
