"""HTTP to the Atropos API, as its trainer sees it: atroposlib's `run-api`, or `trl-atropos api`.

`/batch` of `run-api` is a destructive read: it takes a batch out of its queue before it writes the answer, and keeps no copy.
Hence every request is sent exactly once, and an error says whether a batch can have been lost with it. `trl-atropos api` says
in every answer what it is: it keeps a batch until the trainer, which names itself, has acknowledged it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
from urllib3.exceptions import NewConnectionError

from ..errors import (
    AtroposAnswerLost,
    AtroposBatchGivenAway,
    AtroposBatchLost,
    AtroposConnectionError,
    AtroposProtocolError,
    AtroposRegistrationError,
    PreflightError,
    TrlAtroposError,
)
from ..network import proxies_for
from ..progress import Reminder


logger = logging.getLogger(__name__)

FIRST_DELAY_S = 0.1
MAX_PROBE_DELAY_S = 2.0
UNREGISTERED = -1
METRICS_TIMEOUT_S = 10.0
METRICS_PREFIX = "trl_atropos_api_"
METRICS_OF_THE_API = {
    *("queue_groups", "stored_bytes", "unacknowledged_batches", "server_starts_total"),
    *("posts_refused_total", "posts_repeated_total", "posts_turned_away_total"),
    *("batches_repeated_total", "batches_put_back_total"),
}
"""What this client reads of `/metrics`; there is more."""
"""What `/info` answers for the batch size as long as no trainer is registered."""

DURABLE_API_HEADER = "trl-atropos-api"
"""In every answer of `trl-atropos api`."""

_START_API = "Start the API with `run-api --port PORT`, and give the trainer its URL with `--atropos_api_url`."
_RESTART = "Stop all environments, restart `run-api`, then start the trainer first and the environments after it."


@dataclass(frozen=True)
class Registration:
    """What a trainer tells the API about its run: the body of `POST /register`.

    Args:
        wandb_group (`str`):
            W&B group that the environments log to.
        wandb_project (`str`):
            W&B project that the environments log to.
        batch_size (`int`):
            Number of rollouts (not groups) in one batch. Groups are never split: their sizes must pack into it.
        max_token_len (`int`):
            Environments drop a group if any of its rollouts has this many tokens or more: the longest wanted + 1.
        checkpoint_dir (`str`):
            Where environments keep their own state, on a disk that they share with the trainer.
        save_checkpoint_interval (`int`):
            Number of steps from one such save to the next.
        starting_step (`int`):
            First value of the API's step counter.
        num_steps (`int`):
            Number of steps after which environments stop that follow the trainer (`--env.total_steps -1`).
    """

    wandb_group: str
    wandb_project: str
    batch_size: int
    max_token_len: int
    checkpoint_dir: str
    save_checkpoint_interval: int
    starting_step: int
    num_steps: int


@dataclass(frozen=True)
class ApiStatus:
    """What `/status` shows.

    Args:
        current_step (`int`):
            `starting_step` plus the number of batches formed. Neither a policy version nor a count of batches served.
        queue_size (`int`):
            Number of groups in the queue, without those in batches that are formed and not yet served.
    """

    current_step: int
    queue_size: int


@dataclass(frozen=True)
class EnvironmentStatus:
    """What `/status-env` shows of one environment.

    Args:
        env_id (`int`):
            The API's number of the environment, from 0 in the order of registration.
        self_queue_size (`int`):
            Number of groups of the environment in the queue, in units of the group size that it registered.
        max_group_size (`int`):
            Rollouts of the largest group in the queue, of whichever environment; 1 if the queue is empty.
        unallocated_fraction (`float`):
            Share of a batch, 0 to 1, that no environment's `min_batch_allocation` promises.
    """

    env_id: int
    self_queue_size: int
    max_group_size: int
    unallocated_fraction: float


class AtroposClient:
    """The trainer's side of the Atropos API. Use it in one process only, rank 0: batches are shared, not copied.

    Args:
        base_url (`str`):
            Root of the API, for example `http://localhost:8000`. A key, if the API asks for one, is the password in it:
            `http://trainer:KEY@localhost:8000`.
        connect_timeout_s (`float`, *optional*, defaults to 5.0):
            Longest wait for a connection, in seconds.
        read_timeout_s (`float`, *optional*, defaults to 600.0):
            Longest silence of the API while it answers, in seconds. Long, because giving up on `/batch` loses a batch.

    `keeps_batches` is whether the API that answered last keeps a batch until it is acknowledged, and everything else over a
    restart: whether it is `trl-atropos api`.

    Raises:
        PreflightError: `base_url` is not an http(s) URL.
    """

    def __init__(self, base_url: str, *, connect_timeout_s: float = 5.0, read_timeout_s: float = 600.0):
        self.base_url, credentials = _without_credentials(_checked_url(base_url))
        self.keeps_batches = False
        self.connect_timeout_s = connect_timeout_s
        self.read_timeout_s = read_timeout_s
        self._session = requests.Session()  # its default adapters never retry
        self._proxies = proxies_for(self.base_url)
        self._session.headers["Connection"] = "close"
        self._session.auth = credentials

    def __enter__(self) -> AtroposClient:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Releases the connections. The API is not told: it has no notion of a trainer that leaves."""
        self._session.close()

    def wait_until_reachable(self, timeout_s: float) -> None:
        """Waits until the API answers `/info`.

        Args:
            timeout_s (`float`):
                Longest wait in seconds. At least one request is sent.

        Raises:
            AtroposConnectionError: nobody answered in time.
            AtroposProtocolError: something answers that is not the Atropos API.
        """
        reminder, elapsed, delay = Reminder(), 0.0, FIRST_DELAY_S
        while True:
            try:
                self._info(read_timeout_s=min(self.read_timeout_s, max(timeout_s - elapsed, FIRST_DELAY_S)))
                return
            except AtroposConnectionError as exc:
                elapsed = reminder.elapsed_s
                if elapsed >= timeout_s:
                    raise AtroposConnectionError(
                        f"The Atropos API at {self.base_url} did not answer within {timeout_s:g} s.",
                        f"The last attempt: {exc.what}",
                        _START_API,
                    ) from exc
            if reminder.is_due():
                logger.info("Waiting for the Atropos API at %s (%.0f of %g s)", self.base_url, elapsed, timeout_s)
            time.sleep(min(delay, timeout_s - elapsed))
            delay = min(2 * delay, MAX_PROBE_DELAY_S)
            elapsed = reminder.elapsed_s

    def info(self) -> tuple[int, int]:
        """Reads the registration back.

        Returns:
            `tuple[int, int]`: registered `batch_size` and `max_token_len`; the first is -1 without a registration.

        Raises:
            AtroposConnectionError: the API does not answer.
            AtroposProtocolError: the answer is not that of the Atropos API.
        """
        return self._info(self.read_timeout_s)

    def status(self) -> ApiStatus:
        """Reads the step counter and the length of the queue.

        Returns:
            [`ApiStatus`]: as the API shows it now.

        Raises:
            AtroposConnectionError: the API does not answer.
            AtroposProtocolError: the answer is not that of the Atropos API.
        """
        answer = self._exchange("GET", "/status")
        return ApiStatus(_integer(answer, "current_step", "/status"), _integer(answer, "queue_size", "/status"))

    def environment_status(self, env_id: int) -> EnvironmentStatus | None:
        """Reads what the API knows of an environment, as the environment itself does ten times a second.

        Args:
            env_id (`int`):
                The API's number of the environment.

        Returns:
            [`EnvironmentStatus`], *optional*: None for HTTP 500 or 404: no such environment, or all weights sum to 0.

        Raises:
            AtroposConnectionError: the API does not answer.
            AtroposProtocolError: the answer is not that of the Atropos API.
        """
        answer = self._exchange("GET", "/status-env", json={"env_id": env_id}, none_if_failed=True)
        if answer is None:
            return None
        sizes = [_integer(answer, name, "/status-env") for name in ("self_queue_size", "max_group_size")]
        fraction = answer.get("unallocated_fraction")
        if not isinstance(fraction, float):
            raise _not_the_api(f"/status-env answered {_shorten(answer)}, without a number `unallocated_fraction`.")
        return EnvironmentStatus(env_id, sizes[0], sizes[1], fraction)

    def latest_group_size(self) -> int | None:
        """Reads the newest group that reached the queue; it need not be there any more.

        Returns:
            `int`, *optional*: its number of rollouts; 0 if there never was one; None if the API cannot write it as JSON.

        Raises:
            AtroposConnectionError: the API does not answer.
            AtroposProtocolError: the answer is not that of the Atropos API.
        """
        answer = self._exchange("GET", "/latest_example", none_if_failed=True)
        if answer is None:
            return None
        if not isinstance(answer, dict) or not isinstance(answer.get("tokens"), list):
            raise _not_the_api(f"/latest_example answered {_shorten(answer)}, without a list `tokens`.")
        return len(answer["tokens"])

    def register(self, registration: Registration) -> None:
        """Registers this trainer and makes sure that the registration holds.

        `run-api` keeps the first registration for good and answers every later one with success. So a registration with
        other sizes is refused before it is posted, and after posting the sizes are read back. Registering again with
        the same sizes (a trainer that was restarted) is fine: queue and step counter of the API go on. With `trl-atropos api`
        the last registration counts.

        Args:
            registration ([`Registration`]):
                Settings of this run.

        Raises:
            AtroposRegistrationError: another registration holds, or the API takes none because data came before it.
            AtroposProtocolError: the API refuses the values.
            AtroposConnectionError: the API does not answer.
        """
        wanted = (registration.batch_size, registration.max_token_len)
        found = self.info()
        if found[0] != UNREGISTERED and self.keeps_batches:
            if found != wanted:
                logger.warning(
                    f"The API at {self.base_url} was registered with batch_size {found[0]} and max_token_len {found[1]}. From "
                    f"now on they are {wanted[0]} and {wanted[1]}; environments that run keep the old max_token_len."
                )
        elif found[0] != UNREGISTERED:
            self._compare(found, wanted)
            logger.warning(
                "The Atropos API at %s is registered already, with the same sizes: its queue and its step counter go "
                "on, `starting_step=%d` has no effect. If another trainer still uses it, the two split the batches.",
                self.base_url,
                registration.starting_step,
            )
        answer = self._exchange("POST", "/register", json=asdict(registration))
        if not isinstance(answer, dict) or "uuid" not in answer:
            raise _not_the_api(f"POST {self.base_url}/register answered {_shorten(answer)}, without `uuid`.")

        found = self.info()
        if found[0] == UNREGISTERED:
            raise AtroposRegistrationError(
                f"The Atropos API at {self.base_url} took the registration, but /info still answers batch_size -1.",
                "An environment posted data before the trainer registered; the API then skips every registration.",
                _RESTART,
            )
        self._compare(found, wanted)

    def reset_data(self) -> None:
        """Empty the API: queue, registration and environments are gone, and environments that still run will end.

        The only cure of an API that took data before a trainer registered.

        Raises:
            AtroposConnectionError: the API does not answer.
            AtroposProtocolError: the answer is an error.
        """
        self._exchange("GET", "/reset_data", is_json=False)

    def fetch_batch(self, trainer: str | None = None, number: int | None = None) -> list[Any] | None:
        """Takes a batch out of the API: the newest of `run-api`, the oldest of `trl-atropos api`. The request is sent once.

        Args:
            trainer (`str`, *optional*):
                A name that no other trainer has. With it, `trl-atropos api` keeps the batch until `acknowledge`, and answers
                with the same one as long as it is asked for the same number. `run-api` takes no notice.
            number (`int`, *optional*):
                Number of the batch, by the trainer's own count; given if `trainer` is.

        Returns:
            `list`, *optional*: the groups of one batch, as JSON gave them, or None if no batch is formed yet.

        Raises:
            AtroposConnectionError: the API does not answer; the message says whether a batch can be lost.
            AtroposRegistrationError: no trainer is registered, or the registration was wiped by `/reset_data`.
            AtroposBatchGivenAway: the batch before was not acknowledged in time.
            AtroposProtocolError: the answer is an error or not a batch.
        """
        query = "" if trainer is None else f"?trainer={trainer}&number={number}"
        answer = self._exchange("GET", f"/batch{query}", loses_batch=not (self.keeps_batches and query))
        if isinstance(answer, dict) and answer.get("status") == "error":
            raise AtroposRegistrationError(
                f"The Atropos API at {self.base_url} gives no batch: {_shorten(answer.get('message'))}.",
                "This trainer is not registered there, or the API was restarted since.",
                _RESTART,
            )
        if not isinstance(answer, dict) or "batch" not in answer:
            raise _not_the_api(f"GET {self.base_url}/batch answered {_shorten(answer)}, without `batch`.")
        batch = answer["batch"]
        if batch is not None and (not isinstance(batch, list) or not batch):
            raise _not_the_api(f"GET {self.base_url}/batch answered with the batch {_shorten(batch)}.")
        return batch

    def acknowledge(self, trainer: str, number: int, num_groups: int) -> bool:
        """Tells `trl-atropos api` that a batch is safe with this trainer, so that it is not handed out again.

        Args:
            trainer (`str`):
                The name with which the batch was fetched.
            number (`int`):
                Its number, by the trainer's own count.
            num_groups (`int`):
                Number of its groups that the trainer has.

        Returns:
            `bool`: False if the batch had more groups: the API keeps it, to be fetched again.

        Raises:
            AtroposConnectionError: the API does not answer. Then acknowledge it again.
            AtroposBatchGivenAway: the batch went to others, and must not be trained.
            AtroposProtocolError: the answer is another error.
        """
        body = {"trainer": trainer, "number": number, "num_groups": num_groups}
        answer = self._exchange("POST", "/acknowledge", json=body)
        if not isinstance(answer, dict) or answer.get("status") not in ("success", "incomplete"):
            raise _not_the_api(
                f"POST {self.base_url}/acknowledge answered {_shorten(answer)}, without a `status` of ours."
            )
        return bool(answer["status"] == "success")

    def metrics(self) -> dict[str, float]:
        """Reads `/metrics` of `trl-atropos api`; `run-api` has no such route.

        Returns:
            `dict[str, float]`: value by name, without the prefix `trl_atropos_api_`.

        Raises:
            AtroposConnectionError: the API does not answer within 10 s.
            AtroposProtocolError: the answer is none of `trl-atropos api`.
        """
        timeout_s = min(self.read_timeout_s, METRICS_TIMEOUT_S)
        text = self._exchange("GET", "/metrics", is_json=False, read_timeout_s=timeout_s)
        values = {}
        for line in text.splitlines():
            name, _, value = line.partition(" ")
            if name.startswith(METRICS_PREFIX):
                try:
                    values[name.removeprefix(METRICS_PREFIX)] = float(value)
                except ValueError as exc:
                    raise _not_the_api(f"/metrics answered the line {_shorten(line)}.") from exc
        missing = METRICS_OF_THE_API - values.keys()
        if missing:
            raise _not_the_api(f"/metrics answered without {', '.join(sorted(missing))}.")
        return values

    def _compare(self, found: tuple[int, int], wanted: tuple[int, int]) -> None:
        if found != wanted:
            raise AtroposRegistrationError(
                f"The Atropos API at {self.base_url} is registered with batch_size {found[0]} and max_token_len "
                f"{found[1]}, this trainer needs {wanted[0]} and {wanted[1]}.",
                "The first registration wins for as long as the API runs: another trainer's, or an earlier run's.",
                "Start another API for this run (`run-api --port PORT`), or restart this one and its environments.",
            )

    def _info(self, read_timeout_s: float) -> tuple[int, int]:
        answer = self._exchange("GET", "/info", read_timeout_s=read_timeout_s)
        return _integer(answer, "batch_size", "/info"), _integer(answer, "max_token_len", "/info")

    def _exchange(
        self,
        method: str,
        path: str,
        *,
        json: dict[str, Any] | None = None,
        read_timeout_s: float | None = None,
        is_json: bool = True,
        none_if_failed: bool = False,
        loses_batch: bool = False,
    ) -> Any:
        """One request, sent once; returns the JSON of a 200 answer, or its text; None for a 500 if that is asked for.

        `loses_batch` is whether a batch may be lost with the answer.
        """
        request = f"{method} {self.base_url}{path}"
        timeout = (self.connect_timeout_s, self.read_timeout_s if read_timeout_s is None else read_timeout_s)
        with _requests_errors_mapped(request, takes_batch=loses_batch):
            try:
                # A redirect would send the request a second time.
                response = self._session.request(
                    method,
                    self.base_url + path,
                    json=json,
                    timeout=timeout,
                    allow_redirects=False,
                    proxies=dict(self._proxies),
                )
            finally:
                # A kept connection that the server closes at the moment of the next request looks like a lost answer.
                # A fresh one per request tells "nobody listens, nothing sent" from "sent, answer lost".
                self._session.close()
            self.keeps_batches = DURABLE_API_HEADER in response.headers
            if response.status_code == 200:
                return response.json() if is_json else response.text
            # 404 of another service is not about environments.
            if none_if_failed and response.status_code in ((404, 500) if self.keeps_batches else (500,)):
                return None
        raise self._http_error(request, response, takes_batch=path.startswith("/batch"))

    def _http_error(self, request: str, response: requests.Response, *, takes_batch: bool) -> TrlAtroposError:
        what = f"{request} answered HTTP {response.status_code}: {_shorten(response.text)}."
        if response.status_code == 401:
            return AtroposProtocolError(
                what,
                "The API asks for a key.",
                "Give it in the URL: `--atropos_api_url http://trainer:KEY@HOST:PORT`.",
            )
        if self.keeps_batches and response.status_code == 409:
            return AtroposBatchGivenAway(
                what,
                "The trainer was silent for longer than `--lease_timeout_s` of `trl-atropos api`.",
                "Nothing is to be done for this batch; raise that option if the trainer may be silent for so long.",
            )
        if self.keeps_batches and response.status_code == 503:
            return AtroposConnectionError(
                what,
                "The API cannot read or write its database. It keeps what it holds.",
                "Free or mend the disk of the API; the trainer asks again.",
            )
        if takes_batch and response.status_code >= 500:
            # Without a queue /batch also ends in a 500. Only /info tells that from a batch that cannot be written.
            if self.info()[0] == UNREGISTERED:
                return AtroposRegistrationError(what, "The registration was wiped by /reset_data.", _RESTART)
            return AtroposBatchLost(
                what,
                "One batch is lost: the API took it out of its queue and could not write it as JSON. The usual cause "
                "is NaN or infinity in the `scores` that an environment posted.",
                "Mend the score function of the environment, then start the trainer again; the API may keep running.",
            )
        if response.status_code == 422:
            return AtroposProtocolError(
                what, "The API refuses a value of the request; its own words name it.", "Correct that setting."
            )
        return _not_the_api(what)


