"""One Atropos environment for every source: episodes become rollouts with the exact tokens that the server sampled."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Any, TypeVar

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataGroup
from pydantic import Field

from ..errors import EpisodeError
from .source import EnvironmentEpisode, EnvironmentSource


logger = logging.getLogger(__name__)

Message = dict[str, str]
T = TypeVar("T")

TEMPERATURE = 1.0
"""Of the policy that is trained: the trainer computes its logprobs at it."""

TURN_MARGIN = 8
"""Tokens that are kept free between turns, for what the chat template and ManagedServer put behind an answer."""


class SourceEnvConfig(BaseEnvConfig):
    """Options of the environment beside those of every environment."""

    system_prompt: str = Field(default="", description="System message before every conversation; empty: none")
    max_turns: int = Field(default=16, description="Answers of the policy in one episode, at most")
    max_turn_tokens: int = Field(default=256, description="Tokens of one answer, at most")
    num_eval_episodes: int = Field(default=64, description="Episodes of one evaluation")


def _close(opening: asyncio.Task[EnvironmentEpisode]) -> None:
    """Close an episode that nobody waits for any more."""
    if opening.exception() is None:
        opening.result().close()


class SourceEnv(BaseEnv):
    """Groups of a source: each task is attempted `group_size` times, and every attempt is one rollout.

    A rollout holds the whole conversation. What the policy sampled is trained with the logprobs that the server gave;
    everything else (prompts, observations, what the chat template adds) is masked, also between turns. Its reward is the
    sum over its turns.

    An episode ends by its own rules, after `max_turns`, or when the next answer would not fit into `max_token_length` or
    into what the trainer takes. It keeps its rewards then, and the first such end is logged. Where an answer is cut off by
    its number of tokens the rollout has no end-of-sequence token, which is what `mask_truncated_completions` of the
    trainer looks at.

    Subclasses set `source` and `name`: see [`make_environment`].
    """

    env_config_cls = SourceEnvConfig
    source: EnvironmentSource

    @classmethod
    def config_init(cls) -> tuple[SourceEnvConfig, list[APIServerConfig]]:
        """Return the defaults, which `--env.*` and `--openai.*` change."""
        config = SourceEnvConfig(
            wandb_name=cls.name,
            use_wandb=False,
            group_size=8,
            max_token_length=2048,
            total_steps=-1,  # as many as the trainer registers
            steps_per_eval=0,
            max_batches_offpolicy=1,
        )
        return config, [APIServerConfig(server_type="vllm", base_url="http://127.0.0.1:9001/v1")]

    async def setup(self) -> None:
        """Begin with the first task."""
        self.num_tasks = 0
        self.has_told_of_a_cut = False
        limit = self.source.max_episodes
        self.slots = asyncio.Semaphore(limit) if limit is not None else None
        # For `wandb_log`, as in upstream's files.
        self.eval_metrics: list[tuple[str, float]] = []

    async def get_next_item(self) -> Any:
        """Return the next task."""
        self.num_tasks += 1
        return self.source.make_task(self.num_tasks - 1)

    async def collect_trajectories(self, item: Any) -> tuple[ScoredDataGroup, list[Any]]:
        """Attempt a task `group_size` times.

        Raises:
            [`EpisodeError`]: An episode cannot become one rollout. Atropos logs it and goes on with another task.
        """
        if self.source.is_single_turn:
            rollouts = await self._answer(item, self.config.group_size)
        else:
            rollouts = await self._play_all(item)
        group = ScoredDataGroup(tokens=[], masks=[], scores=[], inference_logprobs=[], messages=[])
        for node, reward, messages in rollouts:
            group["tokens"].append(node.tokens)
            group["masks"].append(node.masked_tokens)
            group["scores"].append(reward)
            group["inference_logprobs"].append(node.logprobs)
            group["messages"].append(messages)
        return group, []

    async def _play_all(self, task: Any) -> list[tuple[Any, float, list[Message]]]:
        attempts = [asyncio.create_task(self._play(task)) for _ in range(self.config.group_size)]
        try:
            return await asyncio.gather(*attempts)
        finally:
            # When one fails the group is lost, and the others would only keep the server busy.
            for attempt in attempts:
                attempt.cancel()

    async def _answer(self, task: Any, num_answers: int) -> list[tuple[Any, float, list[Message]]]:
        """Single turn: all answers to a task in one request, so that the server reads the prompt once."""
        async with self._opened(task) as attempt:
            messages = self._first_messages(attempt)
        max_tokens = self._num_free_tokens(messages)
        if max_tokens < 1:
            raise self._too_long(messages)
        async with self.server.managed_server(tokenizer=self.tokenizer) as managed:
            answers = await managed.chat_completion(
                messages=messages, n=num_answers, max_tokens=max_tokens, temperature=TEMPERATURE
            )
            nodes = managed.get_state()["nodes"]
        rollouts = []
        for node, choice in zip(nodes, answers.choices, strict=True):
            text = choice.message.content
            async with self._opened(task) as attempt:
                reward = (await self._call(attempt.step, text)).reward
            rollouts.append((node, reward, [*messages, {"role": "assistant", "content": text}]))
        return rollouts

    async def _play(self, task: Any) -> tuple[Any, float, list[Message]]:
        """Several turns: one conversation until the episode ends or has no room."""
        reward = 0.0
        async with self._opened(task) as attempt:
            messages = self._first_messages(attempt)
            # One for each conversation: it finds the one that a prompt goes on with by its text.
            async with self.server.managed_server(tokenizer=self.tokenizer) as managed:
                for turn in range(self.config.max_turns):
                    max_tokens = self._num_free_tokens(messages, managed)
                    if max_tokens < 1:
                        if turn == 0:
                            raise self._too_long(messages)
                        self._tell_of_a_cut(
                            f"after {turn} turns for lack of tokens, of which it may have {self._limit}"
                        )
                        messages.pop()
                        break
                    answers = await managed.chat_completion(
                        messages=messages, n=1, max_tokens=max_tokens, temperature=TEMPERATURE
                    )
                    text = answers.choices[0].message.content
                    messages.append({"role": "assistant", "content": text})
                    step = await self._call(attempt.step, text)
                    reward += step.reward
                    if step.observation is None:
                        break
                    if turn + 1 == self.config.max_turns:
                        self._tell_of_a_cut(f"after --env.max_turns {self.config.max_turns}")
                    else:
                        messages.append({"role": "user", "content": step.observation})
                nodes = managed.get_state()["nodes"]
        if len(nodes) != 1:
            raise EpisodeError(
                f"A conversation of {self.name} fell into {len(nodes)} sequences of tokens.",
                "The chat template writes earlier turns anew, for example without white space or thoughts, so that the "
                "tokens that were sampled are not those of the next prompt.",
                "Take a tokenizer whose chat_template repeats earlier turns as they are, or set --env.max_turns 1.",
            )
        return nodes[0], reward, messages

    async def _call(self, function: Callable[..., T], *args: Any) -> T:
        """Call a method of the source or of an episode."""
        return await asyncio.to_thread(function, *args) if self.source.runs_elsewhere else function(*args)

    @asynccontextmanager
    async def _opened(self, task: Any) -> AsyncIterator[EnvironmentEpisode]:
        """An episode of a task, which is closed in any case. Waits until the source may open one."""
        async with self.slots or nullcontext(), self._opened_now(task) as attempt:
            yield attempt

    @asynccontextmanager
    async def _opened_now(self, task: Any) -> AsyncIterator[EnvironmentEpisode]:
        opening = asyncio.create_task(self._call(self.source.open, task))
        try:
            attempt = await asyncio.shield(opening)
        except asyncio.CancelledError:
            # Its thread cannot be stopped, and nobody else would close what it returns.
            opening.add_done_callback(_close)
            raise
        try:
            yield attempt
        finally:
            await self._call(attempt.close)

    def _first_messages(self, attempt: EnvironmentEpisode) -> list[Message]:
        """What the policy sees first. A system message of the environment's own goes on with `system_prompt`'s."""
        messages = [dict(message) for message in attempt.messages]
        if not self.config.system_prompt:
            return messages
        if messages[0]["role"] == "system":
            messages[0]["content"] = f"{self.config.system_prompt}\n\n{messages[0]['content']}"
            return messages
        return [{"role": "system", "content": self.config.system_prompt}, *messages]

    @property
    def _limit(self) -> int:
        """Tokens that a rollout may have. Atropos drops groups with one that reaches what the trainer registered."""
        limits = [self.config.max_token_length, *([self.max_token_len - 1] if self.max_token_len > 0 else [])]
        return min(limits)

    def _num_free_tokens(self, messages: list[Message], managed: Any = None) -> int:
        """Tokens that the next answer may have."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        used = len(self.tokenizer.encode(text))
        nodes = managed.get_state()["nodes"] if managed else []
        if nodes:
            # Text that is encoded at once may have fewer tokens than what was sampled.
            suffix = self.tokenizer.encode(text[len(nodes[0].full_text) :], add_special_tokens=False)
            used = max(used, len(nodes[0].tokens) + len(suffix))
        return min(self.config.max_turn_tokens, self._limit - used - TURN_MARGIN)

    def _too_long(self, messages: list[Message]) -> EpisodeError:
        return EpisodeError(
            f"A prompt of {self.name} has {sum(len(message['content']) for message in messages)} characters, and no token "
            f"is left for an answer of the {self._limit} that a rollout may have.",
            "Prompt and answers together count.",
            "Raise --max_length of the trainer and --env.max_token_length, or make the task smaller with --args.",
        )

    def _tell_of_a_cut(self, how: str) -> None:
        if not self.has_told_of_a_cut:
            self.has_told_of_a_cut = True
            logger.warning(
                "An episode of %s was ended %s, not by its own rules; it keeps the rewards that it had. This is said once.",
                self.name,
                how,
            )

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Play episodes of the evaluation split and log their mean reward, as Atropos logs evaluations."""
        if not self.source.has_eval_split:
            logger.warning("%s has no evaluation split, so nothing is evaluated.", self.name)
            return
        tasks = [self.source.make_task(number, is_eval=True) for number in range(self.config.num_eval_episodes)]
        rewards = await asyncio.gather(*map(self._evaluate, tasks))
        mean = sum(rewards) / len(rewards)
        logger.info("%s: mean reward %.4f in %d evaluation episodes", self.name, mean, len(rewards))
        self.eval_metrics.append(("eval/mean_reward", mean))
        if self.config.data_dir_to_save_evals is not None:
            await self.evaluate_log({"eval/mean_reward": mean})

    async def _evaluate(self, task: Any) -> float:
        rollouts = await self._answer(task, 1) if self.source.is_single_turn else [await self._play(task)]
        return rollouts[0][1]

    async def wandb_log(self, wandb_metrics: dict[str, Any] | None = None) -> None:
        """Log the last evaluation with the rest."""
        metrics = {**(wandb_metrics or {}), **dict(self.eval_metrics)}
        self.eval_metrics = []
        await super().wandb_log(metrics)


def make_environment(name: str, source: EnvironmentSource) -> type[SourceEnv]:
    """Return the environment of a source, as a class with the command line of Atropos (`cli()`).

    Args:
        name (`str`):
            What it registers as, such as `textarena:Sudoku-v0`.
        source ([`EnvironmentSource`]):
            Where its tasks come from.
    """
    return type("SourceEnv", (SourceEnv,), {"name": name, "source": source, "__doc__": f"Groups of {name}."})
