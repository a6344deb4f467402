"""A launch of real processes: a real trajectory API, small scripts as environments and trainer, and a stand-in for vLLM.

With a real vLLM server and a real trainer: test_training.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml
from scripted_server import ScriptedServer
from scripted_sglang import ScriptedSGLang
from token_server import TokenServer

from trl_atropos.cli.main import main


ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60.0

ENVIRONMENT = """
import sys, time
print("rollout", flush=True)
print("arguments", *sys.argv[1:], flush=True)
while True:
    time.sleep(0.05)
"""

# Writes the log that the summary is made of, once the environments have said something.
TRAINER = """
import json, os, sys, time
output_dir = sys.argv[sys.argv.index("--output_dir") + 1]
logs = os.path.join(os.path.dirname(output_dir), "logs")
time.sleep(float(os.environ.get("TRAINER_S", "0.5")))
while not os.path.exists(os.path.join(logs, os.environ.get("TRAINER_WAITS_FOR", ""))):
    time.sleep(0.05)
os.makedirs(output_dir, exist_ok=True)
print("step 1 reward 0.5", flush=True)
print("a warning of the trainer", file=sys.stderr, flush=True)
with open(os.path.join(output_dir, "trainer_state.json"), "w") as file:
    json.dump({"log_history": [{"step": 1, "reward": 0.5, "policy_version": 1}]}, file)
"""


class Launch:
    """A launch file in a directory of its own, and its processes.

    Args:
        directory (`Path`):
            Of the test.
        vllm_url (`str`):
            Of the stand-in.
    """

    def __init__(self, directory: Path, vllm_url: str):
        self.directory = directory
        self.run_dir = directory / "run"
        self.logs = self.run_dir / "logs"
        for name, code in (("environment", ENVIRONMENT), ("trainer", TRAINER)):
            (directory / f"{name}.py").write_text(code)
        self.environment_command = f"{sys.executable} {directory / 'environment.py'} serve"
        self.content: dict[str, Any] = {
            "model_name_or_path": "served",
            "run_dir": str(self.run_dir),
            "environments": {"first": {"command": self.environment_command}},
            "trainer_command": f"{sys.executable} {directory / 'trainer.py'}",
            "vllm_url": vllm_url,
        }

    def write(self) -> list[str]:
        path = self.directory / "launch.yaml"
        path.write_text(yaml.safe_dump(self.content))
        return ["launch", "-c", str(path)]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "trl_atropos.cli.main", *self.write(), *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S)

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "trl_atropos.cli.main", *self.write()]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def pid_of(self, process: psutil.Process, name: str) -> int:
        """The process of a launch whose command line contains `name`, behind its guard."""
        found: list[int] = []
        deadline = time.monotonic() + DEADLINE_S
        while not found:
            assert time.monotonic() < deadline, f"no process of {name}"
            found = [
                child.pid
                for child in process.children(recursive=True)
                if name in " ".join(child.cmdline()) and "trl_atropos.cli.launch.guard" not in child.cmdline()
            ]
            time.sleep(0.05)
        return found[0]

    def leftovers(self) -> list[str]:
        """Command lines of processes that name this test's directory."""
        lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
        return [line for line in lines if str(self.directory) in line]


@pytest.fixture
def vllm() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def launch(tmp_path: Path, vllm: ScriptedServer) -> Iterator[Launch]:
    launch = Launch(tmp_path, vllm.base_url)
    yield launch
    assert launch.leftovers() == []


