"""openai-agents: an agent with a tool, twice in one conversation."""

import json
import sys

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI


@function_tool(strict_mode=False)
def add(a: int, b: int) -> int:
    """Add two integers."""
    return a + b


set_tracing_disabled(True)
model = OpenAIChatCompletionsModel("policy", AsyncOpenAI())
agent = Agent("Adder", instructions="Be brief.", tools=[add], model=model, model_settings=ModelSettings(max_tokens=16))
first = Runner.run_sync(agent, json.load(sys.stdin), max_turns=3)
second = Runner.run_sync(agent, [*first.to_input_list(), {"role": "user", "content": "Go on."}], max_turns=3)
print(second.final_output)
