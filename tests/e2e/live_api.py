"""A run on the real Atropos API, a process that can be killed, and on a stand-in for the vLLM server."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import requests
from fork_server import ForkedProcess
from resume_run import GROUP_SIZE, Run, make_group
from scripted_routes import Refusal, Request
from scripted_server import ScriptedServer
from servers import HOST
from tiny_models import tiny_gpt2

from trl_atropos.cli.launch.processes import free_port


START_TIMEOUT_S = 60.0


def long_messages(num_characters: int) -> list[list[dict[str, str]]]:
    """`messages` for `make_group` that no small file can take. The API drops fields that it does not know."""
    return [[{"role": "user", "content": "x" * num_characters}]] * GROUP_SIZE


class ApiProcess:
    """`run-api`, on the same port every time."""

    def __init__(self, log_path: Path):
        port = str(free_port())
        self.url = f"http://{HOST}:{port}"
        self.command = [str(Path(sys.executable).parent / "run-api"), "--host", HOST, "--port", port]
        self.log_path = log_path
        self.process: ForkedProcess | None = None

    def start(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = ForkedProcess(self.command, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self.get("/")
                return
            except requests.exceptions.ConnectionError:
                assert self.process.poll() is None and time.monotonic() < deadline, self.log_path.read_text()
                time.sleep(0.05)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> ApiProcess:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    def get(self, path: str) -> Any:
        return requests.get(self.url + path, timeout=10).json()

    def post(self, group: dict[str, Any]) -> None:
        requests.post(f"{self.url}/scored_data", json=group, timeout=10).raise_for_status()

    def register(self, batch_size: int, max_token_len: int) -> None:
        """Register as a trainer and ask for a first batch, so that environments may come."""
        registration = {
            **{
                "wandb_group": "test",
                "wandb_project": "test",
                "batch_size": batch_size,
                "max_token_len": max_token_len,
            },
            **{"checkpoint_dir": "", "save_checkpoint_interval": 0, "starting_step": 0, "num_steps": 1000},
        }
        requests.post(f"{self.url}/register", json=registration, timeout=10).raise_for_status()
        assert self.get("/batch") == {"batch": None}

    def wait_for_batch(self, environment: ForkedProcess, log_path: Path, timeout_s: float) -> list[Any]:
        """The next batch, unless the environment ends before."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and environment.poll() is None:
            if batch := self.get("/batch")["batch"]:
                return batch
            time.sleep(0.1)
        raise AssertionError(f"no batch came:\n{log_path.read_text()[-4000:]}")

    def wait_for_registration(self, timeout_s: float) -> None:
        """Return when a trainer is registered; what is posted before makes the API refuse it."""
        deadline = time.monotonic() + timeout_s
        while self.get("/info")["batch_size"] == -1:
            assert time.monotonic() < deadline, "nobody registered"
            time.sleep(0.02)

    def drain(self) -> list[dict[str, Any]]:
        """Take all groups that nobody took."""
        groups: list[dict[str, Any]] = []
        while batch := self.get("/batch")["batch"]:
            groups += batch
        assert self.get("/status")["queue_size"] == 0
        return groups


class PublishTarget(ScriptedServer):
    """Takes the policies of `resume_run.RecordingTrainer` as a vLLM server does."""

    def __init__(self, directory: Path):
        super().__init__(tiny_gpt2().eval())
        tiny_gpt2().config.save_pretrained(directory)
        self.config["model_config"] |= {
            "model": str(directory),
            "dtype": "torch.float32",
            "max_model_len": 32,
            "logprobs_mode": "processed_logprobs",
        }

    def answer(self, request: Request) -> Any:
        assert self.model is not None
        # Refused while the server is paused, too: the engine never sees it.
        if request.route == "POST /v1/completions" and request.body["prompt"] == [self.model.config.vocab_size]:
            raise Refusal(400, "Token id is out of vocabulary")
        return super().answer(request)


class DurableApiProcess(ApiProcess):
    """`trl-atropos api`, on the same port and the same database every time."""

    def __init__(self, log_path: Path):
        super().__init__(log_path)
        port = self.url.rpartition(":")[2]
        database = str(log_path.with_name("api.db"))
        self.command = [sys.executable, "-m", "trl_atropos.cli.main", "api", "--db", database, "--port", port]

    def server_pid(self) -> int:
        return self.get("/healthz")["pid"]

    def kill(self) -> None:
        """Kill the process that listens, and the one that answers."""
        server = psutil.Process(self.server_pid())
        super().kill()
        server.kill()
        psutil.wait_procs([server], timeout=10)


class LiveRun(Run):
    """A run on an API of its own, `run-api` unless another is given, which is started when this is entered."""

    def __init__(
        self, directory: Path, target: PublishTarget, api_class: type[ApiProcess] = ApiProcess, **options: Any
    ):
        directory.mkdir(parents=True, exist_ok=True)
        self.api = api_class(directory / "api.log")
        urls = {"atropos_api_url": self.api.url, "vllm_server_base_url": target.base_url}
        super().__init__(directory, **urls, **options)

    def __enter__(self) -> LiveRun:
        self.api.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.api.kill()

    def feed(self, numbers: Iterable[int]) -> threading.Thread:
        """Begin to wait for the trainer on a thread, and post these groups when it is registered."""

        def post() -> None:
            self.api.wait_for_registration(START_TIMEOUT_S)
            for number in numbers:
                self.api.post(make_group(number))

        thread = threading.Thread(target=post, daemon=True)
        thread.start()
        return thread
