"""`verifiers:NAME`: tasksets of verifiers 0.4 and what packages make of them, https://github.com/PrimeIntellect-ai/verifiers."""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

from ..errors import EpisodeError, PreflightError
from .asked import AskedEpisode


def task_names() -> list[str]:
    """Tasksets that verifiers ships, and the installed packages that need verifiers."""
    import verifiers.v1.tasksets as shipped

    names = {module.name for module in pkgutil.iter_modules(shipped.__path__)}
    for distribution in importlib.metadata.distributions():
        needs = [
            re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in distribution.requires or [] if "extra ==" not in line
        ]
        if "verifiers" in needs:
            names.add(distribution.metadata["Name"])
    return sorted(names - {"trl-atropos"})


def is_name(name: str) -> bool:
    """Whether there is a module of this name, installed or on Python's path."""
    return name in task_names() or importlib.util.find_spec(name.replace("-", "_").lower()) is not None


class Verifiers:
    """A taskset with the environment that goes with it. Its rewards, stop rules, turns and tools are its own; one of its
    seats is played by the policy. Every second task is for the evaluation.

    Args:
        name (`str`):
            Of a package or module that exports a taskset, such as `textarena`.
        options (`dict[str, Any]`):
            What verifiers calls the `env` block: `{"taskset": {...}, "agent": {"max_turns": 4}}`. A seat that is not
            trained needs a `model` and a `client` of its own.
    """

    is_single_turn = False
    has_eval_split = True
    runs_elsewhere = True
    max_episodes: int | None = None

    def __init__(self, name: str, options: dict[str, Any]):
        import verifiers.v1 as vf

        program = importlib.import_module(".verifiers_program", __package__)
        sys.modules[program.NAME] = program
        block = {**options, "taskset": {**options.get("taskset", {}), "id": name}}
        for seat, field in vf.env_config_type(name, block.get("id", "")).model_fields.items():
            if isinstance(field.default, vf.AgentConfig):
                block[seat] = {
                    "runtime": {"type": "subprocess"},
                    "harness": {"id": program.NAME},
                    **block.get(seat, {}),
                }
        self._describe_tools = program.describe_tools
        self._environment = vf.load_environment(vf.resolve_env_config(block))
        self._tasks: list[Any] = []
        self._rest: Iterator[Any] = iter(self._environment.taskset)
        self._lock = threading.Lock()
        self._episodes: dict[str, tuple[AskedEpisode, Any]] = {}  # by the id of verifiers' trace
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="verifiers", daemon=True).start()
        url = asyncio.run_coroutine_threadsafe(self._start(program.serve_policy), self._loop).result()
        self._context = vf.ModelContext(
            model="policy", client=vf.EvalClientConfig(base_url=url, api_key_var="TRL_ATROPOS_NO_KEY")
        )

    async def _start(self, serve_policy: Any) -> str:
        # Its servers live as long as this process.
        self._serving = self._environment.serving()
        await self._serving.__aenter__()
        return await serve_policy(self._answer)

    async def _answer(self, trace_id: str, body: dict[str, Any]) -> str:
        messages = [_message(message) for message in body["messages"]]
        if body.get("tools"):
            system = messages.pop(0)["content"] + "\n\n" if messages[0]["role"] == "system" else ""
            messages.insert(0, {"role": "system", "content": system + self._describe_tools(body["tools"])})
        attempt, trace = self._episodes[trace_id]
        if not trace.agent.trainable:
            raise EpisodeError(
                f"The seat {trace.agent.name!r} is not trained, and has no model of its own.",
                "The policy plays the seat that is trained alone.",
                f"""Name one: --args '{{"{trace.agent.name}": {{"model": ..., "client": {{"base_url": ...}}}}}}'.""",
            )
        return await attempt.ask(trace_id, messages)

    async def _play(self, number: int, attempt: AskedEpisode) -> float:
        slot = self._environment.slots(self._tasks[number])[0]
        ids: list[str] = []

        def note(trace: Any) -> None:
            ids.append(trace.id)
            self._episodes[trace.id] = attempt, trace

        try:
            played = await self._environment.run_slot(slot, self._context, on_trace=note)
        finally:
            for trace_id in ids:
                del self._episodes[trace_id]
        errors = [*played.errors, *(error for trace in played.traces for error in trace.errors)]
        if not played.ok:
            raise EpisodeError(
                "An episode failed: " + "; ".join(f"{error.type}: {error.message}" for error in errors) + ".",
                "It is verifiers, or the environment itself, that says so.",
                "Correct --args, or choose another of `trl-atropos env list`.",
            )
        return sum(float(trace.reward) for trace in played.traces if trace.agent.trainable)

    def make_task(self, number: int, *, is_eval: bool = False) -> int:
        """Return the position of a task; after the last one the first comes again."""
        with self._lock:
            wanted = 2 * number + is_eval
            while len(self._tasks) <= wanted:
                try:
                    self._tasks.append(next(self._rest))
                except StopIteration:
                    break
            if not self._tasks:
                raise PreflightError("The taskset has no tasks.", "Nothing can be sampled.", "Correct --args.")
            half = len(self._tasks) // 2 or 1
            return (wanted if wanted < len(self._tasks) else 2 * (number % half) + is_eval) % len(self._tasks)

    def open(self, task: int) -> AskedEpisode:
        """Begin an episode, up to what the policy is asked first."""
        return AskedEpisode(lambda attempt: asyncio.run_coroutine_threadsafe(self._play(task, attempt), self._loop))


def _message(message: dict[str, Any]) -> dict[str, str]:
    """A message with text alone; what a tool returned is a message of the user in the words of the chat templates."""
    content = message["content"]
    parts = content if isinstance(content, list) else [{"text": content or ""}]
    text = "\n".join(part.get("text", "") for part in parts)
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"}
    return {"role": message["role"], "content": text}