def wait_for_line(process: subprocess.Popen[str], pattern: str) -> list[str]:
    """Lines of a launch up to the first that matches."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return lines
    raise AssertionError(f"{pattern} never came:\n{''.join(lines)}")


def test_environments_and_trainer_run_with_the_addresses_and_the_external_server_stays(
    launch: Launch, vllm: ScriptedServer
) -> None:
    launch.content["environments"] = {
        "first": {"command": launch.environment_command},
        "second": {"command": launch.environment_command, "num_copies": 2},
    }
    launch.logs.mkdir(parents=True)
    (launch.logs / "of-an-earlier-run.log").touch()
    finished = launch.run()

    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert sorted(path.name for path in launch.logs.iterdir()) == [
        *("api.log", "combined.log", "first.log", "second-1.log", "second-2.log", "trainer.log"),
    ]
    assert "vllm     external, at " + vllm.base_url in finished.stdout
    assert "ending api, first, second-1, second-2, trainer" in finished.stdout
    (arguments,) = [line for line in (launch.logs / "second-2.log").read_text().splitlines() if "arguments" in line]
    assert f"--openai.base_url {vllm.base_url}/v1" in arguments
    assert json.loads((launch.run_dir / "summary.json").read_text())["rewards"] == [0.5]
    combined = (launch.logs / "combined.log").read_text()
    for name, line in (
        ("api", "Trajectory API on http:.*, database .*api.db"),
        ("first", "rollout"),
        ("second-2", "rollout"),
        ("trainer", "step 1 reward 0.5"),
        ("trainer", "a warning of the trainer"),
        ("launch", "ending api, first, second-1, second-2, trainer"),
    ):
        assert re.search(rf"^\[ *\d+\.\d s\] {name} +\| {line}$", combined, re.MULTILINE), line
    assert "\nstep 1 reward 0.5\n" in finished.stdout
    assert "a warning of the trainer" not in finished.stdout and "rollout" not in finished.stdout
    assert requests.get(f"{vllm.base_url}/health", timeout=10).ok


def test_command_after_two_dashes_is_the_only_environment_and_all_output_is_shown_if_told(launch: Launch) -> None:
    finished = launch.run("--show_all_logs", "--", *launch.environment_command.split(), "--mine")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert re.search(r"^env +\| rollout$", finished.stdout, re.MULTILINE)
    assert re.search(r"^trainer +\| step 1 reward 0.5$", finished.stdout, re.MULTILINE)
    assert not (launch.logs / "first.log").exists()
    assert "arguments serve --mine" in (launch.logs / "env.log").read_text()


@pytest.mark.parametrize("victim", ["environment.py", "run-api", "trl-atropos api"])
def test_killed_part_ends_the_run_if_told_and_is_named_with_what_was_ended(launch: Launch, victim: str) -> None:
    launch.content["on_exit"] = {"api": "stop", "environments": "stop"}
    if victim == "run-api":
        # Which is not started again in any case.
        launch.content |= {"api": "run-api", "on_exit": {"environments": "stop"}}
    launch.content["trainer_env"] = {"TRAINER_S": "60"}
    process = launch.start()
    wait_for_line(process, "trainer  ")
    os.kill(launch.pid_of(psutil.Process(process.pid), victim), signal.SIGKILL)
    output, _ = process.communicate(timeout=DEADLINE_S)

    name, others = ("first", "api, trainer") if victim == "environment.py" else ("api", "first, trainer")
    assert process.returncode == 1
    assert f"ProcessFailedError: The process `{name}` ended with exit code 137" in output  # 128 + 9
    assert f"The launch has ended {others};" in output
    assert str(launch.logs / f"{name}.log") in output


def test_killed_parts_are_started_again_and_the_summary_counts_them(launch: Launch) -> None:
    launch.content["trainer_env"] = {"TRAINER_WAITS_FOR": "go"}
    process = launch.start()
    lines = wait_for_line(process, "trainer  ")
    (api_url,) = re.findall(r"api +ready at (\S+)", "".join(lines))
    of_launch = psutil.Process(process.pid)
    before = {victim: launch.pid_of(of_launch, victim) for victim in ("environment.py", "trl-atropos api")}
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
    said = wait_for_line(process, "(first|api) +is there again")
    said += wait_for_line(process, "(first|api) +is there again")
    after = {victim: launch.pid_of(of_launch, victim) for victim in before}
    assert requests.get(api_url, timeout=10).json() == {"message": "AtroposLib API"}
    (launch.logs / "go").touch()
    output, _ = process.communicate(timeout=DEADLINE_S)

    assert process.returncode == 0, output
    assert not set(before.values()) & set(after.values())
    for name in ("api", "first"):
        ended = r" +ended with exit code 137 and is started again in 1 s \(restart 1; at most 5 times within 600 s\)\."  # 128 + 9
        assert re.search(rf"{name}{ended}", "".join(said))
        assert "=== started again ===" in (launch.logs / f"{name}.log").read_text()
    assert json.loads((launch.run_dir / "summary.json").read_text())["num_restarts"] == {"api": 1, "first": 1}
    assert "restarts api 1, first 1" in output


def test_run_goes_on_with_the_other_environments_if_told(launch: Launch) -> None:
    crash = f"{sys.executable} -c 'print(\"the cause\"); raise SystemExit(3)'"
    launch.content["trainer_env"] = {"TRAINER_S": "2"}
    launch.content["environments"]["crasher"] = {"command": crash, "on_exit": "continue"}
    finished = launch.run()

    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "crasher  ended with exit code 3; the run goes on with first." in finished.stdout
    assert "the cause" in finished.stdout


def test_run_without_any_environment_left_is_over_also_if_told_to_continue(launch: Launch) -> None:
    crash = f"{sys.executable} -c 'raise SystemExit(3)'"
    launch.content |= {"on_exit": {"environments": "continue"}, "trainer_env": {"TRAINER_S": "60"}}
    launch.content["environments"] = {name: {"command": crash} for name in ("one", "two")}
    finished = launch.run()

    assert finished.returncode == 1
    assert re.search(r"The process `(one|two)` ended with exit code 3", finished.stderr)


def test_services_for_an_external_trainer_run_until_they_are_interrupted(launch: Launch, vllm: ScriptedServer) -> None:
    launch.content["trainer_command"] = "external"
    process = launch.start()
    (addresses, _) = wait_for_line(process, "until Ctrl-C")[-2:]
    api_url = re.search(r"--atropos_api_url (\S+)", addresses)
    assert api_url is not None and f"--vllm_server_base_url {vllm.base_url}" in addresses
    assert requests.get(api_url[1], timeout=10).json() == {"message": "AtroposLib API"}

    process.send_signal(signal.SIGINT)

    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    assert not (launch.run_dir / "summary.json").exists()
    with pytest.raises(requests.ConnectionError):
        requests.get(api_url[1], timeout=10)


def test_the_trajectory_api_of_a_launch_survives_being_killed_and_keeps_its_database(launch: Launch) -> None:
    launch.content["trainer_command"] = "external"
    process = launch.start()
    (addresses, _) = wait_for_line(process, "until Ctrl-C")[-2:]
    api_url = re.search(r"--atropos_api_url (\S+)", addresses)
    assert api_url is not None
    pid = requests.get(f"{api_url[1]}/healthz", timeout=10).json()["pid"]
    os.kill(pid, signal.SIGKILL)
    assert requests.get(f"{api_url[1]}/healthz", timeout=10).json()["pid"] != pid
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output

    # A run that resumes goes on with it, another one begins with an empty one.
    trainer = f"{sys.executable} {launch.directory / 'trainer.py'}"
    for number, arguments in enumerate(("--resume_from_checkpoint true", "")):
        launch.content |= {"trainer_command": trainer, "trainer_args": arguments}
        finished = launch.run()
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert (launch.run_dir / "api.db").exists()
        assert (launch.run_dir / "api-1.db").exists() == (number == 1)
    assert "the database of an earlier run is now" in finished.stdout


def test_external_environments_are_told_where_to_go(launch: Launch, vllm: ScriptedServer) -> None:
    launch.content["environments"] = "external"
    finished = launch.run()
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "ENVIRONMENT.py serve --env.rollout_server_url http" in finished.stdout
    assert f"--openai.base_url {vllm.base_url}/v1" in finished.stdout


def test_server_that_is_away_and_external_is_said_so(
    launch: Launch, vllm: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    launch.content["startup_timeout_s"] = 1
    vllm.stop()
    assert main(launch.write()) == 1
    assert "external: the launch does not start it, and /health does not answer there." in capsys.readouterr().err


# Registers with the API, takes a batch of two rollouts, and writes the log that the summary is made of.
TRAINER_OF_AGENTS = """
import json, os, sys
from pathlib import Path
from trl_atropos.wire.client import AtroposClient, Registration

