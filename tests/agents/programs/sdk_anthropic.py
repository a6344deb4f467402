"""The plain SDK of Anthropic: two requests of one conversation."""

import json
import sys

from anthropic import Anthropic


task = json.load(sys.stdin)
client = Anthropic()
messages = [{"role": "user", "content": task}]
for _ in range(2):
    reply = client.messages.create(model="policy", messages=messages, max_tokens=16)
    messages += [{"role": "assistant", "content": reply.content}, {"role": "user", "content": "Go on."}]
print(reply.content)
