"""A taskset of verifiers with one question and two rewards."""

from __future__ import annotations

import random
from collections.abc import Iterator

import verifiers.v1 as vf


__all__ = ["SumTaskset"]


class SumData(vf.TaskData):
    answer: int


class SumTask(vf.Task[SumData, vf.State, vf.TaskConfig]):
    @vf.reward(weight=1.0)
    async def right(self, trace: vf.Trace) -> float:
        return float(str(self.data.answer) in (trace.last_reply or ""))

    @vf.reward(weight=0.5)
    async def short(self, trace: vf.Trace) -> float:
        return 1.0 / (1 + len(trace.last_reply or ""))


class SumTaskset(vf.Taskset[SumTask, vf.TasksetConfig]):
    INFINITE = True

    def load(self) -> Iterator[SumTask]:
        rng = random.Random(0)
        while True:
            a, b = rng.randint(1, 9), rng.randint(1, 9)
            yield SumTask(SumData(prompt=f"What is {a} + {b}?", answer=a + b), self.config.task)
