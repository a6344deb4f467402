"""`trl-atropos gateway` between agents and the real API: sessions over HTTP, and what a trainer gets of them."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import requests
from gateway_agents import ask, client, user
from token_server import TokenServer
from trajectory_api import served

from trl_atropos.api.options import ApiOptions
from trl_atropos.gateway.control import ControlApp
from trl_atropos.gateway.gateway import Gateway
from trl_atropos.gateway.groups import GroupMaker
from trl_atropos.gateway.options import GatewayOptions
from trl_atropos.gateway.posting import GroupPoster
from trl_atropos.wire.parse import WireLimits, parse_batch


KEY = "the key"
REGISTRATION = {
    **{"wandb_group": "test", "wandb_project": "test", "batch_size": 2, "max_token_len": 1000, "checkpoint_dir": ""},
    **{"save_checkpoint_interval": 0, "starting_step": 0, "num_steps": 10},
}


@pytest.fixture
def api_url(tmp_path: Path) -> Iterator[str]:
    with served(ApiOptions(tmp_path / "api.db")) as (url, _):
        requests.post(f"{url}/register", json=REGISTRATION, timeout=10).raise_for_status()
        yield url


class Control:
    """Whoever runs agents."""

    def __init__(self, http: aiohttp.ClientSession, address: str, gateway: Gateway):
        self.http, self.address, self.gateway = http, address, gateway

    async def post(self, path: str, status: int = 200, key: str = KEY, **body: Any) -> Any:
        headers = {"Authorization": f"Bearer {key}"}
        async with self.http.post(self.address + path, json=body, headers=headers) as response:
            assert response.status == status, await response.text()
            return await response.json()

    async def get(self, path: str, status: int = 200, key: str = KEY) -> str:
        async with self.http.get(self.address + path, headers={"Authorization": f"Bearer {key}"}) as response:
            assert response.status == status
            return await response.text()


@asynccontextmanager
async def controlled(server: TokenServer, api_url: str, **options: Any) -> AsyncIterator[Control]:
    gateway = Gateway([server.url], GatewayOptions(**options))
    poster = GroupPoster(api_url, gateway.counts)
    gateway.served = ControlApp(gateway, poster, GroupMaker(2, 1.0), KEY)
    posting = asyncio.create_task(poster.run())
    async with gateway, aiohttp.ClientSession() as http:
        yield Control(http, gateway.address, gateway)
        await asyncio.wait_for(poster.join(), 20)
    posting.cancel()


def test_a_group_of_sessions_becomes_a_batch_of_a_trainer(api_url: str):
    async def run() -> None:
        async with controlled(server, api_url) as control:
            sessions = [await control.post("/session", 201, group="task 1") for _ in range(2)]
            for number, session in enumerate(sessions):
                assert session["anthropic_base_url"] == f"{control.address}/session/{session['session_id']}"
                messages = [user("tell")]
                for _ in range(2):
                    await ask(session["base_url"], messages)
                    messages.append(user("more"))
                await control.post(f"/session/{session['session_id']}/reward", reward=5.0)
                finished = await control.post(f"/session/{session['session_id']}/finish", reward=float(number))
                assert finished == {"status": "finished", "num_finished": number + 1, "is_group_whole": number == 1}
            await control.post(f"/session/{sessions[0]['session_id']}/finish", 404, reward=1.0)
        assert control.gateway.counts.num_groups_sent == 1

    with TokenServer() as server:
        server.replies = ["one", "two"] * 2
        asyncio.run(run())
        num_sampled = 2 * (len("one") + 1 + len("two") + 1)
    raw = requests.get(f"{api_url}/batch", timeout=10).json()["batch"]
    batch = parse_batch(raw, WireLimits(vocab_size=1000, max_length=1000))
    assert batch.rejected == ()
    (group,) = batch.groups
    assert [rollout.reward for rollout in group.rollouts] == [0.0, 1.0]
    assert [rollout.policy_version for rollout in group.rollouts] == [3, 3]
    assert [rollout.temperature for rollout in group.rollouts] == [1.0, 1.0]
    assert sum((rollout.labels != -100).sum().item() for rollout in group.rollouts) == num_sampled
    assert group.rollouts[0].messages is not None
    assert [turn["role"] for turn in group.rollouts[0].messages] == ["user", "assistant"] * 2


def test_turns_that_are_rewarded_reach_a_trainer_as_advantages_of_their_tokens(api_url: str):
    async def run() -> None:
        async with controlled(server, api_url) as control:
            for number, of_turns in enumerate(((1.0, 3.0), (0.0, 4.0))):
                opened = await control.post("/session", 201, group="task 1")
                path, messages = f"/session/{opened['session_id']}", [user("tell")]
                early = await control.post(f"{path}/reward", 422, reward=1.0, turn=0)
                assert "the session has 0 turns" in early["error"]["message"]
                # The second one by the id of its answer; what is given again takes the place of what was.
                for turn, reward in enumerate(of_turns):
                    async with client(opened["base_url"]) as openai:
                        answer = await openai.chat.completions.create(model="m", messages=messages)
                    messages += [answer.choices[0].message.model_dump(exclude_none=True), user("more")]
                    for value in (9.0, reward):
                        given = await control.post(f"{path}/reward", reward=value, turn=answer.id if turn else turn)
                        assert given == {"reward": value}
                for value, turn in (("high", 0), (1.0, 2), (None, 1)):
                    await control.post(f"{path}/reward", 422, reward=value, turn=turn)
                # Of the session: a part of the last turn's.
                await control.post(f"{path}/finish", **({"reward": -2.0} if number else {}))
                late = await control.post(f"{path}/reward", 404, reward=1.0, turn=0)
                assert "before the session is finished" in late["error"]["message"]

    with TokenServer() as server:
        server.replies = ["one", "three"] * 2
        asyncio.run(run())
    raw = requests.get(f"{api_url}/batch", timeout=10).json()["batch"]
    batch = parse_batch(raw, WireLimits(vocab_size=1000, max_length=1000))
    (group,) = batch.groups
    found = []
    for rollout in group.rollouts:
        is_trained = rollout.labels != -100
        found.append(rollout.advantages[is_trained].tolist())
    # Rewards 1, 3 and 0, 4 - 2 with mean 1.5 and unbiased variance (0.25 + 2.25 + 2.25 + 0.25) / 3 = 5/3; sums from a turn on.
    unit = (5 / 3) ** 0.5 + 1e-4
    sizes = (len("one") + 1, len("three") + 1)
    for row, values in zip(found, ((1.0, 1.5), (-1.0, 0.5)), strict=True):
        assert row == pytest.approx([values[0] / unit] * sizes[0] + [values[1] / unit] * sizes[1], abs=1e-6)
    assert [rollout.reward for rollout in group.rollouts] == [4.0, 2.0]


def test_who_has_no_key_learns_and_changes_nothing(api_url: str):
    async def run() -> None:
        async with controlled(server, api_url) as control:
            session = await control.post("/session", 201, group="task")
            answers = [
                await control.post(path, 401, key=session["session_id"], reward=9.0)
                for path in (
                    "/session",
                    f"/session/{session['session_id']}/reward",
                    f"/session/{session['session_id']}/finish",
                    "/session/nobody/finish",
                    "/session/nobody/discard",
                )
            ]
            answers += [await control.post("/session", 401, key="")]
            assert len({str(answer) for answer in answers}) == 1
            for path in ("/status", "/metrics"):
                await control.get(path, 401, key="wrong")
            assert control.gateway.sessions.find(session["session_id"]).reward is None

    with TokenServer() as server:
        asyncio.run(run())


def test_a_discarded_session_leaves_its_place_and_wrong_words_are_explained(api_url: str):
    async def run() -> None:
        async with controlled(server, api_url) as control:
            sessions = [await control.post("/session", 201, group="task") for _ in range(2)]
            full = await control.post("/session", 409, group="task")
            assert "--group_size" in full["error"]["message"]
            await control.post(f"/session/{sessions[0]['session_id']}/discard")
            third = await control.post("/session", 201, group="task")
            await control.post("/session", 422, group="")
            path = f"/session/{third['session_id']}"
            assert "no reward" in (await control.post(f"{path}/finish", 422))["error"]["message"]
            assert "without one answer" in (await control.post(f"{path}/finish", 422, reward=1))["error"]["message"]
            assert (
                "`reward` is 'high'" in (await control.post(f"{path}/reward", 422, reward="high"))["error"]["message"]
            )
            await ask(third["base_url"], [user("tell")])
            await control.post(f"{path}/finish")
            status = await control.get("/status")
            metrics = await control.get("/metrics")
            assert '"num_open_groups":1' in status
            assert "trl_atropos_gateway_num_sessions 3\n" in metrics
            assert "trl_atropos_gateway_spliced_share 1.0\n" in metrics
            assert await control.get("/healthz", key="") == '{"status":"ok"}'

    with TokenServer() as server:
        server.replies = ["yes"]
        asyncio.run(run())


def test_groups_wait_for_an_api_that_is_not_there_yet(tmp_path: Path):
    async def run(port: int) -> None:
        async with controlled(server, f"http://127.0.0.1:{port}") as control:
            for _ in range(2):
                session = await control.post("/session", 201, group="task")
                await ask(session["base_url"], [user("tell")])
                await control.post(f"/session/{session['session_id']}/finish", reward=1.0)
            await asyncio.sleep(0.1)
            assert control.gateway.counts.num_groups_sent == 0
            await asyncio.to_thread(begin, port)
        assert control.gateway.counts.num_groups_sent == 1

    def begin(port: int) -> None:
        command = [sys.executable, "-m", "trl_atropos.cli.main", "api", "--db", str(tmp_path / "api.db")]
        processes.append(subprocess.Popen([*command, "--port", str(port)]))

    processes: list[subprocess.Popen[bytes]] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    try:
        with TokenServer() as server:
            server.replies = ["yes"] * 2
            asyncio.run(run(port))
    finally:
        for process in processes:
            process.terminate()
            process.wait(20)


def test_the_command_serves_until_a_signal_comes(api_url: str, tmp_path: Path):
    key_file = tmp_path / "key"
    key_file.write_text(KEY)
    with TokenServer() as server:
        command = [sys.executable, "-m", "trl_atropos.cli.main", "gateway", "--servers", server.url, "--port", "0"]
        command += ["--api_url", api_url, "--group_size", "2", "--key_file", str(key_file), "--max_turns", "3"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "VLLM_API_KEY": "k"})
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.fullmatch(r"Gateway on (http://127\.0\.0\.1:\d+) for 1 servers\n", line)
            assert found, line
            headers = {"Authorization": f"Bearer {KEY}"}
            server.replies = ["yes", "no"]
            for reward in (0.0, 1.0):
                answer = requests.post(f"{found[1]}/session", json={"group": "task"}, headers=headers, timeout=20)
                session = answer.json()
                asyncio.run(ask(session["base_url"], [user("tell")]))
                path = f"{found[1]}/session/{session['session_id']}/finish"
                requests.post(path, json={"reward": reward}, headers=headers, timeout=20).raise_for_status()
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.communicate()
    (group,) = requests.get(f"{api_url}/batch", timeout=10).json()["batch"]
    assert group["scores"] == [0.0, 1.0]
