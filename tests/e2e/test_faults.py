"""SIGKILL of the server and of the trainer at every moment of a publish: no hang, no leftovers, and it is healed."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fork_server
import pytest
from killed_trainer import MOMENTS
from publishing import BF16_NOISE, Publishing, load, max_abs_diff
from servers import VLLMServer, save_tiny_model
from shared_segments import left_since, segments

from trl_atropos.errors import WeightSyncError


DIRECTORY = Path(__file__).parent
SHM, GLOO = "trl_atropos_shm", "trl_atropos_gloo"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("models")
    return save_tiny_model(directory / "A", tied=True, seed=1), save_tiny_model(directory / "B", tied=True, seed=2)


@pytest.fixture(scope="module", params=[SHM, GLOO])
def server(
    request: pytest.FixtureRequest, models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VLLMServer]:
    log_path = tmp_path_factory.mktemp("server") / "server.log"
    server = VLLMServer(models[0], "--enforce_eager", "True", log_path=log_path, backend=request.param)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def nothing_is_left() -> Iterator[None]:
    before = segments(), set(threading.enumerate())
    yield
    assert not left_since(before[0])
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before[1] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(threading.enumerate()) - before[1]


def do_then(action: Callable[[], None], method: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(*args: Any, **kwargs: Any) -> Any:
        action()
        return method(*args, **kwargs)

    return replacement


def then_do(method: Callable[..., Any], action: Callable[[], None]) -> Callable[..., Any]:
    def replacement(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        action()
        return result

    return replacement


def arm(client: Any, moment: str, action: Callable[[], None]) -> None:
    """Take the action once, at this moment of the next publish."""
    has_acted = False

    def once() -> None:
        nonlocal has_acted
        if not has_acted:
            has_acted = True
            action()

    name, wrap = {
        "before_init": ("init_weight_transfer_engine", lambda method: do_then(once, method)),
        "after_start": ("start_weight_update", lambda method: then_do(method, once)),
        "in_transfer": ("update_weights", lambda method: do_then(once, method)),
        "before_finish": ("finish_weight_update", lambda method: do_then(once, method)),
        "after_finish": ("finish_weight_update", lambda method: then_do(method, once)),
    }[moment]
    setattr(client, name, wrap(getattr(client, name)))


# The transport matters while it moves bytes; a restart takes half a minute.
EVERY_MOMENT = [*((SHM, moment) for moment in MOMENTS), (GLOO, "in_transfer")]


@pytest.mark.parametrize(("server", "moment"), EVERY_MOMENT, indirect=["server"], scope="module")
def test_a_server_that_is_killed_and_restarted_is_given_everything_and_training_goes_on(
    server: VLLMServer, models: tuple[Path, Path], moment: str, nothing_is_left: None
) -> None:
    publishing = Publishing(server.url, models[1], on_publish_failure="retry", max_publish_retries=3)
    restarts: list[threading.Thread] = []

    def kill_and_restart() -> None:
        server.kill()
        restarts.append(threading.Thread(target=server.start))
        restarts[0].start()

    arm(publishing.client, moment, kill_and_restart)
    report = publishing.publish(load(models[1]), policy_version=1)
    restarts[0].join()
    published = publishing.logprobs()
    assert report.num_retries >= 1
    assert (publishing.client.get_weight_version(), publishing.client.is_paused()) == ("1", False)

    # The next one finds a healthy server, and its weights are those of the restarted server's own start.
    again = publishing.publish(load(models[0]), policy_version=2)
    assert (again.num_retries, again.num_failures) == (0, 0)
    assert max_abs_diff(published, publishing.logprobs()) > 1.0
    publishing.publisher.close()


@pytest.mark.parametrize(
    ("server", "moment"), [(SHM, "after_start"), (GLOO, "in_transfer")], indirect=["server"], scope="module"
)
def test_a_server_that_is_killed_for_good_ends_the_run_with_its_state_and_the_next_command(
    server: VLLMServer, models: tuple[Path, Path], moment: str, nothing_is_left: None
) -> None:
    publishing = Publishing(server.url, models[1], timeout_s=20)
    arm(publishing.client, moment, server.kill)
    start = time.monotonic()
    with pytest.raises(WeightSyncError) as caught:
        publishing.publish(load(models[1]), policy_version=1)
    assert time.monotonic() - start < 25
    # The policy is loaded beside the served one.
    assert "failed in state `building`" in caught.value.what
    assert "restart the server" in caught.value.fix.lower() + caught.value.why.lower()
    publishing.publisher.close()
    server.start()


@pytest.mark.parametrize("server", [SHM], indirect=True, scope="module")
def test_a_server_that_was_restarted_between_two_publishes_is_recognised(
    server: VLLMServer, models: tuple[Path, Path], nothing_is_left: None
) -> None:
    """A restarted server answers, and serves its starting checkpoint: only its version tells."""
    publishing = Publishing(server.url, models[1])
    publishing.publish(load(models[1]), policy_version=1)
    published = publishing.logprobs()
    server.kill()
    server.start()
    assert max_abs_diff(published, publishing.logprobs()) > 1.0
    report = publishing.publish(load(models[1]), policy_version=2)
    assert (report.num_retries, report.num_failures) == (0, 0)
    assert max_abs_diff(published, publishing.logprobs()) < BF16_NOISE
    publishing.publisher.close()


def test_a_server_that_hangs_ends_the_publish_at_its_deadline(
    server: VLLMServer, models: tuple[Path, Path], nothing_is_left: None
) -> None:
    """SIGSTOP of every process of the server in the middle of a transfer."""
    assert server.process is not None
    publishing = Publishing(server.url, models[1], timeout_s=5)
    publishing.publish(load(models[0]), policy_version=1)
    process_group = server.process.pid
    arm(publishing.client, "in_transfer", lambda: os.killpg(process_group, signal.SIGSTOP))
    start = time.monotonic()
    try:
        # The policy is loaded beside the served one.
        with pytest.raises(WeightSyncError, match="failed in state `building`"):
            publishing.publish(load(models[1]), policy_version=2)
        # Two requests at most wait for their deadline.
        assert time.monotonic() - start < 15
    finally:
        os.killpg(process_group, signal.SIGCONT)
    publishing.publisher.close()
    healed = Publishing(server.url, models[1])
    healed.publish(load(models[1]), policy_version=3)
    assert not healed.client.is_paused()
    healed.publisher.close()


@pytest.mark.parametrize(("server", "moment"), EVERY_MOMENT, indirect=["server"], scope="module")
def test_a_killed_trainer_leaves_nothing_and_the_next_one_heals_the_server(
    server: VLLMServer, models: tuple[Path, Path], moment: str, nothing_is_left: None
) -> None:
    command = [sys.executable, str(DIRECTORY / "killed_trainer.py"), server.url, str(models[0]), moment]
    path = os.pathsep.join([str(DIRECTORY), str(DIRECTORY.parent), os.environ.get("PYTHONPATH", "")])
    trainer = fork_server.run(command, env={**os.environ, "PYTHONPATH": path}, timeout=120)
    assert trainer.returncode == -signal.SIGKILL

    publishing = Publishing(server.url, models[1])
    report = publishing.publish(load(models[1]), policy_version=7)
    assert (report.num_retries, report.num_failures) == (0, 0)
    assert (publishing.client.get_weight_version(), publishing.client.is_paused()) == ("7", False)
    assert report.probe is not None
    assert report.probe.mean_abs_diff < 0.1
    publishing.publisher.close()


def test_five_trainers_in_a_row_leave_no_descriptor_open(server: VLLMServer, models: tuple[Path, Path]) -> None:
    def num_descriptors() -> int:
        return len(os.listdir(f"/proc/{os.getpid()}/fd"))

    counts = []
    for version in range(6):
        publishing = Publishing(server.url, models[1])
        publishing.publish(load(models[1]), policy_version=version)
        publishing.publisher.close()
        publishing.client.session.close()
        del publishing
        counts.append(num_descriptors())
    # The first one opens what stays open for good, such as the locale's files.
    assert counts[-1] <= counts[1]