def value(flag):
    return sys.argv[sys.argv.index(flag) + 1]

names = {name: "" for name in ("wandb_group", "wandb_project", "checkpoint_dir")}
numbers = {"batch_size": 2, "max_token_len": 1000, "save_checkpoint_interval": 0, "starting_step": 0, "num_steps": 1}
with AtroposClient(value("--atropos_api_url")) as client:
    client.register(Registration(**names, **numbers))
    batch = None
    while batch is None:
        batch = client.fetch_batch()
output_dir = Path(value("--output_dir"))
output_dir.mkdir()
(output_dir / "batch.json").write_text(json.dumps(batch))
(output_dir / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "reward": 0.5}]}))
"""


def test_an_agent_is_trained_on_what_it_samples_through_a_gateway_of_the_launch(tmp_path: Path) -> None:
    with TokenServer() as server:
        server.replies = ["In the south.", "Lima"] * 100
        launch = Launch(tmp_path, server.url)
        (tmp_path / "trainer.py").write_text(TRAINER_OF_AGENTS)
        del launch.content["environments"]
        launch.content |= {
            "agents": {"capitals": {"command": f"{sys.executable} examples/agents/capitals_program.py"}},
            "gateway_args": {"group_size": 2},
        }
        finished = launch.run()
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert re.search(r"gateway +ready at http://127\.0\.0\.1:\d+", finished.stdout)
    assert "ending api, gateway, trainer, capitals" in finished.stdout
    (group,) = json.loads((launch.run_dir / "model" / "batch.json").read_text())
    assert len(group["tokens"]) == 2 and sum(token != -100 for token in group["masks"][0]) > len("Lima")
    gateway = json.loads((launch.run_dir / "summary.json").read_text())["gateway"]
    assert gateway["num_groups_sent"] >= 1 and gateway["num_turns"] >= 4
    assert (gateway["spliced_share"], gateway["num_branches"], gateway["masked_tokens"]) == (1.0, 0, {})
    assert "spliced share 1.00" in finished.stdout
    # Who may open and reward sessions is the owner's affair alone.
    assert (launch.run_dir / "gateway.key").stat().st_mode & 0o777 == 0o600
    assert launch.leftovers() == []


# Ends its process once, as who kills an environment does, when the API has the first group.
ENVIRONMENT_OF_AN_AGENT = """
import os, signal
from pathlib import Path
from openai import AsyncOpenAI
from trl_atropos import AgentEnv

