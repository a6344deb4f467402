"""A gateway inside of a program: its sessions, its address, and the agents behind it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any

import uvicorn

from ..errors import EpisodeError, PreflightError
from ..network import listening_socket
from ..serving.asgi import ASGIApp
from .app import AgentApp
from .counts import GatewayCounts
from .groups import FinishedSession, rollouts_of
from .options import GatewayOptions
from .passing import PassThrough
from .recorder import Recorder
from .servers import InferenceServers
from .sessions import Session, Sessions


logger = logging.getLogger(__name__)

SWEEP_INTERVAL_S = 1.0
START_INTERVAL_S = 0.005
CLOSE_TIMEOUT_S = 5
BACKLOG = 2048

KEEP_CONNECTION_S = 75
"""So long a connection of an agent may idle, between calls of its tools: longer than clients keep one, so that none is closed
in the moment in which it is used.
"""


class GatewaySession:
    """A session, as the program has it that runs the agent.

    Args:
        session ([`Session`]):
            What is recorded.
        address (`str`):
            URL of the gateway, without a path.
    """

    def __init__(self, session: Session, address: str):
        self.recorded = session
        self.base_url = f"{address}/session/{session.id}/v1"
        """What the agent gets as the base URL of an OpenAI client. Whoever knows it is the agent."""
        self.anthropic_base_url = f"{address}/session/{session.id}"
        """The same for an Anthropic client, which adds `/v1` itself."""

    @property
    def id(self) -> str:
        """The secret in the URL. It can also be given as the API key, with `/v1` of the gateway as the base URL."""
        return self.recorded.id

    @property
    def reward(self) -> float | None:
        """The reward of the whole session; None until it was set."""
        return self.recorded.reward

    @reward.setter
    def reward(self, value: float) -> None:
        self.recorded.give_reward(value)

    def reward_turn(self, turn: int | str, value: float) -> None:
        """Give one turn a reward of its own, beside that of the session or in its place; a later one takes its place.

        The advantage of a turn is then made of its reward and of those after it: [`~gateway.groups.turn_advantages`].

        Args:
            turn (`int` or `str`):
                Its index in `replies`, or the id of its answer.
            value (`float`):
                Finite.

        Raises:
            RequestRefused: The reward is no finite number, or there is no such turn.
            EpisodeError: `finished` was called before.
        """
        self.recorded.give_reward(value, turn)

    @property
    def replies(self) -> list[dict[str, Any]]:
        """What was answered, turn after turn, as messages of chat completions."""
        return [turn.message for turn in self.recorded.turns]

    def finished(self) -> FinishedSession:
        """What a group needs of it. It takes no reward after that.

        Raises:
            EpisodeError: It has no reward, or the agent asked nothing.
        """
        return finished(self.recorded)


class Gateway:
    """Stands in front of inference servers and records what agents sample.

        async with Gateway(["http://127.0.0.1:9001"]) as gateway:
            async with gateway.session() as session:
                answer = await run_agent(base_url=session.base_url)
                session.reward = compute_reward(answer)
            rollouts = session.finished().rollouts

    Agents reach answers in the dialects of their SDKs and the name of the model, and nothing else of the servers.

    Args:
        servers (`Sequence[str]`):
            URLs of servers of the same model, all of them vLLM or all SGLang.
        options ([`GatewayOptions`], *optional*):
            What agents may do.
        api_key (`str`, *optional*):
            The key of the servers.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Where agents reach it.
        port (`int`, *optional*, defaults to `0`):
            0 is any free one.
        environment_key (`str`, *optional*):
            Who shows it as an API key may generate on the servers without a session: environments that record for
            themselves. Without it nobody may.
    """

    def __init__(
        self,
        servers: Sequence[str],
        options: GatewayOptions | None = None,
        api_key: str | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        environment_key: str | None = None,
    ):
        self.options = options or GatewayOptions()
        self.counts = GatewayCounts()
        self.servers = InferenceServers(servers, api_key, self.options.server_wait_s)
        self.sessions = Sessions(self.options, self.counts)
        self.recorder = Recorder(self.servers, self.options, self.counts)
        self.environments = (
            None if environment_key is None else PassThrough(self.servers, environment_key, self.options, self.counts)
        )
        self.app = AgentApp(self.sessions, self.recorder, self.environments)
        self.served: ASGIApp = self.app
        """What listens: the routes of agents, unless control routes are put around them before it starts."""
        self.host, self.port = host, port
        self.address = ""
        """Its URL, without a path, once it listens."""
        self._uvicorn: uvicorn.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Gateway:
        """Ask the servers what they serve, and listen.

        Raises:
            PreflightError: A server cannot be used, or the address is taken.
        """
        listener = _listen(self.host, self.port)
        host, port = listener.getsockname()[:2]
        self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        try:
            await self.servers.start()
        except PreflightError:
            listener.close()
            raise
        self._uvicorn = _QuietServer(
            uvicorn.Config(
                self.served,
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_keep_alive=KEEP_CONNECTION_S,
                timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
            )
        )
        self._tasks = [
            asyncio.create_task(self._uvicorn.serve(sockets=[listener])),
            asyncio.create_task(self._sweep()),
        ]
        while not self._uvicorn.started:
            await asyncio.sleep(START_INTERVAL_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Answer no more, and let go of the servers."""
        assert self._uvicorn is not None
        serving, sweeping = self._tasks
        sweeping.cancel()
        self._uvicorn.should_exit = True
        await serving
        await self.servers.close()

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[GatewaySession]:
        """Open a session, and end it with the block. What is asked later is refused. A block that raises gives it up.

        Raises:
            RequestRefused: Too many are open.
        """
        session = self.sessions.begin()
        try:
            yield GatewaySession(session, self.address)
        except BaseException:
            self.counts.num_sessions_discarded += 1
            raise
        finally:
            self.sessions.end(session)

    def status(self) -> dict[str, Any]:
        """What it has done and does, for JSON."""
        servers = [
            {"url": server.url, "is_there": server.is_there, "num_in_flight": server.num_in_flight}
            for server in self.servers.servers
        ]
        return {
            **self.counts.values(),
            "num_open_sessions": len(self.sessions),
            "num_in_flight": self.sessions.num_in_flight,
            "num_moves": self.servers.num_moves,
            "num_resent": self.servers.num_resent,
            "servers": servers,
        }

    async def _sweep(self) -> None:
        """Give up sessions that idle."""
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            for session in self.sessions.idle():
                logger.warning("event=session_idle num_turns=%d idle_s=%g", len(session.turns), self.options.idle_s)
                self.counts.num_sessions_discarded += 1
                self.sessions.end(session)


