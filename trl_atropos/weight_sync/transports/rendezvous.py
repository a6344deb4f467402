"""Where a group of trainer and workers meets: an address that the server can reach, and a port that is ours."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from ...errors import WeightSyncError


def local_address_towards(host: str) -> str:
    """The address of this machine from which packets to a host, given by name or address, leave: loopback for this
    machine.

    Raises:
        [`WeightSyncError`]: if the host is unknown or cannot be reached.
    """
    try:
        # Nothing is sent: connecting a datagram socket only chooses the route. Any port will do. IPv4 first, where a
        # name has both: vLLM's workers meet nobody at ::1.
        found = sorted(socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM), key=lambda row: row[0] != socket.AF_INET)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            own: str = probe.getsockname()[0]
            return own
    except OSError as exc:
        raise WeightSyncError(
            f"There is no route to {host}: {exc}.",
            "The workers of the server have to reach the trainer through one of its addresses.",
            "Correct the server's address (--vllm_server_base_url), or name the trainer's own with --vllm_group_host.",
        ) from exc


def server_host(base_url: str) -> str:
    """The host in a server's URL."""
    return urlsplit(base_url).hostname or ""


def bind(host: str, port: int) -> socket.socket:
    """Bind a listening TCP socket to one address of this machine only; port 0 takes a free one.

    Raises:
        [`WeightSyncError`]: if the address is not of this machine or the port is taken.
    """
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        # A port that a run of a minute ago has left is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as exc:
        if listener is not None:
            listener.close()
        raise WeightSyncError(
            f"The trainer cannot listen on {host} port {port}: {exc.strerror or exc}.",
            "The workers of the server meet the trainer there.",
            "Choose another port with --vllm_group_port (0 takes a free one), or another address of this machine with "
            "--vllm_group_host.",
        ) from exc
    return listener
