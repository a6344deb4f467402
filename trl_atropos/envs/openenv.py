"""`openenv:URL` and `openenv:DIRECTORY`: servers that speak OpenEnv's protocol, https://github.com/meta-pytorch/OpenEnv."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from ..errors import EpisodeError
from .seeded import SeededSource
from .source import EpisodeStep


START_TIMEOUT_S, STEP_TIMEOUT_S = 60.0, 600.0
CAPACITY_TIMEOUT_S = 30.0
"""So long may a server take to note that a session has ended."""

SERVER = Path(__file__).with_name("openenv_server.py")


def task_names() -> list[str]:
    """There are no names: what stands behind the colon is a URL or a directory."""
    return []


def is_name(name: str) -> bool:
    """Whether it is a URL or the directory of an environment."""
    return name.startswith(("http://", "https://")) or (Path(name) / "server" / "app.py").is_file()


class OpenEnv(SeededSource):
    """An environment behind a server of OpenEnv. The evaluation has seeds of its own, which not every environment minds.

    Args:
        name (`str`):
            URL of a server that runs; or a directory with `server/app.py`, as `openenv init` makes it, whose server is
            started here and ends with this process.
        options (`dict[str, Any]`):
            `sessions`, the number that the server takes at once (1); `python`, the interpreter that has openenv and what
            the environment needs, for a directory (this one); the rest goes with each reset of the environment.
    """

    runs_elsewhere = True

    def __init__(self, name: str, options: dict[str, Any]):
        super().__init__(name, options)
        self._reset = dict(options)
        self.max_episodes = int(self._reset.pop("sessions", 1))
        python = self._reset.pop("python", sys.executable)
        self._url = name.rstrip("/") if name.startswith("http") else self._serve(Path(name).resolve(), python)
        try:
            with urllib.request.urlopen(f"{self._url}/schema", timeout=START_TIMEOUT_S) as answer:
                self._action = json.load(answer)["action"]
        except OSError as exc:
            raise EpisodeError(
                f"{self._url}/schema does not answer: {exc}.",
                "It tells what an action of the environment looks like.",
                "Start the environment's server, or correct the URL.",
            ) from exc

    def _serve(self, directory: Path, python: str) -> str:
        command, pipe = [python, str(SERVER), f"{directory.name}.server.app:app"], subprocess.PIPE
        self._server = subprocess.Popen(command, cwd=directory.parent, stdin=pipe, stdout=pipe, text=True)
        with self._server.stdout as printed:  # type: ignore[union-attr]
            port = printed.readline().strip()
        if port:
            return f"http://127.0.0.1:{port}"
        raise EpisodeError(
            f"The server of {directory} ended with status {self._server.wait()} before it listened.",
            f"It was started with {python}, which needs openenv and what the environment imports.",
            """Read its error above, and name another interpreter: --args '{"python": ".venv-openenv/bin/python"}'.""",
        )

    def open(self, task: int) -> OpenEnvEpisode:
        """Begin a session with a seed."""
        return OpenEnvEpisode(self._url, {**self._reset, "seed": task}, self._action)


class OpenEnvEpisode:
    """One session of a server at a URL, with what goes with its reset and the JSON schema of its actions. What the policy writes
    is the action's only required field, or else a JSON object with its fields.
    """

    def __init__(self, url: str, reset: dict[str, Any], schema: dict[str, Any]):
        from websockets.sync.client import connect

        fields = {name: field for name, field in schema.get("properties", {}).items() if name != "metadata"}
        required = schema.get("required", [])
        is_text = len(required) == 1 and fields[required[0]].get("type") == "string"
        self._field = required[0] if is_text else None
        self._ask = "" if is_text else f"Answer with a JSON object of these fields: {json.dumps(fields)}"
        deadline = time.monotonic() + CAPACITY_TIMEOUT_S
        while True:
            self._socket = connect(f"{url.replace('http', 'ws', 1)}/ws", max_size=None, proxy=None)
            answer = self._request("reset", reset)
            if answer["type"] != "error":
                break
            self.close()
            if answer["data"].get("code") != "CAPACITY_REACHED" or time.monotonic() > deadline:
                raise _failed(answer)
            time.sleep(0.2)
        text = "\n\n".join(part for part in (_shown(answer["data"]), self._ask) if part)
        self.messages = [{"role": "user", "content": text}]

    def _request(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        self._socket.send(json.dumps({"type": kind, "data": data}))
        return json.loads(self._socket.recv(STEP_TIMEOUT_S))

    def step(self, text: str) -> EpisodeStep:
        """Act. The policy is told of an action that is none, and may try again."""
        action: Any = {self._field: text}
        if self._field is None:
            try:
                action = json.loads(text[text.find("{") : text.rfind("}") + 1])
            except json.JSONDecodeError as exc:
                return EpisodeStep(f"This is no JSON object: {exc}. {self._ask}", 0.0)
        answer = self._request("step", action)
        if answer["type"] == "error":
            if answer["data"].get("code") == "VALIDATION_ERROR":
                return EpisodeStep(f"{answer['data'].get('message')} {self._ask}".strip(), 0.0)
            raise _failed(answer)
        result = answer["data"]
        return EpisodeStep(None if result.get("done") else _shown(result), float(result.get("reward") or 0.0))

    def close(self) -> None:
        """End the session."""
        self._socket.close()


def _shown(result: dict[str, Any]) -> str:
    shown = {key: value for key, value in result["observation"].items() if key not in ("done", "reward", "metadata")}
    only = next(iter(shown.values())) if len(shown) == 1 else None
    return only if isinstance(only, str) else json.dumps(shown, ensure_ascii=False)


def _failed(answer: dict[str, Any]) -> EpisodeError:
    return EpisodeError(
        f"The server of the environment answered with an error: {answer['data']}.",
        "The session cannot go on.",
        """Read the server's output; a server that takes several sessions is told of with --args '{"sessions": 8}'.""",
    )
