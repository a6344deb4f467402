"""Shims for what environments send."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Awaitable, Callable
from typing import Any

from .shim import Shim


class Score(Shim):
    """The `score` of a file, called."""

    name = "score"
    why = "A file whose collect_trajectories returns what its score takes sends nothing: Atropos calls no score."
    upstream = "atroposlib/envs/base.py: BaseEnv.handle_env; environments/infinimath/infinimath_env.py"

    def install(self) -> None:
        """Score trajectories that come from `postprocess_histories` as they are."""
        from atroposlib.envs.base import BaseEnv

        original = BaseEnv.__init__

        @functools.wraps(original)
        def init(env: Any, *args: Any, **kwargs: Any) -> None:
            original(env, *args, **kwargs)
            env.postprocess_histories = self._scoring(env, env.postprocess_histories)

        BaseEnv.__init__ = init

    def _scoring(self, env: Any, postprocess: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
        @functools.wraps(postprocess)
        async def postprocess_histories(trajectories: Any) -> Any:
            found = await postprocess(trajectories)
            if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], list):
                # As `collect_trajectories` returns them, with a backlog.
                found = found[0]
            if not isinstance(found, list) or not found or not hasattr(env, "score"):
                return found
            if any(one is None or (isinstance(one, dict) and "scores" in one) for one in found):
                return found
            self.acts(f"{type(env).__name__}.score scores what its collect_trajectories returned")
            return await env.score(found)

        return postprocess_histories


class RolloutAdvantages(Shim):
    """One advantage a token, where a file has one a rollout."""

    name = "advantages"
    why = "The API refuses a group with one advantage a rollout (422): it takes one a token."
    upstream = "atroposlib/api/server.py: ScoredData.advantages; environments/sft_loader_server.py"

    def install(self) -> None:
        """Repeat each advantage for all tokens of its rollout before a group is sent."""
        from atroposlib.envs.base import BaseEnv

        original = BaseEnv.handle_send_to_api

        @functools.wraps(original)
        async def handle_send_to_api(env: Any, scored_data: Any, *args: Any, **kwargs: Any) -> None:
            for group in scored_data if isinstance(scored_data, list) else [scored_data]:
                self._spread(group or {})
            await original(env, scored_data, *args, **kwargs)

        BaseEnv.handle_send_to_api = handle_send_to_api

    def _spread(self, group: Any) -> None:
        advantages = group.get("advantages") or []
        if advantages and all(isinstance(advantage, numbers.Real) for advantage in advantages):
            self.acts(f"an advantage of {advantages[0]:g} counts for each token of its rollout")
            group["advantages"] = [
                [float(advantage)] * len(tokens) for advantage, tokens in zip(advantages, group["tokens"], strict=True)
            ]
