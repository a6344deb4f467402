"""The doctor and the diagnoses against the real API, in each trap that environments and people bring about over HTTP."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from atropos_api import AtroposApi, make_registration, restart_api
from atroposlib.api.server import app

from trl_atropos.checks.api import API_CHECKS, ApiFacts, data_timeout, inspect_api
from trl_atropos.checks.finding import diagnose
from trl_atropos.cli.main import main
from trl_atropos.errors import AtroposProtocolError
from trl_atropos.wire.client import AtroposClient, EnvironmentStatus


# All that the doctor may ask. None of them takes a batch, registers, resets or posts.
HARMLESS = {("GET", path) for path in ("/status", "/status-env", "/info", "/latest_example")}


def register(client: AtroposClient) -> None:
    """As a trainer starts: it registers for batches of 4 and asks for the first, which lets environments in."""
    client.register(make_registration())
    assert client.fetch_batch() is None


def nobody(api: AtroposApi, client: AtroposClient) -> None:
    """Right after `run-api`."""


def late_post(api: AtroposApi, client: AtroposClient) -> None:
    api.post_group(4)
    client_posts = api.post("/register", vars(make_registration()))
    assert client_posts.status_code == 200  # and without any effect


def late_post_after_reset(api: AtroposApi, client: AtroposClient) -> None:
    register(client)
    api.get("/reset_data")
    api.post_group(4)


def reset(api: AtroposApi, client: AtroposClient) -> None:
    register(client)
    api.post_group(4)
    api.get("/reset_data")


def another_trainer(api: AtroposApi, client: AtroposClient) -> None:
    client.register(make_registration(batch_size=16))


def nan(api: AtroposApi, client: AtroposClient) -> None:
    register(client)
    api.register_env()
    api.post_group(2, scores=[math.nan, 1.0])


def too_large(api: AtroposApi, client: AtroposClient) -> None:
    register(client)
    api.register_env(group_size=8)
    api.post_group(8, env_id=0)


def threes(api: AtroposApi, client: AtroposClient) -> None:
    register(client)
    api.register_env(group_size=3)
    api.post_group(3, env_id=0)


def three_and_one(api: AtroposApi, client: AtroposClient) -> None:
    register(client)
    api.register_env(group_size=4)
    api.post_group(3, env_id=0)
    # 3 + 1 is the group size of the environment: both leave its buffer, as two groups.
    api.post_group(1, env_id=0)


def dead_with_allocation(api: AtroposApi, client: AtroposClient) -> None:
    register(client)
    api.register_env()
    api.register_env(min_batch_allocation=0.5)
    for _ in range(4):
        api.post_group(2, env_id=0)


def no_environment(api: AtroposApi, client: AtroposClient) -> None:
    register(client)


def weightless(api: AtroposApi, client: AtroposClient) -> None:
    register(client)
    api.register_env(weight=-1)


def silent(api: AtroposApi, client: AtroposClient) -> None:
    register(client)
    api.register_env()


def buffered(api: AtroposApi, client: AtroposClient) -> None:
    register(client)
    api.register_env(group_size=4)
    assert api.post_group(3, env_id=0).json()["status"] == "buffered"


def idle_trainer(api: AtroposApi, client: AtroposClient) -> None:
    register(client)
    api.register_env(group_size=1)
    for _ in range(4):
        api.post_group(1, env_id=0)


def ahead(api: AtroposApi, client: AtroposClient) -> None:
    register(client)
    api.register_env()
    for _ in range(4):
        api.post_group(2, env_id=0)


def healthy(api: AtroposApi, client: AtroposClient) -> None:
    register(client)
    api.register_env()
    api.post_group(2, env_id=0)


TRAPS: dict[Callable[[AtroposApi, AtroposClient], None], list[str]] = {
    nobody: ["unregistered"],
    late_post: ["data_before_register", "unregistered"],
    late_post_after_reset: ["data_before_register", "registration_wiped"],
    reset: ["registration_wiped"],
    another_trainer: ["other_registration", "no_environment"],
    nan: ["unwritable_group"],
    too_large: ["group_larger_than_batch", "lifo_ageing"],
    threes: ["group_sizes_do_not_pack"],
    three_and_one: ["group_sizes_do_not_pack"],
    dead_with_allocation: ["allocation_without_data", "batch_never_forms", "lifo_ageing"],
    no_environment: ["no_environment"],
    weightless: ["no_environment"],
    silent: ["silent_environment"],
    buffered: ["silent_environment"],
    idle_trainer: ["batch_never_forms"],
    ahead: ["batch_never_forms", "lifo_ageing"],
    healthy: [],
}


@pytest.fixture(params=TRAPS, ids=lambda trap: trap.__name__)
def trap(request: pytest.FixtureRequest, api: AtroposApi, client: AtroposClient) -> str:
    """An API in a trap; the names that the doctor finds in it."""
    request.param(api, client)
    api.requests.clear()
    return TRAPS[request.param]


def state() -> dict[str, Any]:
    return copy.deepcopy(app.state._state)


def look(client: AtroposClient, **options: Any) -> ApiFacts:
    return inspect_api(client, expected_batch_size=4, expected_max_token_len=33, **options)


def names(facts: ApiFacts) -> list[str]:
    return [finding.name for finding in diagnose(facts, API_CHECKS)]


def test_the_doctor_names_the_trap_and_disturbs_nothing(trap, api, client):
    before = state()

    assert names(look(client)) == trap

    assert set(api.requests) <= HARMLESS
    assert repr(state()) == repr(before)  # NaN is not equal to itself


@pytest.mark.usefixtures("trap")
def test_a_trainer_that_waits_always_learns_a_cause_and_disturbs_nothing(api, client):
    facts = look(client, has_waiting_trainer=True)

    error = data_timeout(12.0, facts)

    assert error.what.startswith(f"No batch within 12.0 s from {api.base_url}: /status shows current_step ")
    assert "docs/troubleshooting.md" in error.fix
    assert set(api.requests) <= HARMLESS


def test_every_trap_of_the_api_is_brought_about():
    found = {name for names in TRAPS.values() for name in names}
    # The two others: below.
    assert found == {check.name for check in API_CHECKS} - {"api_unreachable", "api_restarted"}


def test_a_restart_is_told_from_an_api_that_nobody_registered_with(api, client):
    silent(api, client)
    restart_api()

    assert names(look(client, has_waiting_trainer=True)) == ["api_restarted"]
    assert names(look(client)) == ["unregistered"]


def test_an_api_that_is_not_there_is_a_finding(unused_url):
    with AtroposClient(unused_url) as client:
        facts = look(client)

    assert names(facts) == ["api_unreachable"]
    assert "ConnectionRefusedError" in diagnose(facts, API_CHECKS)[0].what


def test_what_moves_during_the_look_is_not_stuck(api, client, monkeypatch):
    idle_trainer(api, client)
    # In place of the seconds that pass between the two looks: the trainer takes a batch.
    monkeypatch.setattr("trl_atropos.checks.api.time.sleep", lambda seconds: client.fetch_batch())

    assert names(look(client, watch_s=3.0)) == []


def test_a_registration_is_compared_only_with_what_is_expected(api, client):
    another_trainer(api, client)

    assert names(inspect_api(client)) == ["no_environment"]
    assert names(inspect_api(client, expected_max_token_len=33)) == ["no_environment"]


# What the client reads for it


def test_the_status_of_each_environment_is_read_until_there_is_none(api, client):
    dead_with_allocation(api, client)

    # 4 groups of 2 are queued, all of the first one; half of a batch is promised.
    assert client.environment_status(0) == EnvironmentStatus(0, 4, 2, 0.5)
    assert client.environment_status(1) == EnvironmentStatus(1, 0, 2, 0.5)
    assert client.environment_status(2) is None


def test_the_newest_group_has_a_size_none_where_it_cannot_be_written_and_0_where_there_is_none(api, client):
    assert client.latest_group_size() == 0
    api.post_group(3)
    assert client.latest_group_size() == 3
    api.post_group(2, scores=[math.inf, 0.0])
    assert client.latest_group_size() is None


def test_a_route_that_is_not_there_is_no_missing_environment(api):
    with AtroposClient(api.base_url + "/elsewhere") as client:
        for read in (lambda: client.environment_status(0), client.latest_group_size):
            with pytest.raises(AtroposProtocolError, match="HTTP 404"):
                read()


def test_reset_data_empties_the_api(api, client):
    healthy(api, client)

    client.reset_data()

    assert client.info() == (-1, 33)
    assert client.environment_status(0) is None
    register(client)
    assert client.info() == (4, 33)


# The command


def run(api_url: str, *arguments: str) -> int:
    return main(["doctor", "--api-url", api_url, "--watch-s", "0", *arguments])


def test_the_command_prints_a_table_and_disturbs_nothing(trap, api, capsys):
    before = state()

    exit_code = run(api.base_url, "--batch-size", "4", "--max-length", "32")

    printed = capsys.readouterr().out
    for name in trap or ["ok"]:
        assert f" {name} " in printed
    levels = {check.name: check.level for check in API_CHECKS}
    assert exit_code == int("error" in {levels[name] for name in trap})
    assert set(api.requests) <= HARMLESS
    assert repr(state()) == repr(before)


def test_a_length_that_the_registration_does_not_allow_is_an_error(api, client, capsys):
    healthy(api, client)

    assert run(api.base_url, "--max-length", "64") == 1
    assert "other_registration" in capsys.readouterr().out


def test_the_installed_command_ends_with_1_where_nobody_answers_and_says_whom_it_asks(unused_url):
    command = [sys.executable, "-m", "trl_atropos.cli.main", "doctor", "--api-url", unused_url]

    result = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert result.returncode == 1
    assert "api_unreachable" in result.stdout
    assert f"Asking the Atropos API at {unused_url}" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_url_that_is_none_is_an_error_in_one_line(capsys):
    assert run("localhost:8000") == 1
    assert "PreflightError: The URL of the Atropos API is 'localhost:8000'" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "x"])
def test_a_time_to_watch_that_is_none_is_refused(seconds, capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--api-url", "http://localhost", f"--watch-s={seconds}"])
    assert "--watch-s" in capsys.readouterr().err
