"""The diagnoses as pure functions of facts. What a real API shows in each trap: tests/protocol/test_doctor.py."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from atroposlib.api.utils import grab_exact_from_heterogeneous_queue

from trl_atropos.checks.api import (
    API_CHECKS,
    ApiFacts,
    blocking_group_sizes,
    data_timeout,
    describe_wait,
)
from trl_atropos.checks.finding import NOT_ASKED, Check, Finding, Unread, diagnose, examine
from trl_atropos.checks.server import SERVER_CHECKS
from trl_atropos.checks.vllm import VLLM_CHECKS, InferenceServerFacts
from trl_atropos.data.history import MIN_GROUPS, TRAINER_CHECKS, WINDOW, TrainerFacts, TrainerHistory
from trl_atropos.types import RejectedGroup, Rollout, RolloutGroup
from trl_atropos.weight_sync.http import SGLANG, SGLANG_ROUTES, VLLM_ROUTES
from trl_atropos.wire.client import ApiStatus, EnvironmentStatus
from trl_atropos.wire.parse import WireLimits, parse_batch


URL = "http://api"


def environment(env_id: int = 0, queue: int = 0, largest: int = 1, unallocated: float = 1.0) -> EnvironmentStatus:
    return EnvironmentStatus(env_id, queue, largest, unallocated)


def facts(step: int = 5, queue: int = 0, before: int | None = None, **fields: Any) -> ApiFacts:
    """A registered API with batches of 4 rollouts whose queue held `before` groups, the same if not given, 3 s ago."""
    first, last = ApiStatus(step, queue if before is None else before), ApiStatus(step, queue)
    return ApiFacts(URL, **{"info": (4, 33), "first_status": first, "status": last, "watch_s": 3.0, **fields})


def names(api: ApiFacts) -> list[str]:
    return [finding.name for finding in diagnose(api, API_CHECKS)]


# The packing rule, against the API's own


def rest_of(supply: list[int], batch_size: int) -> int:
    """Rollouts that are left in the queue after groups of these sizes came and the API formed what it could."""
    queue: list[dict] = []
    for size in supply:
        queue.append({"tokens": [[0]] * size})
        batch, queue = grab_exact_from_heterogeneous_queue(queue, batch_size)
        assert batch is None or sum(len(group["tokens"]) for group in batch) == batch_size
    return sum(len(group["tokens"]) for group in queue)


@pytest.mark.parametrize("batch_size", [1, 4, 6, 8, 12])
def test_sizes_block_exactly_where_the_packing_of_the_api_can_get_stuck(batch_size):
    order = random.Random(0)
    num_blocking = 0
    for count in (1, 2, 3):
        for sizes in itertools.combinations(range(1, 9), count):
            # What may wait for its pack and its batch: less than a batch, and less than a pack of each size.
            limit = batch_size + max(sizes) * count
            blocking = blocking_group_sizes(sizes, batch_size)
            num_blocking += bool(blocking)
            if blocking:
                # One of the largest, and then only those that do not pack with it.
                assert rest_of([max(sizes)] + [blocking[0]] * 100, batch_size) > limit, sizes
            else:
                assert rest_of(order.choices(sizes, k=200), batch_size) < limit, sizes
    assert 0 < num_blocking < 8 + 28 + 56


@pytest.mark.parametrize(
    ("sizes", "batch_size", "blocking"),
    [
        ([], 4, []),
        ([4, 2, 2, 1], 4, []),
        ([3, 3], 4, [3]),  # 4 is no multiple of 3
        ([8], 4, [8]),
        ([3, 1], 4, [3]),  # packs of 3
        ([4, 3], 4, [3]),  # threes never fill a pack of 4
        ([6, 4], 12, [4]),
        ([6, 4], 8, [4, 6]),
    ],
)
def test_the_sizes_that_block_are_named(sizes, batch_size, blocking):
    assert blocking_group_sizes(sizes, batch_size) == blocking


# The API

HEALTHY = facts(queue=1, latest_group_size=2, environments=(environment(queue=1, largest=2),))


@pytest.mark.parametrize(
    "healthy",
    [
        HEALTHY,
        # A queue that the trainer drains, or that an environment fills.
        facts(queue=1, before=9, latest_group_size=1, environments=(environment(queue=1),)),
        facts(queue=0, before=1, latest_group_size=1, environments=(environment(),)),
        replace(HEALTHY, expected_batch_size=4, expected_max_token_len=33),
    ],
)
def test_nothing_is_found_where_nothing_is_wrong(healthy):
    assert names(healthy) == []


FRESH = ApiFacts(URL)
RESET = ApiFacts(URL, info=(-1, 33), latest_group_size=4)

API_CASES = {
    "api_unreachable": [replace(FRESH, error="GET /info reached nobody.")],
    "data_before_register": [
        replace(FRESH, latest_group_size=4),
        # Not even readable.
        replace(FRESH, latest_group_size=None),
        replace(RESET, first_status=ApiStatus(0, 1), status=ApiStatus(0, 1)),
    ],
    "api_restarted": [replace(FRESH, has_waiting_trainer=True)],
    "registration_wiped": [RESET, replace(RESET, has_waiting_trainer=True)],
    "unregistered": [FRESH],
    "other_registration": [
        replace(HEALTHY, expected_batch_size=8),
        replace(HEALTHY, expected_max_token_len=65),
    ],
    "unwritable_group": [replace(HEALTHY, latest_group_size=None)],
    "group_larger_than_batch": [
        facts(queue=1, latest_group_size=8),
        facts(queue=2, latest_group_size=4, environments=(environment(queue=2, largest=8),)),
    ],
    "group_sizes_do_not_pack": [
        facts(queue=1, latest_group_size=3),
        facts(queue=2, latest_group_size=1, environments=(environment(queue=2, largest=3),)),
        facts(queue=2, latest_group_size=3, environments=(environment(queue=2, largest=4),)),
    ],
    "allocation_without_data": [
        facts(queue=3, latest_group_size=1, environments=(environment(0, 3, 1, 0.5), environment(1, 0, 1, 0.5))),
    ],
    "no_environment": [facts()],
    "silent_environment": [
        facts(environments=(environment(),)),
        facts(latest_group_size=2, environments=(environment(),)),
    ],
    "batch_never_forms": [
        facts(queue=4, latest_group_size=1),
        facts(queue=1, latest_group_size=2, has_waiting_trainer=True),
    ],
    "lifo_ageing": [
        # 4 groups of 2 are two batches of 4.
        facts(queue=4, before=5, latest_group_size=2, environments=(environment(queue=4, largest=2),)),
    ],
}


def test_every_check_of_the_api_has_a_case():
    assert list(API_CASES) == [check.name for check in API_CHECKS]


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in API_CASES.items() for case in cases])
def test_a_trap_of_the_api_is_the_first_thing_that_is_found(name, case):
    assert names(case)[0] == name


@pytest.mark.parametrize(
    ("name", "harmless"),
    [
        # /info of a registered API and of one that was not, the newest group of a former life, a queue that moves.
        ("data_before_register", RESET),
        ("registration_wiped", FRESH),
        ("api_restarted", replace(RESET, has_waiting_trainer=True)),
        ("unregistered", replace(FRESH, has_waiting_trainer=True)),
        ("other_registration", replace(FRESH, expected_batch_size=8)),
        ("group_larger_than_batch", facts(queue=1, latest_group_size=4)),
        ("group_sizes_do_not_pack", facts(queue=0, latest_group_size=3)),
        ("group_sizes_do_not_pack", facts(queue=1, latest_group_size=8)),
        ("allocation_without_data", facts(queue=1, environments=(environment(0, 1), environment(1)))),
        ("no_environment", facts(queue=1)),
        ("silent_environment", facts(queue=0, before=1, environments=(environment(),))),
        ("batch_never_forms", facts(queue=3)),
        ("batch_never_forms", facts(queue=4, before=8)),
        ("batch_never_forms", replace(facts(queue=4), first_status=ApiStatus(4, 4))),
        ("lifo_ageing", facts(queue=7, environments=(environment(queue=7),))),
    ],
)
def test_a_trap_is_not_found_where_it_only_looks_like_it(name, harmless):
    assert name not in names(harmless)


def test_of_an_api_that_does_not_answer_nothing_else_is_said():
    assert names(replace(FRESH, error="Nobody.")) == ["api_unreachable"]


def test_a_finding_tells_the_values():
    (finding,) = diagnose(facts(queue=1, latest_group_size=3), API_CHECKS)

    assert finding.what == "Groups of 3 rollouts are in the queue, a batch has 4: those of 3 do not pack."
    assert finding.level == "error"
    assert str(finding) == f"{finding.what} {finding.why} {finding.fix}"


# The trainer

TIED_GROUPS = TrainerFacts(num_groups=MIN_GROUPS + 1, num_refused_groups=1, num_tied_groups=MIN_GROUPS)

TRAINER_CASES = {
    "all_groups_too_long": [
        TrainerFacts(num_groups=MIN_GROUPS, num_refused_groups=MIN_GROUPS, num_too_long_groups=MIN_GROUPS)
    ],
    "all_groups_tie": [TIED_GROUPS],
    "changed_distribution": [TrainerFacts(samplings=frozenset({(None, ("min_p",)), (2, ("top_k", "top_p"))}))],
    "groups_of_one": [TrainerFacts(num_groups=5, num_single_groups=1)],
    "stale_batches": [TrainerFacts(mean_staleness=3.5), TrainerFacts(mean_staleness=1.5, max_staleness=1)],
}


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in TRAINER_CASES.items() for case in cases])
def test_a_trap_that_the_trainer_sees(name, case):
    assert set(TRAINER_CASES) == {check.name for check in TRAINER_CHECKS}
    assert [finding.name for finding in diagnose(case, TRAINER_CHECKS)] == [name]


@pytest.mark.parametrize(
    "harmless",
    [
        TrainerFacts(),
        replace(TIED_GROUPS, num_tied_groups=MIN_GROUPS - 1),
        replace(TIED_GROUPS, num_refused_groups=2, num_tied_groups=MIN_GROUPS - 1),
        TrainerFacts(num_groups=MIN_GROUPS, num_refused_groups=MIN_GROUPS, num_too_long_groups=MIN_GROUPS - 1),
        TrainerFacts(num_groups=MIN_GROUPS, num_refused_groups=MIN_GROUPS),
        TrainerFacts(mean_staleness=3.0),
        TrainerFacts(mean_staleness=3.5, max_staleness=4),
    ],
)
def test_nothing_is_found_in_a_trainer_that_learns(harmless):
    assert diagnose(harmless, TRAINER_CHECKS) == []


def group(*rewards: float, version: int | None = None, advantages: bool = False) -> RolloutGroup:
    ids = torch.tensor([1, 2])
    given = torch.zeros(2) if advantages else None
    return RolloutGroup(
        tuple(Rollout(ids, ids, reward, advantages=given, policy_version=version) for reward in rewards)
    )


def test_the_history_counts_ties_refusals_and_ages_of_groups():
    history = TrainerHistory(max_staleness=7)
    groups = [
        group(1.0, 1.0, version=3),
        group(0.0, 1.0, version=2),
        group(1.0),  # alone: nothing to tie with
        group(1.0, 1.0, advantages=True),  # the environment says what each token is worth
    ]
    rejected = parse_batch(
        [
            {"tokens": [[1, 2, 3]], "masks": [[1, 2, 3]], "scores": [1.0]},
            {"tokens": [[1, 2]], "masks": [[1, 2]], "scores": [float("nan")]},
        ],
        WireLimits(vocab_size=10, max_length=2),
    ).rejected

    assert [finding.name for finding in history.add(groups, rejected, policy_version=5)] == ["groups_of_one"]

    # Two rollouts are 2 publishes old and two are 3.
    assert history.facts() == TrainerFacts(6, 2, 1, 1, 1, mean_staleness=2.5, max_staleness=7)


def test_groups_of_one_are_compared_with_the_batch_if_told_and_with_what_the_environment_says():
    assert TrainerHistory(advantage_baseline="batch").add([group(1.0)], [], 0) == []
    assert TrainerHistory().add([group(1.0, advantages=True)], [], 0) == []
    (finding,) = TrainerHistory(advantage_baseline="leave_one_out").add([group(1.0), group(0.0, 1.0)], [], 0)
    assert finding.what.startswith("1 of the last 2 groups have one rollout")


def test_a_finding_is_reported_when_it_appears_and_again_after_it_went_away():
    history = TrainerHistory()
    ties = [group(1.0, 1.0)] * (MIN_GROUPS // 2)

    reports = [[finding.name for finding in history.add(ties, [], 0)] for _ in range(3)]
    # Half of the groups that are needed, then enough, then still.
    assert reports == [[], ["all_groups_tie"], []]
    assert history.add([group(0.0, 1.0)], [], 0) == []
    for _ in range(WINDOW - 1):
        assert history.add(ties, [], 0) == []
    assert [finding.name for finding in history.add(ties, [], 0)] == ["all_groups_tie"]


def test_an_unknown_version_has_no_age():
    history = TrainerHistory()
    history.add([group(0.0, 1.0)], [], policy_version=100)

    assert history.facts().mean_staleness is None


def test_a_group_that_is_refused_for_another_reason_is_not_too_long():
    rejected = RejectedGroup(0, None, 2, error=None, reason="scores")  # type: ignore[arg-type]
    history = TrainerHistory()
    history.add([], [rejected] * MIN_GROUPS, 0)

    assert history.facts().num_too_long_groups == 0


# The vLLM server

SERVER = InferenceServerFacts(
    URL,
    routes=frozenset({*VLLM_ROUTES, "/inference/v1/generate"}),
    has_middleware=True,
    weight_version="3",
    max_model_len=32,
    max_length=32,
)
VLLM_CASES = {
    "vllm_unreachable": InferenceServerFacts(URL, error="No connection."),
    "vllm_without_dev_mode": replace(SERVER, routes=SERVER.routes - {"/pause"}),
    "vllm_without_generate": replace(SERVER, routes=SERVER.routes - {"/inference/v1/generate"}),
    "vllm_without_policy_versions": replace(SERVER, has_middleware=False, routes=SERVER.routes | {"/generate"}),
    "vllm_paused": replace(SERVER, is_paused=True),
    "vllm_exceeds_max_length": replace(SERVER, max_model_len=33),
}


@pytest.mark.parametrize("name", VLLM_CASES)
def test_a_trap_of_the_server(name):
    assert list(VLLM_CASES) == [check.name for check in VLLM_CHECKS]
    assert [finding.name for finding in diagnose(VLLM_CASES[name], VLLM_CHECKS)] == [name]


@pytest.mark.parametrize(
    "server",
    [
        SERVER,
        # It says which policy sampled a token where an environment reads it, which the trainer sees in groups alone.
        InferenceServerFacts(
            URL, routes=frozenset({*SGLANG_ROUTES, "/generate"}), kind=SGLANG, weight_version="3", max_model_len=32
        ),
        replace(SERVER, max_length=NOT_ASKED, max_model_len=99),
        replace(SERVER, max_model_len=Unread("It is silent.")),
    ],
)
def test_nothing_is_found_in_a_server_that_is_ready(server):
    assert diagnose(server, VLLM_CHECKS) == []


def test_a_server_without_the_middleware_lacks_generate_and_versions():
    found = diagnose(replace(SERVER, has_middleware=False), VLLM_CHECKS)

    assert [finding.name for finding in found] == ["vllm_without_generate", "vllm_without_policy_versions"]
    assert found[0].what == f"The vLLM server at {URL} has no /generate."


def test_the_doctor_and_a_preflight_share_the_traps_that_both_can_see():
    of_the_doctor = {check.detect: check for check in VLLM_CHECKS}
    shared = [(of_the_doctor[check.detect], check) for check in SERVER_CHECKS if check.detect in of_the_doctor]

    assert [(ours.name, theirs.name) for ours, theirs in shared] == [
        ("vllm_without_policy_versions", "policy_versions"),
        ("vllm_exceeds_max_length", "max_model_len"),
    ]
    assert all(replace(ours, name=theirs.name) == theirs for ours, theirs in shared)


# Checks of any facts


def test_of_a_fact_that_is_not_known_nothing_is_concluded():
    unread = replace(SERVER, max_model_len=Unread("It is silent."))
    (check,) = [check for check in VLLM_CHECKS if check.needs == ("max_length", "max_model_len")]

    assert examine(unread, [check]) == [Finding(check.name, "unknown", "Not checked: It is silent.")]
    assert diagnose(unread, [check]) == []


def test_a_trap_that_hides_others_ends_the_look():
    found = examine(replace(SERVER, error="Nobody."), VLLM_CHECKS)

    assert [(finding.name, finding.level) for finding in found] == [("vllm_unreachable", "error")]


def test_every_check_of_a_server_that_is_ready_says_so_in_a_sentence():
    found = examine(SERVER, VLLM_CHECKS)

    assert [finding.name for finding in found] == [check.name for check in VLLM_CHECKS]
    assert {finding.level for finding in found} == {"ok"}
    assert all(finding.what.endswith(".") for finding in found)


# Words


CHECKS: list[Check[Any]] = [*API_CHECKS, *TRAINER_CHECKS, *VLLM_CHECKS, *SERVER_CHECKS]


def test_names_are_unique():
    assert len({check.name for check in CHECKS}) == len(CHECKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_why_and_fix_are_sentences(check):
    for text in (check.why, check.fix):
        assert text[0].isupper()
        assert text.endswith(".")


@pytest.mark.parametrize("case", [case for cases in API_CASES.values() for case in cases])
def test_what_was_seen_is_a_sentence_of_one_line(case):
    for finding in diagnose(case, API_CHECKS):
        assert finding.what.endswith(".")
        assert "\n" not in finding.what


def test_the_report_of_a_wait_is_one_line_with_seconds_numbers_and_the_likeliest_cause():
    waiting = facts(queue=1, latest_group_size=3, has_waiting_trainer=True)

    assert describe_wait(30.4, waiting) == (
        "Waiting for a batch for 30 s: /status shows current_step 5 and queue_size 1 (groups), the registered batch_size is 4 "
        "(rollouts). Groups of 3 rollouts are in the queue, a batch has 4: those of 3 do not pack. "
        "(group_sizes_do_not_pack)"
    )


def test_the_timeout_gives_the_likeliest_cause_and_where_to_read_more():
    waiting = facts(queue=1, latest_group_size=3, has_waiting_trainer=True)
    cause = diagnose(waiting, API_CHECKS)[0]

    error = data_timeout(12.34, waiting)

    assert error.what.startswith(f"No batch within 12.3 s from {URL}: /status shows current_step 5 and queue_size 1")
    assert error.why == f"{cause.what} {cause.why}"
    assert error.fix == f"{cause.fix} See `group_sizes_do_not_pack` in docs/troubleshooting.md."


def test_a_timeout_at_an_api_that_works_blames_slow_environments():
    # A batch was formed between the last request and the look.
    moving = facts(queue=0, before=4, environments=(environment(),), has_waiting_trainer=True)

    error = data_timeout(1.0, moving)

    assert "slow" in error.why
    assert error.fix == "Raise `--batch_timeout_s`."


def test_a_finding_without_advice_is_what_was_seen():
    assert str(Finding("api", "ok", "All is well.")) == "All is well."