class _QuietServer(uvicorn.Server):
    """A server inside of a program: signals are that program's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


def finished(session: Session) -> FinishedSession:
    """What a group needs of a session that ended.

    Raises:
        EpisodeError: It has no reward, or the agent asked nothing.
    """
    check_finished(session)
    session.is_finished = True
    return FinishedSession(rollouts_of(session.turns), session.rewards())


def check_finished(session: Session) -> None:
    """Refuse a session that cannot become a part of a group.

    Raises:
        EpisodeError: It has no reward, or the agent asked nothing.
    """
    if session.reward is None and not session.turn_rewards:
        raise EpisodeError(
            f"A session with {len(session.turns)} turns has no reward.",
            "A group compares the rewards of its sessions.",
            "Set the reward of the session or of its turns, also where the agent failed.",
        )
    if not session.turns:
        raise EpisodeError(
            "An agent ended without one answer of the policy.",
            "It did not ask the base URL of its session, or all its requests were refused.",
            "Pass base_url to the agent's client, and look at the gateway's log for refusals.",
        )


def _listen(host: str, port: int) -> socket.socket:
    try:
        return listening_socket(host, port, backlog=BACKLOG)
    except OSError as exc:
        raise PreflightError(
            f"The gateway cannot listen on {host}:{port}: {exc.strerror or exc}.",
            "The port is taken, or the address is not of this machine.",
            "Choose others with --host and --port.",
        ) from exc
