"""A shim for what environments send."""

from __future__ import annotations

import functools
import numbers
from typing import Any

from .shim import Shim


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
