"""langgraph: LangChain's agent with a tool, twice in one conversation."""

import json
import sys

from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def add(a: int, b: int) -> int:
    """Add two integers."""
    return a + b


agent = create_agent(ChatOpenAI(model="policy", max_tokens=16), tools=[add], system_prompt="Be brief.")
first = agent.invoke({"messages": [("user", json.load(sys.stdin))]})
second = agent.invoke({"messages": [*first["messages"], ("user", "Go on.")]})
print(second["messages"][-1].content)
