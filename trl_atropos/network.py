"""What all HTTP of this package shares: no proxy for what runs on this machine, sockets that send at once, and one header."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit


POLICY_VERSION_HEADER = "x-atropos-policy-version"
"""In an answer of the inference server that an adapter gave: the number of the policy that the adapter was published as."""


def is_this_machine(host: str) -> bool:
    """Whether a host, given by name or address, is this machine by its loopback."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def proxies_for(base_url: str) -> dict[str, str]:
    """What `requests` takes as `proxies` for a service: those of the environment (`http_proxy` and the like), or none for
    this machine, whatever `no_proxy` says.
    """
    host = urlsplit(base_url).hostname or ""
    return {"no_proxy": host} if is_this_machine(host) else {}


def listening_socket(host: str, port: int, backlog: int) -> socket.socket:
    """Open a TCP socket for a server; `backlog` connections may wait in it, and port 0 is any free one.

    Its connections send at once. asyncio sees to that only where the socket names its protocol, which those of
    `socket.create_server` do not: then the body of an answer, sent behind its head, waits up to 40 ms for the client's
    delayed acknowledgement.

    Raises:
        OSError: The address is taken, or not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=backlog)
    # Accepted connections inherit it.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
