"""RolloutStream over the real API: fetch, journal, validate, deal."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from atropos_api import make_group, make_registration, restart_api
from streams import LIMITS, Trainer, make_stream

from trl_atropos.data.options import DataOptions
from trl_atropos.data.prepare import BatchPreparer
from trl_atropos.data.quarantine import Quarantine
from trl_atropos.data.sources import ApiBatches, replayed_batches
from trl_atropos.errors import (
    AtroposConnectionError,
    AtroposDataTimeout,
    AtroposProtocolError,
    AtroposRegistrationError,
)
from trl_atropos.types import START, Position, ServedCall
from trl_atropos.wire.client import AtroposClient
from trl_atropos.wire.journal import Journal


class Setting:
    """A stream over the API, with its journal and its quarantine in a directory."""

    def __init__(
        self,
        client: Any,
        directory: Path,
        max_dropped_fraction: float = 0.0,
        batch_timeout_s: float = 10.0,
        **changes: Any,
    ):
        self.registrations: list[int] = []
        self.journal = Journal(directory / "journal")
        self.quarantine = Quarantine(directory / "quarantine.jsonl", max_dropped_fraction)
        self.batches = ApiBatches(
            client,
            self.journal,
            DataOptions(batch_timeout_s=batch_timeout_s, refresh_interval=0.1, api_timeout_s=5.0),
            self.register,
        )
        self.client = client
        self.progress = Trainer()
        self.stream = make_stream(
            lambda: iter(self.batches),
            progress=self.progress,
            quarantine=self.quarantine,
            journal=self.journal,
            **{"required_logprobs": ("inference_logprobs",), **changes},
        )

    def register(self) -> None:
        self.client.register(make_registration(batch_size=4))
        self.registrations.append(4)

    def journaled(self) -> list[dict]:
        return [group for batch in self.journal.batches() for group in batch.raw_groups]


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


def test_a_batch_arrives_journaled_validated_and_dealt_with_its_exact_tokens(api, client, tmp_path):
    setting = Setting(client, tmp_path)
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


def test_one_bad_group_stops_the_run_and_the_raw_batch_is_on_the_disk(api, client, tmp_path):
    setting = Setting(client, tmp_path)
    register_and_post(api, client, make_group(), BAD)

    with pytest.raises(AtroposProtocolError) as caught:
        next(iter(setting.stream))

    # Half of one batch of 20.
    assert caught.value.what.startswith(
        "Refused groups make 2.5% of the last 20 batches (environment None: 1 x masks)"
    )
    assert "rollout 1: `masks` has 1 at position 1, `tokens` has 6" in caught.value.what
    assert f"All refused groups are in {setting.quarantine.path}." in caught.value.why
    assert "--max_dropped_fraction (0.0)" in caught.value.fix
    assert len(setting.journaled()) == 2
    assert BAD["masks"] in [group["masks"] for group in setting.journaled()]


def test_a_bad_group_is_dropped_and_counted_where_that_is_allowed(api, client, tmp_path, caplog):
    setting = Setting(client, tmp_path, max_dropped_fraction=0.5)
    register_and_post(api, client, make_group(), BAD)

    iterator = iter(setting.stream)
    (first,), (second,) = next(iterator), next(iterator)

    # The slots of the dropped group stay empty: the step does not shrink on one rank only.
    assert [len(first), len(second)] == [2, 0]
    assert (setting.stream.num_rollouts_trained, setting.stream.num_rollouts_dropped) == (2, 2)
    assert len(setting.journaled()) == 2
    assert "Quarantined a group of environment None (1 with the reason `masks` so far)" in caplog.text
    (entry,) = map(json.loads, setting.quarantine.path.read_text().splitlines())
    assert (entry["batch"], entry["env_id"], entry["reason"]) == (0, None, "masks")
    assert entry["raw"]["masks"] == BAD["masks"]


def test_a_batch_of_bad_groups_only_is_quarantined_and_the_next_one_trained(api, client, tmp_path):
    setting = Setting(client, tmp_path, max_dropped_fraction=0.1)
    register_and_post(api, client, BAD, BAD)
    timer = threading.Timer(0.3, lambda: [api.post("/scored_data", make_group()) for _ in range(2)])
    timer.start()

    (first,) = next(iter(setting.stream))

    timer.join()
    assert len(first) == 2
    assert (setting.stream.num_rollouts_dropped, setting.quarantine.num_groups) == (4, 2)
    setting.progress.global_step = 1
    assert setting.stream.position == Position(2, 0)


def test_a_batch_larger_than_the_step_is_refused_and_kept(api, client, tmp_path):
    # The API is registered with 4, by another trainer; this one trains 2 a step.
    setting = Setting(client, tmp_path, batch_size=2)
    register_and_post(api, client, make_group(), make_group())

    with pytest.raises(AtroposProtocolError) as caught:
        next(iter(setting.stream))

    assert caught.value.what == "The API handed out a batch of 4 rollouts, this run trains 2 a step."
    assert "--per_device_train_batch_size" in caught.value.fix
    assert len(setting.journaled()) == 2


def test_no_data_ends_in_a_timeout_and_an_empty_journal(api, client, tmp_path):
    setting = Setting(client, tmp_path, batch_timeout_s=0.3)
    start = time.monotonic()
    with pytest.raises(AtroposDataTimeout):
        next(iter(setting.stream))
    assert time.monotonic() - start < 3
    assert setting.journaled() == []


def test_the_journal_holds_what_the_wire_sent_and_not_what_was_made_of_it(api, client, tmp_path):
    setting = Setting(client, tmp_path)
    register_and_post(api, client, make_group(messages=None, overrides=None), make_group())
    next(iter(setting.stream))

    assert [group["inference_logprobs"] for group in setting.journaled()] == [[[1.0, -0.5, -0.25]] * 2] * 2
    assert all("journal" not in group for group in setting.journaled())


# An API that does not stay


def test_an_api_that_was_restarted_is_registered_with_again_and_the_stream_goes_on(api, client, tmp_path, caplog):
    setting = Setting(client, tmp_path)
    register_and_post(api, client, make_group(), make_group())
    iterator = iter(setting.stream)
    next(iterator), next(iterator)
    restart_api()
    timer = threading.Timer(0.3, lambda: [api.post("/scored_data", longer(20)) for _ in range(2)])
    timer.start()

    (first,) = next(iterator)

    timer.join()
    assert [r.input_ids[0].item() for r in first] == [20, 20]
    assert (setting.registrations, setting.batches.num_restarts) == ([4], 1)
    assert client.info()[0] == 4
    assert "start them again" in caplog.text


def test_an_api_that_took_data_before_the_registration_is_emptied_and_registered_with(api, client, tmp_path, caplog):
    setting = Setting(client, tmp_path)
    register_and_post(api, client, make_group(), make_group())
    iterator = iter(setting.stream)
    next(iterator), next(iterator)
    restart_api()
    # An environment that outlived the API posts before the trainer is back: no registration is taken any more.
    assert api.post("/scored_data", make_group()).status_code == 200
    timer = threading.Timer(0.5, lambda: [api.post("/scored_data", longer(20)) for _ in range(2)])
    timer.start()

    (first,) = next(iterator)

    timer.join()
    assert [r.input_ids[0].item() for r in first] == [20, 20]
    assert api.count("GET", "/reset_data") == 1
    assert "Emptying it with /reset_data" in caplog.text


def test_a_batch_that_the_api_cannot_write_is_counted_and_the_next_one_trained(api, client, tmp_path, caplog):
    setting = Setting(client, tmp_path, max_dropped_fraction=0.1)
    register_and_post(api, client, make_group(scores=[float("nan"), 1.0]), make_group())
    timer = threading.Timer(0.3, lambda: [api.post("/scored_data", longer(20)) for _ in range(2)])
    timer.start()

    (first,) = next(iter(setting.stream))

    timer.join()
    assert [r.input_ids[0].item() for r in first] == [20, 20]
    assert setting.batches.num_batches_lost == 1
    assert list(setting.quarantine.fractions) == [1.0, 0.0]
    assert "A batch is lost" in caplog.text


def test_a_lost_batch_ends_a_run_that_puts_up_with_none(api, client, tmp_path):
    setting = Setting(client, tmp_path)
    register_and_post(api, client, make_group(scores=[float("nan"), 1.0]), make_group())

    with pytest.raises(AtroposProtocolError, match="NaN or infinity in the `scores`"):
        next(iter(setting.stream))


def test_an_api_that_does_not_come_back_ends_the_run_after_its_timeout(tmp_path, unused_url):
    with AtroposClient(unused_url) as client:
        setting = Setting(client, tmp_path)
        setting.batches.options = DataOptions(batch_timeout_s=10.0, refresh_interval=0.1, api_timeout_s=0.5)
        start = time.monotonic()
        with pytest.raises(AtroposConnectionError, match=r"did not answer within 0\.5 s"):
            next(iter(setting.stream))
        assert time.monotonic() - start < 5


def test_a_stopped_source_asks_for_nothing_more(api, client, tmp_path):
    setting = Setting(client, tmp_path)
    register_and_post(api, client)
    thread = threading.Thread(target=lambda: list(setting.batches))
    thread.start()
    time.sleep(0.3)
    setting.batches.stop()
    thread.join(timeout=5)
    assert not thread.is_alive()
    assert setting.journaled() == []


# Resuming


def test_what_was_fetched_and_not_trained_is_replayed_with_the_versions_that_were_looked_up(api, client, tmp_path):
    setting = Setting(client, tmp_path)
    register_and_post(api, client, make_group(), longer(20))
    iterator = iter(setting.stream)
    dealt = [r.input_ids.tolist() for _ in range(2) for r in next(iterator)[0]]

    (batch,) = replayed_batches(Journal(tmp_path / "journal"), START, batch_size=4)
    prepare = BatchPreparer(LIMITS, Trainer(lambda: 7), lookup=lambda keys: [ServedCall(5)] * len(keys))
    (prepared,) = prepare(iter([batch]))

    assert batch.is_replayed
    assert sorted(r.input_ids.tolist() for r in prepared.batch.rollouts) == sorted(dealt)
    # The mark says that they were unknown under version 0: nobody is asked again.
    assert [r.policy_version for r in prepared.batch.rollouts] == [None] * 4
    assert prepared.fetched_version == 0
    assert list(replayed_batches(Journal(tmp_path / "journal"), Position(1, 0), batch_size=4)) == []


def test_what_was_fetched_by_a_run_with_larger_steps_is_cut_between_its_groups(tmp_path):
    journal = Journal(tmp_path)
    groups = [make_group(), longer(20), BAD, longer(40)]
    journal.append(groups)
    progress = Trainer(lambda: 3)
    (whole,) = BatchPreparer(LIMITS, progress, lambda keys: [ServedCall(5)] * len(keys), journal)(
        replayed_batches(journal, START, batch_size=8)
    )
    assert [rollout.policy_version for rollout in whole.batch.rollouts] == [5] * 6

    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.5)
    parts = list(
        # The mark says which versions sampled them: nobody is asked again.
        BatchPreparer(LIMITS, progress, lambda keys: [ServedCall(9)] * len(keys))(
            replayed_batches(journal, START, batch_size=4)
        )
    )
    for part in parts:
        quarantine.add(part.fetched.position, part.fetched.raw_groups, part.batch.rejected)

    assert [part.fetched.raw_groups for part in parts] == [groups[:2], groups[2:]]
    assert [part.fetched.next_position for part in parts] == [Position(0, 2), Position(1, 0)]
    assert [rollout.policy_version for part in parts for rollout in part.batch.rollouts] == [5] * 6
    assert [group.rollouts[0].origin.group for part in parts for group in part.batch.groups] == [0, 1, 3]
    (entry,) = map(json.loads, quarantine.path.read_text().splitlines())
    assert (entry["group"], entry["raw"]) == (2, BAD)
    # A checkpoint between the two steps of one batch.
    (rest,) = replayed_batches(journal, parts[1].fetched.position, batch_size=8)
    assert rest.raw_groups == groups[2:]


def test_an_api_that_another_trainer_registered_with_after_a_restart_is_left_alone(api, client, tmp_path, monkeypatch):
    setting = Setting(client, tmp_path)
    register_and_post(api, client)
    fetch_batch, restarts = client.fetch_batch, iter([True])

    def fetch_once_the_other_was_first() -> Any:
        if next(restarts, False):
            restart_api()
            api.post("/register", asdict(make_registration(batch_size=8)))
            raise AtroposConnectionError("The API went away.", "It was restarted.", "Wait.")
        return fetch_batch()

    monkeypatch.setattr(client, "fetch_batch", fetch_once_the_other_was_first)
    with pytest.raises(AtroposRegistrationError, match="is registered with batch_size 8"):
        next(iter(setting.stream))
    assert api.count("GET", "/reset_data") == 0
