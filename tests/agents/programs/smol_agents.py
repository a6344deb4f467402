"""smolagents: a ToolCallingAgent, which asks once more where its answer has no call."""

import json
import os
import sys

from smolagents import OpenAIServerModel, ToolCallingAgent, tool


@tool
def add(a: int, b: int) -> int:
    """Add two integers.

    Args:
        a: One.
        b: The other.
    """
    return a + b


model = OpenAIServerModel("policy", os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"], max_tokens=16)
agent = ToolCallingAgent(tools=[add], model=model, max_steps=2, verbosity_level=0)
print(agent.run(json.load(sys.stdin)))