class Twice(AgentEnv):
    name = "twice"
    tasks = ("Lima",)

    async def run_agent(self, task, base_url):
        messages = []
        async with AsyncOpenAI(base_url=base_url, api_key="x") as client:
            for question in ("Which city?", "Again."):
                messages.append({"role": "user", "content": question})
                reply = await client.chat.completions.create(model="policy", messages=messages)
                messages.append({"role": "assistant", "content": reply.choices[0].message.content})
        return messages[-1]["content"]

    def compute_reward(self, task, outcome):
        return float(outcome == task)

    async def handle_send_to_api(self, *args, **kwargs):
        await super().handle_send_to_api(*args, **kwargs)
        killed = Path(os.environ["KILLED"])
        if not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGTERM)

Twice.cli()
"""


def test_what_gateways_in_environments_counted_is_in_the_summary_also_of_one_that_was_killed(tmp_path: Path) -> None:
    with TokenServer() as server:
        server.replies = ["In the south.", "Lima"] * 1000
        launch = Launch(tmp_path, server.url)
        server.tokenizer.save_pretrained(tmp_path / "served")
        launch.content["model_name_or_path"] = str(tmp_path / "served")
        (tmp_path / "environment.py").write_text(ENVIRONMENT_OF_AN_AGENT)
        # Half of it comes from the process that is killed, and half from the one in its place.
        (tmp_path / "trainer.py").write_text(TRAINER_OF_AGENTS.replace('"batch_size": 2', '"batch_size": 4'))
        launch.content["trainer_args"] = "--temperature 0.7"
        environment = launch.content["environments"]["first"]
        environment["command"] += " --env.group_size 2 --env.max_num_workers 1"
        environment["env"] = {"KILLED": str(tmp_path / "killed")}
        (launch.run_dir / "gateway_counts").mkdir(parents=True)
        (launch.run_dir / "gateway_counts" / "of_an_earlier_run.json").write_text("{}")
        finished = launch.run()
    assert finished.returncode == 0, finished.stdout + finished.stderr
    summary = json.loads((launch.run_dir / "summary.json").read_text())
    assert summary["num_restarts"] == {"first": 1}
    gateway = summary["gateway"]
    groups = json.loads((launch.run_dir / "model" / "batch.json").read_text())
    num_trained = sum(token != -100 for group in groups for masks in group["masks"] for token in masks)
    assert len(groups) == 2 and num_trained > 0
    assert [group["generation_params"] for group in groups] == [{"temperature": 0.7}] * 2
    assert gateway["num_groups_sent"] >= 2 and gateway["num_sessions"] >= 4 and gateway["num_turns"] >= 8
    assert gateway["num_sampled_tokens"] >= num_trained
    assert (gateway["spliced_share"], gateway["num_branches"], gateway["masked_tokens"]) == (1.0, 0, {})
    assert "spliced share 1.00" in finished.stdout
    assert launch.leftovers() == []


# Generates as environments do, tries what only the trainer may, and says what came of it.
ASKING_ENVIRONMENT = """
import json, os, sys, time
import requests

