"""A shim for what SGLang says of its answers and Atropos drops."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from ...types import IGNORE_INDEX
from ...wire.rollout_key import RememberedCalls, oldest_of_calls, oldest_version, span_keys
from .shim import Shim


_ANSWERS: ContextVar[list[Any] | None] = ContextVar("_ANSWERS", default=None)
"""Where answers are put while SGLang is asked for tokens; None while it is not."""


class PolicyVersion(Shim):
    """The policy that sampled a rollout, with every group that SGLang's tokens are in."""

    name = "policy_version"
    why = (
        "SGLang answers which policy sampled each token; Atropos drops that, and the trainer cannot ask for it later."
    )
    upstream = "atroposlib/envs/server_handling/sglang_server.py: SGLangServer._tokens_and_logprobs_completion_wrapper"

    def install(self) -> None:
        """Remember the versions of SGLang's answers, and send them as `policy_version` in `group_overrides`."""
        import aiohttp
        from atroposlib.envs.base import BaseEnv
        from atroposlib.envs.server_handling.sglang_server import SGLangServer

        sampled: RememberedCalls[int] = RememberedCalls()
        response_class: Any = aiohttp.ClientResponse
        read, ask, send = (
            response_class.json,
            SGLangServer._tokens_and_logprobs_completion_wrapper,
            BaseEnv.handle_send_to_api,
        )

        # The client makes its session and takes its answer apart within one method.
        @functools.wraps(read)
        async def json(response: Any, *args: Any, **kwargs: Any) -> Any:
            answer = await read(response, *args, **kwargs)
            if (answers := _ANSWERS.get()) is not None:
                answers += answer if isinstance(answer, list) else [answer]
            return answer

        @functools.wraps(ask)
        async def tokens_and_logprobs(server: Any, **kwargs: Any) -> Any:
            answers: list[Any] = []
            token = _ANSWERS.set(answers)
            try:
                found = await ask(server, **kwargs)
            finally:
                _ANSWERS.reset(token)
            prompt_ids, completions, *_ = found
            for completion_ids, answer in zip(completions, answers, strict=True):
                version = oldest_version(answer.get("meta_info", {}).get("weight_versions"))
                if version is not None:
                    sampled.note(prompt_ids, completion_ids, version)
            return found

        @functools.wraps(send)
        async def handle_send_to_api(env: Any, scored_data: Any, *args: Any, **kwargs: Any) -> None:
            for group in scored_data if isinstance(scored_data, list) else [scored_data]:
                self._add_versions(group or {}, sampled)
            await send(env, scored_data, *args, **kwargs)

        response_class.json = json
        SGLangServer._tokens_and_logprobs_completion_wrapper = tokens_and_logprobs
        BaseEnv.handle_send_to_api = handle_send_to_api

    def _add_versions(self, group: Any, sampled: RememberedCalls[int]) -> None:
        of_group = group.get("group_overrides") or {}
        if "policy_version" in of_group:
            return
        versions = [
            _version(tokens, masks, sampled)
            for tokens, masks in zip(group.get("tokens") or [], group.get("masks") or [], strict=False)
        ]
        if any(version is not None for version in versions):
            self.acts(f"a group says which policies sampled it, {versions}")
            group["group_overrides"] = {**of_group, "policy_version": versions}


def _version(tokens: Sequence[int], masks: Sequence[int], sampled: RememberedCalls[int]) -> int | None:
    """The oldest policy that sampled any trained token of a rollout; None where that of any run of them is unknown."""
    return oldest_of_calls(map(sampled.find, span_keys(tokens, _trained_spans(masks))))


def _trained_spans(masks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of trained tokens: the first token of each and the one after its last."""
    for is_trained, run in itertools.groupby(range(len(masks)), key=lambda i: masks[i] != IGNORE_INDEX):
        if is_trained:
            indices = list(run)
            yield indices[0], indices[-1] + 1
