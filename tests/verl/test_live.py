"""AtroposSFTTrainer on a live API, on two ranks, with its publishes to a real vLLM server."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from launching import case, launch, needs_verl
from live_api import START_TIMEOUT_S, ApiProcess
from resume_run import GROUP_SIZE, make_group
from servers import save_tiny_model, serve

from trl_atropos import AtroposVLLMClient
from trl_atropos.wire.journal import Journal


pytestmark = needs_verl

BATCH_SIZE = 8
NUM_STEPS = 3


class Live:
    """What three runs after each other gave: live training, publishes by hand, and the journal of the first once more."""

    def __init__(self, directory: Path):
        self.directory = directory
        model = save_tiny_model(directory / "model", tied=True, seed=0)
        with serve(model, log_path=directory / "vllm.log") as url, ApiProcess(directory / "api.log") as api:
            threading.Thread(target=self.feed, args=(api,), daemon=True).start()
            self.results = launch(2, self.cases(model, url, api.url), directory)
            self.weight_version = AtroposVLLMClient(url, connection_timeout=10).get_weight_version()

    def feed(self, api: ApiProcess) -> None:
        """Post what all steps need when the trainer is registered."""
        api.wait_for_registration(3 * START_TIMEOUT_S)
        for number in range(NUM_STEPS * BATCH_SIZE // GROUP_SIZE):
            api.post(make_group(number))

    def cases(self, model: Path, url: str, api_url: str) -> list[dict[str, Any]]:
        run = self.directory / "run"
        step = (f"data.train_batch_size={BATCH_SIZE}", "data.micro_batch_size_per_gpu=2")
        source = (f"data.atropos.api_url={api_url}", f"trainer.total_training_steps={NUM_STEPS}")
        options = {"vllm_server_base_url": url, "logprob_probe_interval": 1}
        journal = f"data.atropos.data_path={run / 'journal'}"
        return [
            case("live", "train", model, run, *step, *source, **options),
            case("publish", "publish", model, self.directory / "by_hand", *step, *source, **options),
            case("replay", "train", model, self.directory / "replay", *step, journal),
        ]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Live:
    return Live(tmp_path_factory.mktemp("live"))


def test_one_batch_is_one_step_and_each_is_published_and_proven(live: Live):
    steps = live.results["live"]["steps"]
    assert [step["policy_version"] for step in steps] == [1, 2, 3]
    assert [step["num_rollouts_trained"] for step in steps] == [BATCH_SIZE, 2 * BATCH_SIZE, 3 * BATCH_SIZE]
    # Trained in float32, served in bfloat16: 2 layers of random weights round to a few hundredths of a nat.
    assert all(0 < step["logprob_probe/mean_abs_diff"] < 0.1 for step in steps)
    assert all(step["perf/weight_sync_bytes"] > 0 for step in steps)


def test_batches_are_in_the_journal_and_marked_as_trained(live: Live):
    journal = Journal(live.directory / "run" / "journal")
    assert journal.next_batch == NUM_STEPS
    assert [mark["step"] for mark in journal.marks("trained")] == [1, 2, 3]


def test_the_journal_trains_alike_without_servers(live: Live):
    steps, replayed = live.results["live"]["steps"], live.results["replay"]["steps"]
    for step, other in zip(steps, replayed, strict=True):
        assert other["loss"] == pytest.approx(step["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-4)


def test_a_publish_by_hand_is_proven(live: Live):
    publish = live.results["publish"]
    # The sharding manager publishes the next version, and the other what it was told.
    assert publish["versions"] == [1, 7]
    assert live.weight_version == "7"
    assert 0 < publish["probe"] < 0.1
