"""RolloutStream over the real API: fetch, journal, validate, deal."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from atropos_api import make_group, make_registration

from trl_atropos.data import RolloutStream, StreamSettings
from trl_atropos.errors import AtroposDataTimeout, AtroposProtocolError
from trl_atropos.journal import Journal, read_journal
from trl_atropos.validation import WireLimits


class Setting:
    """A stream over the API, and the file that it journals to."""

    def __init__(self, client: Any, path: Path, batch_size: int = 4, **changes: Any):
        self.path = path
        self.registrations: list[int] = []
        values = {
            "batch_size": batch_size,
            "micro_batch_size": 2,
            "rank": 0,
            "world_size": 1,
            "limits": WireLimits(vocab_size=100, max_length=32),
            "scale_rewards": "none",
            "required_logprobs": ("inference_logprobs",),
            "max_dropped_fraction": 0.0,
            "batch_timeout_s": 10.0,
            "refresh_interval_s": 0.1,
        }
        self.stream = RolloutStream(
            client=client,
            journal=Journal(path),
            settings=StreamSettings(**{**values, **changes}),
            register=lambda: self.registrations.append(client.register(make_registration(batch_size=4))),
            policy_version=lambda: 0,
            lookup_policy_versions=None,
            layout=lambda: "padded",
        )

    def journaled(self) -> list[dict]:
        return list(read_journal(self.path))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out" / "rollouts.jsonl"


def register_and_post(api: Any, client: Any, *groups: dict) -> None:
    """Queue groups in the API before the stream asks. The stream's own registration must not empty the queue."""
    client.register(make_registration(batch_size=4))
    for group in groups:
        assert api.post("/scored_data", group).status_code == 200


def longer(first_id: int) -> dict[str, Any]:
    """Two rollouts of 4 and 5 tokens."""
    tokens = [list(range(first_id, first_id + length)) for length in (4, 5)]
    return make_group(
        tokens=tokens,
        masks=[[-100, *ids[1:]] for ids in tokens],
        inference_logprobs=[[1.0, *[-0.5] * (len(ids) - 1)] for ids in tokens],
    )


BAD = make_group(masks=[[-100, 6, 7], [-100, 1, 1]])


def test_a_batch_arrives_journaled_validated_and_dealt_with_its_exact_tokens(api, client, path):
    setting = Setting(client, path)
    setting.stream.register = lambda: None
    register_and_post(api, client, make_group(), longer(20))

    iterator = iter(setting.stream)
    (first,), (second,) = next(iterator), next(iterator)

    # Longest first: 5 and 4 tokens, then 3 and 3 tokens (rewards 0, 1 in both groups, so advantages -0.5, +0.5).
    assert [r.input_ids.tolist() for r in first] == [[20, 21, 22, 23, 24], [20, 21, 22, 23]]
    assert [r.input_ids.tolist() for r in second] == [[5, 6, 7], [5, 6, 7]]
    assert [r.labels.tolist() for r in first] == [[-100, 21, 22, 23, 24], [-100, 21, 22, 23]]
    assert [r.advantages.tolist() for r in first] == [[0.0, 0.5, 0.5, 0.5, 0.5], [0.0, -0.5, -0.5, -0.5]]
    assert second[0].inference_logprobs.tolist()[1:] == [-0.5, -0.25]
    assert sorted(group["tokens"][0][0] for group in setting.journaled()) == [5, 20]
    assert (setting.stream.num_rollouts_trained, setting.stream.num_rollouts_dropped) == (4, 0)
    assert setting.stream.num_tokens == 5 + 4 + 3 + 3


def test_the_stream_registers_once_and_before_its_first_fetch(api, client, path):
    setting = Setting(client, path, batch_timeout_s=0.2)
    batches = iter(setting.stream)
    # Making the iterator must not register: environments start to work for a registered trainer.
    assert api.count("POST", "/register") == 0
    with pytest.raises(AtroposDataTimeout):
        next(batches)

    assert len(setting.registrations) == 1
    routes = [path for _, path in api.requests]
    assert routes.index("/register") < routes.index("/batch")


def test_one_bad_group_stops_the_run_and_the_raw_batch_is_on_the_disk(api, client, path):
    setting = Setting(client, path)
    setting.stream.register = lambda: None
    register_and_post(api, client, make_group(), BAD)

    with pytest.raises(AtroposProtocolError) as caught:
        next(iter(setting.stream))

    assert caught.value.what.startswith("1 of 2 groups of a batch cannot be trained; the first: Group ")
    assert "rollout 1: `masks` has 1 at position 1, `tokens` has 6" in caught.value.what
    assert f"All 2 raw groups of this batch are in {path}." in caught.value.why
    assert "--max_dropped_fraction (0.0)" in caught.value.fix
    assert len(setting.journaled()) == 2
    assert BAD["masks"] in [group["masks"] for group in setting.journaled()]


def test_a_bad_group_is_dropped_and_counted_where_that_is_allowed(api, client, path, caplog):
    setting = Setting(client, path, max_dropped_fraction=0.5)
    setting.stream.register = lambda: None
    register_and_post(api, client, make_group(), BAD)

    iterator = iter(setting.stream)
    (first,), (second,) = next(iterator), next(iterator)

    # The slots of the dropped group stay empty: the step does not shrink on one rank only.
    assert [len(first), len(second)] == [2, 0]
    assert (setting.stream.num_rollouts_trained, setting.stream.num_rollouts_dropped) == (2, 2)
    assert len(setting.journaled()) == 2
    assert "Dropped a group" in caplog.text


def test_a_batch_of_bad_groups_only_stops_whatever_may_be_dropped(api, client, path):
    setting = Setting(client, path, max_dropped_fraction=0.99)
    setting.stream.register = lambda: None
    register_and_post(api, client, BAD, BAD)

    with pytest.raises(AtroposProtocolError, match="2 of 2 groups of a batch cannot be trained"):
        next(iter(setting.stream))


def test_a_batch_larger_than_the_step_is_refused_and_kept(api, client, path):
    # The API is registered with 4, by another trainer; this one trains 2 a step.
    setting = Setting(client, path, batch_size=2)
    setting.stream.register = lambda: None
    register_and_post(api, client, make_group(), make_group())

    with pytest.raises(AtroposProtocolError) as caught:
        next(iter(setting.stream))

    assert caught.value.what == "The API handed out a batch of 4 rollouts, this run trains 2 a step."
    assert "--per_device_train_batch_size" in caught.value.fix
    assert len(setting.journaled()) == 2


def test_no_data_ends_in_a_timeout_and_an_empty_journal(api, client, path):
    setting = Setting(client, path, batch_timeout_s=0.3)
    start = time.monotonic()
    with pytest.raises(AtroposDataTimeout):
        next(iter(setting.stream))
    assert time.monotonic() - start < 3
    assert setting.journaled() == []


def test_the_journal_holds_what_the_wire_sent_and_not_what_was_made_of_it(api, client, path):
    setting = Setting(client, path)
    setting.stream.register = lambda: None
    register_and_post(api, client, make_group(messages=None, overrides=None), make_group())
    next(iter(setting.stream))

    lines = path.read_text().splitlines()
    assert [json.loads(line)["inference_logprobs"] for line in lines] == [[[1.0, -0.5, -0.25]] * 2] * 2
