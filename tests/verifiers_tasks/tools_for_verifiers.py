"""A taskset of verifiers with a tool, which is a server of its own."""

from __future__ import annotations

import verifiers.v1 as vf


__all__ = ["ToolTaskset"]


class CalculatorToolset(vf.Toolset[vf.ToolsetConfig, vf.State]):
    @vf.tool
    async def add(self, a: int, b: int) -> str:
        """Add two whole numbers."""
        return str(a + b)


class ToolData(vf.TaskData):
    answer: int


class ToolTask(vf.Task[ToolData, vf.State, vf.TaskConfig]):
    @classmethod
    def toolsets(cls, config):
        return [CalculatorToolset(vf.ToolsetConfig())]

    @vf.reward(weight=1.0)
    async def right(self, trace: vf.Trace) -> float:
        return float(str(self.data.answer) in (trace.last_reply or ""))


class ToolTaskset(vf.Taskset[ToolTask, vf.TasksetConfig]):
    def load(self) -> list[ToolTask]:
        return [ToolTask(ToolData(prompt=f"What is {a} + 4?", answer=a + 4), self.config.task) for a in range(2, 9)]


if __name__ == "__main__":
    CalculatorToolset.run()
