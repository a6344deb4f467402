"""The plain SDK of OpenAI: two requests of one conversation."""

import json
import sys

from openai import OpenAI


task = json.load(sys.stdin)
client = OpenAI()
messages = [{"role": "user", "content": task}]
for _ in range(2):
    reply = client.chat.completions.create(model="policy", messages=messages, max_tokens=16).choices[0].message
    messages += [reply.model_dump(exclude_none=True), {"role": "user", "content": "Go on."}]
print(messages[-2]["content"])
