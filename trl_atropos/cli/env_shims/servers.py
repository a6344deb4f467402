"""A shim that ends what could not work."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from ...errors import PreflightError
from .shim import Shim


class ServerType(Shim):
    """An error for an environment whose server cannot return tokens, instead of an endless repetition."""

    name = "server_type"
    why = "With server_type openai, the default, every group of a ManagedServer environment fails, and it tries for ever."
    upstream = "atroposlib/envs/server_handling/server_manager.py: ServerManager.managed_server"

    def install(self) -> None:
        """End the process when `managed_server` refuses the configured server."""
        from atroposlib.envs.server_handling.server_manager import ServerManager

        original = ServerManager.managed_server

        @functools.wraps(original)
        @asynccontextmanager
        async def managed_server(manager: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            async with AsyncExitStack() as stack:
                try:
                    managed = await stack.enter_async_context(original(manager, *args, **kwargs))
                except NotImplementedError as exc:
                    error = PreflightError(
                        "This environment uses ManagedServer, and its server has server_type openai.",
                        "Such a server returns text without token ids and logprobs, so that no group would ever be "
                        "delivered.",
                        "Pass --openai.server_type vllm and the --openai.base_url of a vLLM server with the "
                        "GenerateEndpoint middleware.",
                    )
                    self.acts("the environment ends, because it would only repeat this error")
                    # Environments log every Exception of a group and try the next one.
                    raise SystemExit(f"{type(error).__name__}: {error}") from exc
                yield managed

        ServerManager.managed_server = managed_server
