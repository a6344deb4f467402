"""An Atropos environment out of a task list, an agent and a reward: the agent is any program with a base URL."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataGroup
from pydantic import Field

from ..errors import EpisodeError, PreflightError
from .counts_file import COUNTS_VARIABLE, CountsFile
from .gateway import Gateway
from .groups import FinishedSession, GroupMaker
from .options import GatewayOptions, divides_by_deviation, with_temperature_of_trainer


logger = logging.getLogger(__name__)

MAX_QUOTED_CHARS = 500
"""How much of what a command wrote an error repeats."""


class AgentEnvConfig(BaseEnvConfig):
    """Options of the environment beside those of every environment."""

    agent_timeout_s: float = Field(default=600.0, description="Seconds that an agent may take for one attempt")
    scale_rewards: Literal["group", "none"] | None = Field(
        default=None,
        description="How rewards become advantages where an agent rewrote its history or turns have rewards: group or none. "
        "Default: as --scale_rewards of the trainer, which a launch tells; without a launch, group",
    )


class AgentEnv(BaseEnv):
    """Groups of an agent that knows nothing of training: each task is attempted `group_size` times.

    Subclasses set `tasks`, either `command` or `run_agent`, and `compute_reward`:

        class Greeter(AgentEnv):
            name = "greeter"
            tasks = ["Greet Ada.", "Greet Bob."]
            command = ["python", "my_agent.py"]

            def compute_reward(self, task, outcome):
                return float(task.split()[-1] in outcome)

    A gateway in the environment's process stands between the agent and the servers of `--openai.base_url`, and records what
    the agent samples. What an agent sends and how it rewrites its history is its own affair; docs/agents.md says what
    becomes of it.

    Attributes:
        tasks (`Sequence`):
            What is attempted, in this order, and again from the beginning. Each is something that JSON can hold.
        command (`Sequence[str]`, *optional*):
            Runs the agent. It finds the task as JSON on its standard input, and the base URL and a key where the SDKs of
            OpenAI and Anthropic look for them: `OPENAI_BASE_URL`, `OPENAI_API_KEY`, `ANTHROPIC_BASE_URL`, `ANTHROPIC_API_KEY`.
            What it writes to its standard output is the outcome.
        gateway_options ([`GatewayOptions`]):
            What agents may do. Under a launch, the trainer's temperature takes the place of the default.

    Where a session branched or turns have rewards, advantages are computed here, as `--env.scale_rewards` says; under a launch its
    default is the trainer's `--scale_rewards`.
    """

    env_config_cls = AgentEnvConfig
    tasks: Sequence[Any] = ()
    command: Sequence[str] = ()
    gateway_options: ClassVar[GatewayOptions] = GatewayOptions()

    @classmethod
    def config_init(cls) -> tuple[AgentEnvConfig, list[APIServerConfig]]:
        """Return the defaults, which `--env.*` and `--openai.*` change."""
        config = AgentEnvConfig(
            wandb_name=cls.name,
            use_wandb=False,
            group_size=8,
            max_token_length=2048,
            total_steps=-1,  # as many as the trainer registers
            steps_per_eval=0,
            max_batches_offpolicy=1,
            # Atropos compares the rewards of the rollouts of a group, which need not be of one task where agents branch.
            ensure_scores_are_not_same=False,
        )
        return config, [APIServerConfig(server_type="vllm", base_url="http://127.0.0.1:9001/v1", api_key="x")]

    async def run_agent(self, task: Any, base_url: str) -> Any:
        """Attempt a task with the model at this base URL; return what `compute_reward` needs.

        Runs `command`, unless a subclass does it itself. `base_url` is that of an OpenAI client; an Anthropic client takes it
        without its `/v1`.

        Raises:
            EpisodeError: The command failed.
        """
        if not self.command:
            raise EpisodeError(
                f"{type(self).__name__} has neither `command` nor `run_agent`.",
                "One of them runs the agent.",
                "Set `command`, or write `async def run_agent(self, task, base_url)`.",
            )
        # The last part of the URL's path but `/v1` is the secret of the session: a key as good as any.
        without_v1 = base_url.removesuffix("/v1")
        key = without_v1.rpartition("/")[2]
        variables = {
            **os.environ,
            **{"OPENAI_BASE_URL": base_url, "OPENAI_API_KEY": key},
            **{"ANTHROPIC_BASE_URL": without_v1, "ANTHROPIC_API_KEY": key},
        }
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *self.command, stdin=pipe, stdout=pipe, stderr=pipe, env=variables
            )
        except OSError as exc:
            raise EpisodeError(
                f"{' '.join(self.command)} cannot be started: {exc}.",
                "It is the agent.",
                "Correct `command`: a program on the path, or its file, and its arguments.",
            ) from exc
        try:
            output, errors = await process.communicate(json.dumps(task).encode())
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            raise EpisodeError(
                f"{' '.join(self.command)} ended with exit code {process.returncode}: "
                f"{errors.decode(errors='replace')[-MAX_QUOTED_CHARS:]}.",
                "The agent itself failed.",
                "Mend the agent, or let it end with 0 and have `compute_reward` judge what it wrote.",
            )
        return output.decode(errors="replace")

    def compute_reward(self, task: Any, outcome: Any) -> float | None:
        """Return the reward of an attempt, a finite number; None if only turns have rewards.

        Args:
            task (`Any`):
                Of `tasks`.
            outcome (`Any`):
                What `run_agent` returned.
        """
        raise NotImplementedError(f"{type(self).__name__} needs `compute_reward(self, task, outcome)`.")

    def compute_turn_rewards(self, task: Any, outcome: Any, replies: Sequence[dict[str, Any]]) -> Mapping[int, float]:
        """Return rewards of single turns, finite numbers by index; none, unless a subclass has some.

        Args:
            task (`Any`):
                Of `tasks`.
            outcome (`Any`):
                What `run_agent` returned.
            replies (`Sequence[dict]`):
                What the policy answered, turn after turn, as messages of chat completions.
        """
        return {}

    async def setup(self) -> None:
        """Start the gateway in front of the servers.

        Raises:
            PreflightError: There is no task, a server cannot be used, or a launch tells what cannot be followed: no temperature, or
                a `--scale_rewards` that needs a whole batch.
        """
        if not self.tasks:
            raise PreflightError(
                f"{type(self).__name__} has no `tasks`.",
                "They are what its agent attempts.",
                "Set `tasks` to a sequence.",
            )
        config = self.config
        servers = [server.config for server in self.server.servers]
        keys = {server.api_key for server in servers}
        options = with_temperature_of_trainer(self.gateway_options, os.environ)
        self.num_tasks = 0
        is_scaled = divides_by_deviation(config.scale_rewards, os.environ)
        self.groups = GroupMaker(config.group_size, options.temperature, is_scaled)
        self.gateway = Gateway(
            [server.base_url for server in servers], options, keys.pop() if len(keys) == 1 else None
        )
        await self.gateway.__aenter__()
        directory = os.environ.get(COUNTS_VARIABLE)
        self.counts_file = CountsFile(self.gateway.counts, Path(directory)) if directory else None
        if self.counts_file is not None:
            self.keeping_counts = asyncio.create_task(self.counts_file.keep())

    async def get_next_item(self) -> Any:
        """Return the next task."""
        self.num_tasks += 1
        return self.tasks[(self.num_tasks - 1) % len(self.tasks)]

    async def collect_trajectories(self, item: Any) -> tuple[list[ScoredDataGroup], list[Any]]:
        """Attempt a task `group_size` times at once; return the groups that are ready.

        Raises:
            EpisodeError: An attempt failed. Atropos logs it and goes on with another task.
        """
        limits = [self.config.max_token_length, *([self.max_token_len - 1] if self.max_token_len > 0 else [])]
        self.gateway.recorder.max_rollout_tokens = min(limits)
        attempts = [asyncio.create_task(self.attempt(item)) for _ in range(self.config.group_size)]
        try:
            sessions = await asyncio.gather(*attempts)
        except asyncio.CancelledError:
            # Atropos gives the task up for now, and comes back to it.
            raise
        except BaseException:
            self.gateway.counts.num_groups_lost += 1
            raise
        finally:
            # When one fails the group is lost, and the others would only keep the servers busy.
            for attempt in attempts:
                attempt.cancel()
        return self.groups.add(sessions), []

    async def attempt(self, task: Any) -> FinishedSession:
        """Run the agent once, in a session of its own.

        Raises:
            EpisodeError: It failed, took too long, or asked nothing.
        """
        async with self.gateway.session() as session:
            try:
                outcome = await asyncio.wait_for(self.run_agent(task, session.base_url), self.config.agent_timeout_s)
            except asyncio.TimeoutError as exc:
                raise EpisodeError(
                    f"The agent did not end within {self.config.agent_timeout_s:g} s.",
                    "It loops, or waits for a server that is paused or overloaded.",
                    "Let it end by itself, or raise --env.agent_timeout_s.",
                ) from exc
            reward = self.compute_reward(task, outcome)
            if reward is not None:
                session.reward = reward
            for turn, of_turn in self.compute_turn_rewards(task, outcome, session.replies).items():
                session.reward_turn(turn, of_turn)
        return session.finished()

    async def _send_scored_data_to_api(self, scored_data: Any) -> None:
        """Send groups as every environment does, and count those that Atropos gives up because the API does not answer."""
        is_answered = False
        try:
            await super()._send_scored_data_to_api(scored_data)
            is_answered = True
        finally:
            if not is_answered:
                self.gateway.counts.num_groups_lost += num_groups_of(scored_data)

    @contextlib.asynccontextmanager
    async def _post_json_with_compression(
        self, session: Any, url: str, payload: Any, **kwargs: Any
    ) -> AsyncIterator[Any]:
        """Post groups as every environment does, and count those that the API took, and those that it refused."""
        async with super()._post_json_with_compression(session, url, payload, **kwargs) as response:
            if response.status < 400:
                self.gateway.counts.num_groups_sent += num_groups_of(payload)
            elif response.status < 500:
                # Atropos does not send them again.
                self.gateway.counts.num_groups_lost += num_groups_of(payload)
            if self.counts_file is not None:
                # The last step of a run may be waiting for this group alone.
                self.counts_file.write()
            yield response

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing, unless a subclass does: `steps_per_eval` is 0."""


def num_groups_of(scored_data: Any) -> int:
    """How many groups a post has: it is a list of them, or one."""
    return len(scored_data) if isinstance(scored_data, list) else 1
