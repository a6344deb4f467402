"""The traps of a gateway as pure functions of facts, and a look at a real one."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from token_server import TokenServer

from trl_atropos.checks.finding import diagnose, examine
from trl_atropos.checks.gateway import GATEWAY_CHECKS, GatewayFacts
from trl_atropos.cli.gateway_look import inspect_gateway
from trl_atropos.cli.main import main
from trl_atropos.gateway.control import ControlApp
from trl_atropos.gateway.gateway import Gateway
from trl_atropos.gateway.groups import GroupMaker
from trl_atropos.gateway.posting import GroupPoster


KEY = "the key"
GOOD = GatewayFacts(
    "http://gateway",
    error=None,
    takes_key=True,
    absent_servers=(),
    missing_routes={"http://a": ()},
    models={"http://a": "m", "http://b": "m"},
    num_waiting_groups=(2, 1),
    num_lost_groups=0,
    num_sessions=1,
    num_sampled_tokens=10,
    masked_tokens={"grammar": 5},
    temperature=1.0,
    trainer_temperature=1.0,
    max_rollout_tokens=64,
    max_length=64,
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"error": "does not answer", "takes_key": False}, ["gateway_unreachable"]),
        ({"takes_key": False, "num_sessions": 0}, ["gateway_key"]),
        ({"absent_servers": ("http://a",)}, ["gateway_servers"]),
        ({"missing_routes": {"http://a": ("/inference/v1/generate",)}}, ["gateway_token_routes"]),
        ({"models": {"http://a": "m", "http://b": "n"}}, ["gateway_model"]),
        ({"num_lost_groups": 1}, ["gateway_groups_lost"]),
        ({"num_waiting_groups": (1, 1)}, ["gateway_groups_waiting"]),
        ({"num_waiting_groups": (0, 1)}, []),
        ({"num_sessions": 0, "num_sampled_tokens": 0, "masked_tokens": {}}, ["gateway_without_sessions"]),
        ({"masked_tokens": {"grammar": 5, "undelivered": 1}}, ["gateway_masked"]),
        ({"temperature": 0.5}, ["gateway_temperature"]),
        ({"max_rollout_tokens": 65}, ["gateway_lengths"]),
    ],
    ids=str,
)
def test_each_trap_is_found_and_nothing_else(change: dict[str, Any], expected: list[str]) -> None:
    assert [finding.name for finding in diagnose(replace(GOOD, **change), GATEWAY_CHECKS)] == expected


def test_of_what_is_not_known_nothing_is_concluded() -> None:
    findings = examine(GatewayFacts("http://gateway"), GATEWAY_CHECKS)
    assert [finding.name for finding in findings] == [check.name for check in GATEWAY_CHECKS]
    assert {finding.level for finding in findings} == {"unknown"}


def looks(server: TokenServer, *keys: str | None) -> list[GatewayFacts]:
    """What is seen of a real gateway with each key."""

    async def run() -> list[GatewayFacts]:
        gateway = Gateway([server.url])
        gateway.served = ControlApp(
            gateway, GroupPoster("http://127.0.0.1:9", gateway.counts), GroupMaker(2, 1.0), KEY
        )
        async with gateway:
            look = inspect_gateway
            return [
                await asyncio.to_thread(look, gateway.address, key, None, watch_s=0.0, timeout_s=10.0) for key in keys
            ]

    return asyncio.run(run())


def test_a_real_gateway_is_seen_with_its_servers() -> None:
    with TokenServer() as server:
        seen, without_key, wrong_key = looks(server, KEY, None, "another")
    assert (seen.error, seen.takes_key, seen.absent_servers, seen.num_sessions) == (None, True, (), 0)
    assert seen.models == {server.url: "policy"}
    # It shows no documents.
    assert seen.missing_routes == {}
    assert [finding.name for finding in diagnose(seen, GATEWAY_CHECKS)] == ["gateway_without_sessions"]
    assert diagnose(without_key, GATEWAY_CHECKS) == []
    assert [finding.name for finding in diagnose(wrong_key, GATEWAY_CHECKS)] == ["gateway_key"]


def test_what_is_no_gateway_is_not_taken_for_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TokenServer() as server:
        # It has no /healthz.
        look = inspect_gateway(server.url, KEY, None, watch_s=0.0, timeout_s=10.0)
    assert look.error == "answers 404, as no gateway does"
    (tmp_path / "key").write_text(KEY)
    arguments = ["--gateway-url", server.url, "--gateway-key-file", str(tmp_path / "key"), "--watch-s", "0"]
    assert main(["doctor", "--api-url", server.url, *arguments]) == 1
    assert "gateway_unreachable" in capsys.readouterr().out