@contextmanager
def _requests_errors_mapped(request: str, *, takes_batch: bool) -> Iterator[None]:
    """The only place where errors of `requests` become ours."""
    lost = " A batch may be lost: /batch gives each one away once." if takes_batch else ""
    try:
        yield
    except (requests.exceptions.RequestException, ValueError) as exc:
        # A plain ValueError is that of an integer with more digits than Python reads.
        unreadable = (requests.exceptions.InvalidJSONError, requests.exceptions.ContentDecodingError)
        if isinstance(exc, unreadable) or not isinstance(exc, requests.exceptions.RequestException):
            raise AtroposProtocolError(
                f"{request} answered something that is not JSON ({type(exc).__name__}: {_shorten(str(exc))}).",
                f"Another service listens there, or a proxy stands in between.{lost}",
                _START_API,
            ) from exc
        if _was_never_sent(exc):
            raise AtroposConnectionError(
                f"{request} reached nobody ({_root_cause(exc)}).",
                "Nothing was sent, so nothing is lost. The API is not started, or listens elsewhere.",
                _START_API,
            ) from exc
        raise AtroposAnswerLost(
            f"{request} was sent, but the answer did not arrive whole ({_root_cause(exc)}).",
            f"The API died, stalls, or the network broke.{lost}",
            "Read the log of `run-api`. If it is alive and busy, raise `read_timeout_s` of AtroposClient; then start "
            "the trainer again.",
        ) from exc


