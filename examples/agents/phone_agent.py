"""A program with one tool: it looks a phone number up and says it. It knows nothing of training, and runs wherever a model is:

    echo '"Marco"' | OPENAI_BASE_URL=http://127.0.0.1:9001/v1 OPENAI_API_KEY=x python examples/agents/phone_agent.py

phone_env.py trains the model behind it: `trl-atropos launch -c examples/configs/launch_phone_agent.yaml`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from openai import AsyncOpenAI


PHONE_BOOK = {
    "Ada": "7311", "Bruno": "7890", "Clara": "1663", "Dmitri": "5242", "Elena": "9376", "Farid": "8961", "Greta": "7634", "Hugo": "5969",
    "Ines": "8808", "Jonas": "6866", "Kenji": "4578", "Lena": "9268", "Marco": "3281", "Nadia": "5617", "Oscar": "3289", "Paula": "2553",
    "Quentin": "5104", "Rosa": "9725", "Stefan": "3407", "Tara": "6081", "Ulrich": "2618", "Vera": "2208", "Walter": "6409", "Yusuf": "8735",
}  # fmt: skip
PARAMETERS = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
LOOK_UP = {"name": "look_up", "description": "Look up the number of a person.", "parameters": PARAMETERS}
MAX_TURNS, MAX_TOKENS = 3, 36


def question(name: str) -> dict[str, Any]:
    """What somebody asks."""
    return {"role": "user", "content": f"What is the number of {name}?"}


def example(name: str, number: str) -> list[dict[str, Any]]:
    """A conversation as it should be."""
    function = {"name": "look_up", "arguments": json.dumps({"name": name})}
    call = {"id": f"example_{name}", "type": "function", "function": function}
    return [
        question(name),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": number},
        {"role": "assistant", "content": f"The number of {name} is {number}."},
    ]


PROMPT = [
    {"role": "system", "content": "You look phone numbers up."},
    *example("Bob", "4921"),
    *example("Zoe", "7306"),
]


def run_tool(name: str, arguments: str) -> str:
    """Return what the tool says to a call, or what is wrong with the call."""
    try:
        wanted = str(json.loads(arguments)["name"])
    except (ValueError, LookupError, TypeError):
        return "The tool takes a name."
    return PHONE_BOOK.get(wanted, "Nobody has this name.") if name == "look_up" else "There is no such tool."


async def answer(name: str, client: AsyncOpenAI) -> list[dict[str, Any]]:
    """Return the conversation, from the question on."""
    messages: list[Any] = [*PROMPT, question(name)]
    for _ in range(MAX_TURNS):
        reply = await client.chat.completions.create(
            model="policy", messages=messages, tools=[{"type": "function", "function": LOOK_UP}], max_tokens=MAX_TOKENS
        )
        message = reply.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls or []:
            said = run_tool(call.function.name, call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": said})
        if not message.tool_calls:
            break
    return messages[len(PROMPT) :]


if __name__ == "__main__":
    print(json.dumps(asyncio.run(answer(json.load(sys.stdin), AsyncOpenAI()))))