def value(flag):
    return sys.argv[sys.argv.index(flag) + 1]

url = value("--openai.base_url").removesuffix("/v1")
headers = {"Authorization": "Bearer " + value("--openai.api_key")}
prompts = [[number * 1000 + i for i in range(64)] for number in range(4)]
bodies = [("/generate", {"prompt": {"prompt_token_ids": prompt}}) for prompt in prompts]
asked = [(path, requests.post(url + path, json=body, headers=headers).status_code) for path, body in bodies]
asked += [(path, requests.post(url + path, headers=headers).status_code) for path in ("/pause", "/update_weights", "/session")]
asked += [("without a key", requests.post(url + "/generate", json=bodies[0][1]).status_code)]
with open(os.environ["ASKED"] + ".part", "w") as file:
    json.dump({"url": url, "asked": asked}, file)
os.rename(os.environ["ASKED"] + ".part", os.environ["ASKED"])
time.sleep(60)
"""


def test_environments_reach_several_servers_through_a_gateway_and_only_the_trainer_has_them(tmp_path: Path) -> None:
    with TokenServer() as first, TokenServer() as second:
        first.replies, second.replies = ["yes"] * 4, ["yes"] * 4
        launch = Launch(tmp_path, f"{first.url}, {second.url}")
        (tmp_path / "environment.py").write_text(ASKING_ENVIRONMENT)
        asked_path = launch.run_dir / "asked.json"
        launch.content["environments"]["first"]["env"] = {"ASKED": str(asked_path)}
        launch.content["trainer_env"] = {"TRAINER_WAITS_FOR": "../asked.json"}
        (tmp_path / "trainer.py").write_text(TRAINER + "print(*sys.argv, flush=True)\n")
        finished = launch.run()
        assert finished.returncode == 0, finished.stdout + finished.stderr
        both = [{path for path, _ in server.requests} for server in (first, second)]
    asked = json.loads(asked_path.read_text())
    assert asked["asked"] == [
        *[["/generate", 200]] * 4,
        *(["/pause", 404], ["/update_weights", 404], ["/session", 401], ["without a key", 404]),
    ]
    assert both == [{"/generate"}] * 2
    assert re.search(rf"gateway +ready at {asked['url']}\n", finished.stdout)
    assert f"--vllm_server_base_url {first.url},{second.url}" in (launch.logs / "trainer.log").read_text()
    for name in ("gateway.key", "environment.key"):
        path = launch.run_dir / name
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.read_text() not in "".join(log.read_text() for log in launch.logs.glob("*.log"))
    assert launch.leftovers() == []


REGISTRATION = {
    **{"wandb_group": "", "wandb_project": "", "batch_size": 2, "max_token_len": 9, "checkpoint_dir": ""},
    **{"save_checkpoint_interval": 0, "starting_step": 0, "num_steps": 1},
}


def test_agents_that_run_elsewhere_are_told_of_the_gateway_once_a_trainer_is_registered(tmp_path: Path) -> None:
    with TokenServer() as server:
        launch = Launch(tmp_path, server.url)
        launch.content |= {"gateway": True, "environments": "external", "trainer_command": "external"}
        process = launch.start()
        lines = "".join(wait_for_line(process, "until Ctrl-C"))
        assert "agents find the gateway" not in lines
        (api_url,) = re.findall(r"--atropos_api_url (\S+)", lines)
        requests.post(f"{api_url}/register", json=REGISTRATION, timeout=10).raise_for_status()
        (*_, said) = wait_for_line(process, "agents find the gateway at")
        told = re.search(r"at (\S+), and its key in (\S+)", said)
        assert told is not None
        headers = {"Authorization": f"Bearer {Path(told[2]).read_text()}"}
        assert requests.get(f"{told[1]}/status", headers=headers, timeout=10).json()["num_sessions"] == 0
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    assert launch.leftovers() == []


# In the place of an interpreter with SGLang: what `sglang.launch_server` is asked by a launch.
SGLANG = """#!{python}
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

