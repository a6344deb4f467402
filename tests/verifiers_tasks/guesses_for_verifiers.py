"""An environment of verifiers that plays the user: higher, lower. A finite taskset with a system prompt."""

from __future__ import annotations

import re

import verifiers.v1 as vf


__all__ = ["GuessEnv", "GuessTaskset"]


class GuessData(vf.TaskData):
    secret: int


class GuessTask(vf.Task[GuessData, vf.State, vf.TaskConfig]):
    pass


class GuessTaskset(vf.Taskset[GuessTask, vf.TasksetConfig]):
    def load(self) -> list[GuessTask]:
        prompt = "Guess my number from 1 to 20."
        return [
            GuessTask(GuessData(prompt=prompt, system_prompt="Numbers alone.", secret=secret), self.config.task)
            for secret in (7, 13, 2, 19)
        ]


class GuessConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig(max_turns=3)


class GuessEnv(vf.Env[GuessConfig]):
    async def run(self, task, agents):
        reward = 0.0
        async with agents.player.interaction(task) as interaction:
            segment = await interaction.turn()
            while not segment.terminated:
                numbers = re.findall(r"\d+", segment.last_reply)
                guess = int(numbers[0]) if numbers and len(numbers[0]) < 4 else 0
                reward = max(0.0, 1.0 - abs(guess - task.data.secret) / 20)
                if guess == task.data.secret:
                    break
                segment = await interaction.turn("higher" if guess < task.data.secret else "lower")
        interaction.trace.record_reward("closeness", reward)
