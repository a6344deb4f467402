"""mini-swe-agent: its default agent in the directory where it starts, with two steps."""

import json
import os
import sys

from minisweagent.agents.default import DefaultAgent
from minisweagent.environments.local import LocalEnvironment
from minisweagent.models.litellm_model import LitellmModel


model = LitellmModel(
    model_name="openai/policy",
    cost_tracking="ignore_errors",
    model_kwargs={
        "api_base": os.environ["OPENAI_BASE_URL"],
        "api_key": os.environ["OPENAI_API_KEY"],
        "max_tokens": 16,
    },
)
agent = DefaultAgent(
    model,
    LocalEnvironment(),
    system_template="You answer with a command in a bash block.",
    instance_template="{{task}}",
    step_limit=2,
    cost_limit=0,
)
print(agent.run(json.load(sys.stdin)))
