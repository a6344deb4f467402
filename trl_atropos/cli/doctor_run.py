"""What `trl-atropos doctor` does: ask both servers and say what was seen."""

from __future__ import annotations

import os

from rich.console import Console

from ..checks.api import API_CHECKS, ApiFacts, inspect_api
from ..checks.finding import Finding, Unread, diagnose
from ..checks.gateway import GATEWAY_CHECKS, GatewayFacts
from ..checks.vllm import VLLM_CHECKS, InferenceServerFacts, inspect_inference_server
from ..weight_sync.http import UNKNOWN, ServerSession
from ..wire.client import AtroposClient
from .findings import print_findings
from .gateway_look import inspect_gateway
from .progress import say


TIMEOUT_S = 10.0
"""Longest wait for one answer."""


def run_doctor(
    api_url: str,
    *,
    vllm_url: str | None = None,
    gateway_url: str | None = None,
    gateway_key: str | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    watch_s: float = 3.0,
) -> list[Finding]:
    """Look at the servers, print a table of what was found, and return it.

    `batch_size` (rollouts of one optimizer step) and `max_length` (tokens) are those of the trainer, to compare with;
    `watch_s` is how long each server is watched for a change, in seconds. Without `vllm_url` the vLLM server is left
    out, without `gateway_url` the gateway, of which `gateway_key` opens the counts. Per server there are its errors and warnings, or one finding with the level `"ok"`.

    Raises:
        PreflightError: a URL or the API key cannot be sent.
    """
    findings = _examine_api(api_url, batch_size, max_length, watch_s)
    if vllm_url is not None:
        findings += _examine_vllm(vllm_url, max_length, watch_s)
    if gateway_url is not None:
        findings += _examine_gateway(gateway_url.rstrip("/"), gateway_key, watch_s)
    print_findings(Console(), findings)
    return findings


def _examine_api(url: str, batch_size: int | None, max_length: int | None, watch_s: float) -> list[Finding]:
    with AtroposClient(url, connect_timeout_s=TIMEOUT_S, read_timeout_s=TIMEOUT_S) as client:
        say(
            f"Asking the Atropos API at {client.base_url}, and again after {watch_s:g} s (at most {TIMEOUT_S:g} s each)"
        )
        facts = inspect_api(
            client,
            watch_s=watch_s,
            expected_batch_size=batch_size,
            # A trainer registers one more: environments drop a group at max_token_len.
            expected_max_token_len=None if max_length is None else max_length + 1,
        )
    return diagnose(facts, API_CHECKS) or [Finding("api", "ok", _describe_api(facts))]


def _examine_vllm(url: str, max_length: int | None, watch_s: float) -> list[Finding]:
    with ServerSession(url.rstrip("/"), TIMEOUT_S, os.environ.get("VLLM_API_KEY"), kind=UNKNOWN) as session:
        say(f"Asking the inference server at {session.base_url} (at most {TIMEOUT_S:g} s per answer)")
        facts = inspect_inference_server(session, watch_s=watch_s, max_length=max_length)
    return diagnose(facts, VLLM_CHECKS) or [Finding("vllm", "ok", _describe_vllm(facts))]


def _examine_gateway(url: str, key: str | None, watch_s: float) -> list[Finding]:
    say(f"Asking the gateway at {url}, and again after {watch_s:g} s (at most {TIMEOUT_S:g} s each)")
    server_key = os.environ.get("VLLM_API_KEY")
    facts = inspect_gateway(url, key, server_key, watch_s=watch_s, timeout_s=TIMEOUT_S)
    return diagnose(facts, GATEWAY_CHECKS) or [Finding("gateway", "ok", _describe_gateway(facts))]


def _describe_gateway(facts: GatewayFacts) -> str:
    if isinstance(facts.takes_key, Unread):
        return f"The gateway at {facts.url} answers. {facts.takes_key.why}"
    return (
        f"The gateway at {facts.url} reaches its servers, has had {facts.num_sessions} sessions, and "
        f"{sum(facts.masked_tokens.values())} of {facts.num_sampled_tokens} sampled tokens are masked."
    )


def _describe_api(facts: ApiFacts) -> str:
    return (
        f"The Atropos API at {facts.url} has batch_size {facts.info[0]} (rollouts), max_token_len {facts.info[1]}, "
        f"current_step {facts.status.current_step}, queue_size {facts.status.queue_size} (groups) and "
        f"{len(facts.environments)} environments."
    )


def _describe_vllm(facts: InferenceServerFacts) -> str:
    published = "no policy published yet" if facts.weight_version == "default" else "the policy published last"
    return (
        f"The {facts.kind} server at {facts.url} answers /generate and takes publishes; it serves weight_version "
        f"{facts.weight_version} ({published})."
    )
