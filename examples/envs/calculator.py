"""A multi-turn Atropos environment with a tool: the model may ask a calculator before it answers.

    trl-atropos launch -c examples/configs/quickstart_launch.yaml -- python examples/envs/calculator.py serve

A turn that holds `CALC(3 * 4)` is answered by the tool; one without it is the final answer. Every token that the model wrote in any
turn is trained, what the tool wrote is not. The model needs a chat template.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from typing import Any

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataGroup


INSTRUCTION = "What is {task}? You may write CALC(expression) to use a calculator. Then answer with the number."
CALL = re.compile(r"CALC\(([^()]{1,40})\)")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
MAX_TURNS = 3
MAX_TOKENS = 32
SEED = 42
REWARD_RIGHT = 1.0
REWARD_CALL = 0.2  # no right answer, but a call that the calculator understood


def calculate(expression: str) -> int:
    """Return the value of sums, differences and products of whole numbers; raise ValueError for anything else."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) < 10**9:
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError(f"{expression!r} is not a sum, difference or product of whole numbers")

    try:
        return value(ast.parse(expression.strip(), mode="eval").body)
    except SyntaxError as exc:
        raise ValueError(f"{expression!r} is not an expression") from exc


def compute_reward(answer: str, task: str, num_calls: int) -> float:
    """Return a reward in [0, 1]: full for the right number at the end of the answer, a part for a call that worked."""
    numbers = re.findall(r"-?\d+", answer)
    if numbers and int(numbers[-1]) == calculate(task):
        return REWARD_RIGHT
    return REWARD_CALL if num_calls else 0.0


class CalculatorEnv(BaseEnv):
    """One group per task: several conversations, each with its reward."""

    name = "calculator"

    @classmethod
    def config_init(cls) -> tuple[BaseEnvConfig, list[APIServerConfig]]:
        """Return the defaults, which `--env.*` and `--openai.*` change."""
        env_config = BaseEnvConfig(
            wandb_name=cls.name,
            use_wandb=False,
            group_size=4,
            max_token_length=256,
            total_steps=-1,  # as many as the trainer registers
            steps_per_eval=0,
            max_batches_offpolicy=1,
            ensure_scores_are_not_same=False,
        )
        # A list: for a single object BaseEnv ignores the base URL.
        return env_config, [APIServerConfig(server_type="vllm", base_url="http://127.0.0.1:9001/v1", api_key="x")]

    async def setup(self) -> None:
        """Begin the tasks, which repeat with the seed."""
        self.random = random.Random(SEED)

    async def get_next_item(self) -> str:
        """Return the next task."""
        first, second, third = (self.random.randint(2, 20) for _ in range(3))
        return f"{first} * {second} + {third}"

    async def collect_trajectories(self, item: str) -> tuple[ScoredDataGroup, list[Any]]:
        """Hold the conversations of one group, one after the other: each has its own tool answers."""
        group = ScoredDataGroup(tokens=[], masks=[], scores=[], inference_logprobs=[])
        for _ in range(self.config.group_size):
            async with self.server.managed_server(tokenizer=self.tokenizer) as managed:
                reward = await self._converse(managed, item)
                # One node: each turn extends the one before.
                node = managed.get_state()["nodes"][-1]
            group["tokens"].append(node.tokens)
            group["masks"].append(node.masked_tokens)
            group["scores"].append(reward)
            group["inference_logprobs"].append(node.logprobs)
        return group, []

    async def _converse(self, managed: Any, task: str) -> float:
        messages = [{"role": "user", "content": INSTRUCTION.format(task=task)}]
        num_calls = 0
        for _ in range(MAX_TURNS):
            answer = await managed.chat_completion(messages=messages, n=1, max_tokens=MAX_TOKENS, temperature=1.0)
            text = answer.choices[0].message.content
            call = CALL.search(text)
            if call is None:
                break
            try:
                result = str(calculate(call[1]))
                num_calls += 1
            except ValueError as exc:
                result = f"error: {exc}"
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": f"CALC: {result}"}]
        return compute_reward(text, task, num_calls)

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `steps_per_eval` is 0."""


if __name__ == "__main__":
    CalculatorEnv.cli()
