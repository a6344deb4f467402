"""What `doctor` and `preflight` see of a gateway and of the servers behind it. It asks, and changes nothing."""

from __future__ import annotations

import time
from typing import Any

import requests

from ..checks.finding import Unread
from ..checks.gateway import GatewayFacts
from ..gateway import sglang
from ..gateway.servers import ROUTES
from ..network import proxies_for


NO_KEY = Unread("The gateway's counts need its key: --gateway-key-file.")


def inspect_gateway(
    url: str, key: str | None, server_key: str | None, *, watch_s: float, timeout_s: float
) -> GatewayFacts:
    """Look at a gateway, twice within `watch_s` seconds, and at the servers that it names.

    `key` opens its control routes; without it only that it answers is known. `server_key` is that of the servers, and
    `timeout_s` the longest wait for one answer in seconds.
    """
    try:
        healthz = _get(f"{url}/healthz", None, timeout_s)
        if healthz.status_code != 200:
            return GatewayFacts(url, error=f"answers {healthz.status_code}, as no gateway does")
        if key is None:
            return GatewayFacts(url, error=None, takes_key=NO_KEY)
        first = _get(f"{url}/status", key, timeout_s)
        if first.status_code == 401:
            return GatewayFacts(url, error=None, takes_key=False)
        time.sleep(watch_s)
        before, status = first.json(), _get(f"{url}/status", key, timeout_s).json()
        servers = [server["url"] for server in status["servers"] if server["is_there"]]
        looks = {server: look_at_server(server, server_key, timeout_s) for server in servers}
        return GatewayFacts(
            url,
            error=None,
            takes_key=True,
            absent_servers=tuple(server["url"] for server in status["servers"] if not server["is_there"]),
            missing_routes={
                server: look[0] for server, look in looks.items() if look is not None and look[0] is not None
            },
            models={server: look[1] for server, look in looks.items() if look is not None},
            num_waiting_groups=(before["num_waiting_groups"], status["num_waiting_groups"]),
            num_lost_groups=status["num_groups_lost"],
            num_sessions=status["num_sessions"],
            num_sampled_tokens=status["num_sampled_tokens"],
            masked_tokens=status["masked_tokens"],
        )
    except requests.RequestException as exc:
        return GatewayFacts(url, error=f"does not answer: {exc}")
    except (KeyError, TypeError) as exc:
        return GatewayFacts(url, error=f"answers /status without {exc}, as no gateway does")


def look_at_server(url: str, key: str | None, timeout_s: float) -> tuple[tuple[str, ...] | None, str] | None:
    """Return the routes for tokens that a server lacks and the name of its model; None if it cannot be asked from here.

    The routes are None where the server shows no documents.
    """
    try:
        documents = _get(f"{url}/openapi.json", key, timeout_s)
        models: list[dict[str, Any]] = _get(f"{url}/v1/models", key, timeout_s).json()["data"]
        model = next(model for model in models if not model.get("parent"))
        routes = sglang.ROUTES if model.get("owned_by") == "sglang" else ROUTES
        missing = [path for path in routes if path not in documents.json()["paths"]] if documents.ok else None
        return None if missing is None else tuple(missing), model["id"]
    except (requests.RequestException, KeyError, TypeError, StopIteration):
        return None


def _get(url: str, key: str | None, timeout_s: float) -> requests.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return requests.get(url, headers=headers, timeout=timeout_s, proxies=proxies_for(url))