print("arguments", *sys.argv[1:], "variable", os.environ["OF_SGLANG"], flush=True)
assert sys.argv[1:3] == ["-m", "sglang.launch_server"]

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        known = {{"/health": {{}}, "/model_info": {{"weight_version": "1"}}}}
        self.send_response(200 if self.path in known else 404)
        self.end_headers()
        self.wfile.write(json.dumps(known.get(self.path, {{"detail": "Not Found"}})).encode())

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def test_sglang_is_started_in_its_own_environment(launch: Launch) -> None:
    python = launch.directory / "python"
    python.write_text(SGLANG.format(python=sys.executable))
    python.chmod(0o755)
    del launch.content["vllm_url"]
    launch.content |= {
        "server": "sglang",
        "sglang_python": str(python),
        "sglang_args": {"context-length": 64, "disable-overlap-schedule": None},
        "sglang_env": {"OF_SGLANG": 7},
    }
    finished = launch.run()
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert re.search(r"sglang +ready at http://127\.0\.0\.1:\d+", finished.stdout)
    said = (launch.logs / "sglang.log").read_text()
    assert "--model-path served" in said and "--context-length 64 --disable-overlap-schedule variable 7" in said
    assert "--openai.server_type sglang" in (launch.logs / "first.log").read_text()
    assert json.loads((launch.run_dir / "summary.json").read_text())["server_weight_version"] == 1


def test_several_servers_are_started_on_ports_and_with_logs_of_their_own(launch: Launch) -> None:
    python = launch.directory / "python"
    python.write_text(SGLANG.format(python=sys.executable))
    python.chmod(0o755)
    del launch.content["vllm_url"]
    launch.content |= {
        "server": "sglang",
        "num_servers": 2,
        "sglang_python": str(python),
        "sglang_env": {"OF_SGLANG": 7},
        "environments": "external",
        "gateway": False,
    }
    finished = launch.run()
    assert finished.returncode == 0, finished.stdout + finished.stderr
    urls = re.findall(r"sglang-[12] +ready at (http://127\.0\.0\.1:\d+)", finished.stdout)
    assert len(set(urls)) == 2
    for number in (1, 2):
        assert "--model-path served" in (launch.logs / f"sglang-{number}.log").read_text()
    assert launch.leftovers() == []


def test_an_external_server_is_asked_which_kind_it_is(launch: Launch) -> None:
    with ScriptedSGLang() as sglang:
        launch.content["vllm_url"] = sglang.base_url
        finished = launch.run()
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "--openai.server_type sglang" in (launch.logs / "first.log").read_text()
    summary = json.loads((launch.run_dir / "summary.json").read_text())
    assert summary["server_weight_version"] == "default"


def test_a_port_of_sglang_that_is_taken_is_named_by_its_key(launch: Launch, vllm: ScriptedServer) -> None:
    del launch.content["vllm_url"]
    launch.content |= {"server": "sglang", "vllm_port": int(vllm.base_url.rpartition(":")[2])}
    finished = launch.run()
    assert finished.returncode == 1
    assert "set `vllm_port` to another port" in finished.stderr