def _was_never_sent(exc: requests.exceptions.RequestException) -> bool:
    if isinstance(exc, requests.exceptions.ConnectTimeout):
        return True
    # requests wraps urllib3's MaxRetryError, whose `reason` is what really happened.
    return bool(exc.args) and isinstance(getattr(exc.args[0], "reason", None), NewConnectionError)


def _root_cause(exc: BaseException) -> str:
    while exc.__context__ is not None:
        exc = exc.__context__
    return f"{type(exc).__name__}: {exc}"


def _checked_url(base_url: str) -> str:
    try:
        parts = urlsplit(base_url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not a number, an unclosed bracket
        valid = False
    if not valid:
        raise PreflightError(
            f"The URL of the Atropos API is {base_url!r}.",
            "It needs a scheme and a host, and a port that is a number.",
            "Give it as in `--atropos_api_url http://localhost:8000`.",
        )
    return base_url.rstrip("/")


def _without_credentials(base_url: str) -> tuple[str, tuple[str, str] | None]:
    """The URL as it may be shown, and the user and the password in it."""
    parts = urlsplit(base_url)
    if parts.password is None:
        return base_url, None
    shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return shown, (unquote(parts.username or ""), unquote(parts.password))


def _integer(answer: Any, name: str, path: str) -> int:
    value = answer.get(name) if isinstance(answer, dict) else None
    if type(value) is not int:
        raise _not_the_api(f"{path} answered {_shorten(answer)}, without an integer `{name}`.")
    return value


def _not_the_api(what: str) -> AtroposProtocolError:
    return AtroposProtocolError(what, "This is not how the Atropos API of atroposlib 0.4.0 answers.", _START_API)


def _shorten(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 500 else f"{text[:500]}..."
