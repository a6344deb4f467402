"""Why agents behind a gateway train nothing: its traps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .finding import NOT_ASKED, Check, Unread, known


MASKED_SHARE = 0.5
"""Of the sampled tokens; above it most of what agents sample is not trained."""


@dataclass(frozen=True)
class GatewayFacts:
    """What a look at a gateway showed, or what is known of one that a launch is going to start; `error` says why there is nothing
    else to know.

    `takes_key` is whether the key that was given opens the control routes. `absent_servers` are the URLs of inference servers
    that do not answer it, `missing_routes` has by URL the routes for tokens that one lacks, and `models` the name of the model
    of each. `num_waiting_groups` are those that were not posted at a first and at a second look, `num_lost_groups` those that
    were given up. Of `num_sampled_tokens`, `masked_tokens` are not trained, by reason. `temperature` and
    `max_rollout_tokens` are options of the gateway, `trainer_temperature` and `max_length` (tokens) of the trainer.
    """

    url: str
    error: str | Unread | None = NOT_ASKED
    takes_key: bool | Unread = NOT_ASKED
    absent_servers: tuple[str, ...] | Unread = NOT_ASKED
    missing_routes: Mapping[str, tuple[str, ...]] | Unread = NOT_ASKED
    models: Mapping[str, str] | Unread = NOT_ASKED
    num_waiting_groups: tuple[int, int] | Unread = NOT_ASKED
    num_lost_groups: int | Unread = NOT_ASKED
    num_sessions: int | Unread = NOT_ASKED
    num_sampled_tokens: int = 0
    masked_tokens: Mapping[str, int] = field(default_factory=dict)
    temperature: float | Unread = NOT_ASKED
    trainer_temperature: float | Unread = NOT_ASKED
    max_rollout_tokens: int | Unread = NOT_ASKED
    max_length: int | Unread = NOT_ASKED


def _unreachable(facts: GatewayFacts) -> str | None:
    error = known(facts.error)
    return f"The gateway at {facts.url} {error}." if error is not None else None


def _key(facts: GatewayFacts) -> str | None:
    return None if known(facts.takes_key) else f"The gateway at {facts.url} does not take this key."


def _servers(facts: GatewayFacts) -> str | None:
    absent = known(facts.absent_servers)
    return f"The gateway at {facts.url} does not reach {', '.join(absent)}." if absent else None


def _token_routes(facts: GatewayFacts) -> str | None:
    missing = [f"{url} has no {', '.join(routes)}" for url, routes in known(facts.missing_routes).items() if routes]
    return f"A server behind the gateway lacks routes for tokens: {'; '.join(missing)}." if missing else None


def _model(facts: GatewayFacts) -> str | None:
    names = known(facts.models)
    if len(set(names.values())) < 2:
        return None
    return f"Servers behind the gateway serve {', '.join(f'{name} ({url})' for url, name in names.items())}."


def _groups_lost(facts: GatewayFacts) -> str | None:
    return f"The gateway has given up {facts.num_lost_groups} groups." if known(facts.num_lost_groups) else None


def _groups_wait(facts: GatewayFacts) -> str | None:
    first, last = known(facts.num_waiting_groups)
    return f"{last} groups wait in the gateway and the API takes none." if 0 < first <= last else None


def _without_sessions(facts: GatewayFacts) -> str | None:
    return None if known(facts.num_sessions) else f"Nobody has opened a session of the gateway at {facts.url}."


def _masked(facts: GatewayFacts) -> str | None:
    num_masked = sum(facts.masked_tokens.values())
    if num_masked <= MASKED_SHARE * facts.num_sampled_tokens:
        return None
    reasons = ", ".join(f"{reason} {number}" for reason, number in facts.masked_tokens.items())
    return f"{num_masked} of {facts.num_sampled_tokens} tokens that agents sampled are not trained: {reasons}."


def _temperature(facts: GatewayFacts) -> str | None:
    if known(facts.temperature) == known(facts.trainer_temperature):
        return None
    return f"The gateway samples at temperature {facts.temperature:g}, the trainer's is {facts.trainer_temperature:g}."


def _lengths(facts: GatewayFacts) -> str | None:
    if known(facts.max_rollout_tokens) <= known(facts.max_length):
        return None
    return f"Conversations behind the gateway may have {facts.max_rollout_tokens} tokens, the trainer takes {facts.max_length}."


GATEWAY_CHECKS: tuple[Check[GatewayFacts], ...] = (
    Check(
        "gateway_unreachable",
        "error",
        _unreachable,
        "Agents reach no model.",
        "Start it with `trl-atropos gateway`, or correct --gateway-url.",
        hides_others=True,
        needs=("error",),
    ),
    Check(
        "gateway_key",
        "error",
        _key,
        "Sessions can neither be opened nor rewarded with it.",
        "Give the file of the gateway's own `--key_file` with --gateway-key-file; a launch writes gateway.key into its run_dir.",
        hides_others=True,
        needs=("takes_key",),
    ),
    Check(
        "gateway_servers",
        "error",
        _servers,
        "While no server is there, requests of agents wait, and fail after `--server_wait_s`.",
        "Look at the log of that server and start it again, or correct `--servers`.",
        needs=("absent_servers",),
    ),
    Check(
        "gateway_token_routes",
        "error",
        _token_routes,
        "A gateway renders, samples and parses through them.",
        "Start the server with `trl vllm-serve` (vLLM 0.32 or newer), or `vllm serve --enable-scale-out`; SGLang: 0.5.22 or newer.",
        needs=("missing_routes",),
        describe=lambda facts: "The servers behind the gateway have the routes for tokens.",
    ),
    Check(
        "gateway_model",
        "warning",
        _model,
        "A session that moves to another server would go on with another model.",
        "Name servers of one model in `--servers`.",
        needs=("models",),
    ),
    Check(
        "gateway_groups_lost",
        "warning",
        _groups_lost,
        "The API refused them, or the answer to their post was lost and `run-api` may have them; or nobody went on with their task.",
        "Look for event=group_lost and event=group_idle in the gateway's log; `trl-atropos api` recognises a post that comes again.",
        needs=("num_lost_groups",),
    ),
    Check(
        "gateway_groups_waiting",
        "warning",
        _groups_wait,
        "The API is not there, or its queue is full because the trainer is slower than the agents.",
        "Look at the API with --api-url, and at event=api_absent in the gateway's log.",
        needs=("num_waiting_groups",),
    ),
    Check(
        "gateway_without_sessions",
        "warning",
        _without_sessions,
        "Only what is sampled in a session is trained.",
        "Let the program that runs agents ask `POST /session`, and look at its log.",
        needs=("num_sessions",),
    ),
    Check(
        "gateway_masked",
        "warning",
        _masked,
        "The run pays for sampling and learns little.",
        "docs/agents.md says what is masked; `--grammar lift` trains turns that were forced.",
        needs=("num_sessions",),
    ),
    Check(
        "gateway_temperature",
        "error",
        _temperature,
        "Logprobs are those of the policy at the trainer's temperature.",
        "Give both the same: `--temperature` of the trainer, `temperature` in `gateway_args`.",
        needs=("temperature", "trainer_temperature"),
        describe=lambda facts: f"Gateway and trainer have temperature {facts.temperature:g}.",
    ),
    Check(
        "gateway_lengths",
        "warning",
        _lengths,
        "The trainer refuses a whole group for one rollout that is too long.",
        "`--max_length` of the trainer, which a launch passes on; or a smaller `max_rollout_tokens` in `gateway_args`.",
        needs=("max_rollout_tokens", "max_length"),
        describe=lambda facts: (
            f"Conversations have up to {facts.max_rollout_tokens} tokens, max_length is {facts.max_length}."
        ),
    ),
)
