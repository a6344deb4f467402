"""What all HTTP of this package shares: what runs on this machine is not asked through a proxy, and one header."""

from __future__ import annotations

import ipaddress
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
