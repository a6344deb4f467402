"""A publish against a server that is scripted to fail: order, states, deadlines, recovery, and what is served afterwards.

The transport, the HTTP client and the probe are the real ones; only the engine behind the routes is scripted.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from publishing import VOCAB_SIZE, ScriptedPublishing, policy, serves
from scripted_server import ScriptedServer
from tiny_models import perturb

from trl_atropos.errors import DeviceLostError, PublishConflictError, WeightSyncError, WeightSyncTimeout
from trl_atropos.report.metric_help import METRICS
from trl_atropos.weight_sync import failures
from trl_atropos.weight_sync import publisher as publisher_module
from trl_atropos.weight_sync.client import AtroposVLLMClient
from trl_atropos.weight_sync.probe import LogprobProbe
from trl_atropos.weight_sync.publisher import PolicyPublisher
from trl_atropos.weight_sync.report import PHASES
from trl_atropos.weight_sync.server_group import ServerGroup
from trl_atropos.weight_sync.transports.shm import SharedMemoryTransport
from trl_atropos.weight_sync.transports.shm_segment import SEGMENT_DIR
from trl_atropos.weight_sync.weights.named_tensors import NamedTensors


DEADLINE_S = 2.0
REPORTS_S = 1.0
"""How long a transfer waits for the reports of workers that have answered."""

CONNECT = ["GET /get_world_size", "POST /init_weight_transfer_engine"]
DELIVER = [
    "POST /pause",
    "POST /start_weight_update",
    "POST /update_weights",
    "POST /finish_weight_update",
    "POST /resume",
    "GET /weight_info",
    "POST /v1/completions",
]
FIRST_PUBLISH = CONNECT + DELIVER
LATER_PUBLISH = ["GET /weight_info", *DELIVER]
CONTROL_POSTS = ["POST /init_weight_transfer_engine", *DELIVER[:5]]


class Publishing(ScriptedPublishing):
    """To a vLLM server, every publish of which is probed."""

    def __init__(self, server: ScriptedServer, action: str = "abort", *, timeout_s: float = 10.0, **options: Any):
        client = AtroposVLLMClient(server.base_url, connection_timeout=5, request_timeout=timeout_s, api_key="secret")
        transport = SharedMemoryTransport(REPORTS_S)
        super().__init__(server, client, transport, action, **{"logprob_probe_interval": 1, **options})


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    # Starts with another policy than the trainer's.
    with ScriptedServer(policy(seed=1)) as server:
        yield server
    assert server.offences == []
    assert not {path.name for path in Path(SEGMENT_DIR).iterdir()} & server.segment_names


@pytest.fixture
def publishing(server: ScriptedServer) -> Iterator[Publishing]:
    publishing = Publishing(server)
    yield publishing
    publishing.servers.close()


@pytest.fixture
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "RETRY_INTERVAL_S", 0.05)
    monkeypatch.setattr(failures, "PAUSED_INTERVAL_S", 0.05)


class TestOrder:
    def test_of_the_first_publish(self, publishing, server):
        report = publishing.publish(policy(), 0)
        assert server.routes == FIRST_PUBLISH
        assert server.last("POST /pause").query == {"mode": ["keep"], "clear_cache": ["true"]}
        assert server.last("POST /finish_weight_update").body == {"weight_version": "0"}
        assert serves(server, policy())
        assert not server.state.is_paused
        assert report.policy_version == 0
        # bfloat16 rounding of a one-layer model
        assert report.probe.mean_abs_diff < 0.05

    def test_later_publishes_do_not_connect_again(self, publishing, server):
        publishing.publish(policy(), 0)
        server.requests.clear()
        publishing.publish(policy(seed=2), 1)
        assert server.routes == LATER_PUBLISH
        assert server.state.weight_version == "1"
        assert serves(server, policy(seed=2))

    def test_the_report_counts_bytes_and_seconds_under_known_names(self, publishing):
        model = policy()
        publishing.publish(model, 2)
        perturb(model, seed=0, scale=0.01)
        report = publishing.publish(model, 3)
        assert report.num_bytes == 2 * sum(parameter.numel() for parameter in model.parameters())
        # This server's worker loads while it is paused.
        assert set(report.phase_s) == {*PHASES} - {"build"}
        assert report.paused_s < report.total_s
        metrics = report.metrics()
        assert metrics.keys() <= METRICS.keys()
        assert metrics["perf/weight_sync_bytes"] == report.num_bytes
        assert (metrics["perf/weight_sync_retries"], metrics["perf/weight_sync_failures"]) == (0, 0)
        assert 0.0 <= metrics["weight_sync/swallowed_fraction"] < 0.5

    def test_what_is_sent_of_a_model_can_be_made_by_the_trainer_and_is_proven(self, publishing, server):
        # A trainer with an engine of its own, which knows best what its tensors are.
        def make_source(model: torch.nn.Module, dtype: torch.dtype) -> NamedTensors:
            made.append(model)
            return NamedTensors(((name, tensor.detach()) for name, tensor in model.named_parameters()), dtype)

        made: list[torch.nn.Module] = []
        publisher = PolicyPublisher(
            publishing.options,
            torch.bfloat16,
            publishing.servers,
            make_probe=lambda model: publishing.probe,
            make_source=make_source,
        )
        model = policy(seed=2)
        assert publisher.publish(model, 1).probe is not None
        assert made == [model]
        assert serves(server, model)

    def test_everything_is_staged_before_the_pause(self, publishing, server):
        routes_while_staging = []
        stage = publishing.servers.stage

        def watch(*args: Any) -> None:
            stage(*args)
            routes_while_staging.extend(server.routes)

        publishing.servers.stage = watch
        publishing.publish(policy(), 0)
        assert routes_while_staging == CONNECT

    def test_keys_and_values_of_requests_in_flight_can_be_kept(self, server):
        publishing = Publishing(server, vllm_keep_kv_cache=True)
        publishing.publish(policy(), 0)
        assert server.last("POST /pause").query["clear_cache"] == ["false"]
        publishing.servers.close()

    def test_a_sleeping_server_wakes_for_the_weights_first_and_for_the_cache_last(self, server):
        publishing = Publishing(server, vllm_enable_sleep_mode=True)
        publishing.publish(policy(), 0)
        publishing.servers.sleep()
        assert server.state.asleep == {"weights", "kv_cache"}
        server.requests.clear()
        publishing.publish(policy(seed=2), 1)
        assert [(request.route, request.query.get("tags")) for request in server.requests[1:8]] == [
            ("POST /wake_up", ["weights"]),
            ("POST /pause", None),
            ("POST /start_weight_update", None),
            ("POST /update_weights", None),
            ("POST /finish_weight_update", None),
            ("POST /wake_up", ["kv_cache"]),
            ("POST /resume", None),
        ]
        assert not server.state.asleep
        assert not server.state.is_paused
        publishing.servers.close()

    def test_sleeping_keeps_requests_in_flight(self, server):
        publishing = Publishing(server, vllm_enable_sleep_mode=True)
        publishing.publish(policy(), 0)
        publishing.servers.sleep()
        # vLLM's own default is `abort`.
        assert server.last("POST /sleep").query == {"level": ["1"], "mode": ["keep"]}
        publishing.servers.close()


class TestAShareOfTheStepThatIsLarge:
    @pytest.mark.parametrize(
        ("sleeps", "remedy"), [(False, "--weight_sync_background true"), (True, "more rollouts a step")]
    )
    def test_it_is_warned_of_once_with_what_this_run_may_do(self, server, caplog, sleeps, remedy):
        publishing = Publishing(
            server, weight_sync_warn_fraction=1e-9, vllm_enable_sleep_mode=sleeps, weight_sync_mode="full"
        )
        for global_step in range(3):
            publishing.publisher.publish_step(policy(), global_step)
        (warning,) = [record.message for record in caplog.records if "of the time of a step" in record.message]
        assert remedy in warning
        assert ("--weight_sync_steps" in warning) is not sleeps
        publishing.servers.close()


class TestChangedOnly:
    def model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return get_peft_model(policy(), config)

    def sent(self, server: ScriptedServer) -> set[str]:
        return set(server.last("POST /update_weights").body["update_info"]["names"])

    ATTENTION = frozenset(f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo")

    def test_after_the_first_publish_only_whole_groups_that_training_changes_are_sent(self, publishing, server):
        model = self.model()
        first = publishing.publish(model, 0)
        everything = {name for name, _ in policy().named_parameters()}
        assert (self.sent(server), first.mode) == (everything, "full")
        perturb(model, seed=0, scale=0.1)
        second = publishing.publish(model, 1)
        # q and v are trained; vLLM keeps k in one piece with them, and the group is their parent module.
        assert (self.sent(server), second.mode) == (self.ATTENTION, "merged")
        assert serves(server, model.merge_and_unload())

    def test_everything_is_sent_on_request(self, server):
        publishing = Publishing(server, weight_sync_mode="full")
        model = self.model()
        for version in range(2):
            assert publishing.publish(model, version).mode == "full"
        publishing.servers.close()

    def test_everything_is_sent_every_so_many_publishes(self, server):
        publishing = Publishing(server, weight_sync_full_interval=3)
        model = self.model()
        modes = [publishing.publish(model, version).mode for version in range(7)]
        assert modes == ["full", "merged", "merged", "full", "merged", "merged", "full"]
        publishing.servers.close()

    def test_a_restarted_server_is_given_everything_although_only_a_part_was_staged(self, publishing, server):
        model = self.model()
        publishing.publish(model, 0)
        server.restart()
        perturb(model, seed=0, scale=0.1)
        publishing.publish(model, 1)
        assert self.sent(server) == {name for name, _ in policy().named_parameters()}
        assert serves(server, model.merge_and_unload())


STATE_AFTER = {
    "POST /init_weight_transfer_engine": "serves the previous policy",
    "POST /pause": "may be paused; it holds the previous policy",
    "POST /start_weight_update": "is paused and holds no complete policy",
    "POST /update_weights": "is paused and holds no complete policy",
    "POST /finish_weight_update": "is paused and may hold no complete policy",
    "POST /resume": "holds the new policy and may be paused",
}
STATE_NAME = {
    "POST /init_weight_transfer_engine": "idle",
    "POST /pause": "paused",
    "POST /start_weight_update": "transferring",
    "POST /update_weights": "transferring",
    "POST /finish_weight_update": "finishing",
    "POST /resume": "resuming",
}


class TestAbort:
    @pytest.mark.parametrize("action", [500, "close", "reset", "html"])
    @pytest.mark.parametrize("route", CONTROL_POSTS)
    def test_a_control_request_is_sent_exactly_once(self, publishing, server, route, action):
        server.script[route] = action
        error = publishing.failure()
        assert server.routes.count(route) == 1
        # Nothing follows a failed request.
        assert server.routes == FIRST_PUBLISH[: FIRST_PUBLISH.index(route) + 1]
        assert STATE_AFTER[route] in error.why
        assert f"failed in state `{STATE_NAME[route]}`" in error.what
        assert f"Publishing policy version 1 to {server.base_url}" in error.what

    @pytest.mark.parametrize("action", ["stall", "dribble"])
    @pytest.mark.parametrize("route", CONTROL_POSTS)
    def test_a_stalled_request_ends_at_its_deadline(self, publishing, server, route, action):
        publishing.client.request_timeout = DEADLINE_S
        server.script[route] = action
        start = time.monotonic()
        error = publishing.failure()
        # Seconds for a busy machine.
        assert DEADLINE_S <= time.monotonic() - start < DEADLINE_S + 5
        assert isinstance(error, WeightSyncTimeout)
        assert isinstance(error, TimeoutError)
        assert f"did not answer within {DEADLINE_S} s" in error.what
        assert STATE_AFTER[route] in error.why
        assert "--weight_sync_timeout" in error.fix
        assert server.routes.count(route) == 1

    @pytest.mark.parametrize("route", ["POST /update_weights", "POST /finish_weight_update"])
    def test_half_a_policy_is_never_served(self, publishing, server, route):
        server.script[route] = 500
        publishing.failure()
        assert server.state.is_paused
        assert "POST /resume" not in server.routes

    def test_a_worker_that_loaded_nothing_leaves_the_server_paused(self, publishing, server):
        server.load = lambda update: None
        error = publishing.failure()
        assert "Worker 0 reports" in error.what
        assert server.state.is_paused
        assert not {"POST /finish_weight_update", "POST /resume"} & set(server.routes)

    def test_the_publish_after_a_failure_mends_the_server(self, publishing, server):
        server.script["POST /finish_weight_update"] = [500, None]
        publishing.failure()
        publishing.publish(policy(), 1)
        assert serves(server, policy())
        assert (server.state.weight_version, server.state.is_paused) == ("1", False)

    def test_the_servers_own_words_are_in_the_error(self, publishing, server):
        server.script["POST /update_weights"] = 500
        assert "scripted 500" in publishing.failure().what

    def test_an_error_of_the_models_own_is_not_taken_for_one_of_the_server(self, publishing, server):
        model = policy()
        model.forward = lambda **inputs: 1 / 0
        with pytest.raises(ZeroDivisionError):
            publishing.publish(model, 1)
        # It came before the server was touched: it serves what it served.
        assert not server.state.is_paused
        assert "POST /pause" not in server.routes


class TestDeadTrainer:
    def test_an_update_that_it_left_open_is_ended_and_everything_sent(self, publishing, server):
        server.state.is_paused = True
        server.state.is_updating = True
        publishing.publish(policy(), 5)
        start = server.routes.index("POST /start_weight_update")
        assert server.routes[start : start + 4] == [
            "POST /start_weight_update",
            "POST /finish_weight_update",
            "POST /start_weight_update",
            "POST /update_weights",
        ]
        assert serves(server, policy())
        assert (server.state.weight_version, server.state.is_paused) == ("5", False)

    def test_an_update_that_the_engine_does_not_finish_is_replaced(self, publishing, server):
        """Our engines refuse to finish half a policy, and take another one within the same update."""
        server.state.is_paused = True
        server.state.is_updating = True
        server.state.unsent = {"model.norm.weight"}
        publishing.publish(policy(), 5)
        assert serves(server, policy())
        assert (server.state.weight_version, server.state.is_paused) == ("5", False)


@pytest.mark.usefixtures("fast_retries")
class TestRetry:
    @pytest.mark.parametrize("action", [500, "close", "reset", "html"])
    @pytest.mark.parametrize("route", CONTROL_POSTS)
    def test_one_failure_is_mended(self, server, route, action):
        publishing = Publishing(server, "retry")
        server.script[route] = [action, None]
        report = publishing.publish(policy(), 1)
        assert (report.num_retries, report.num_failures) == (1, 1)
        assert serves(server, policy())
        assert (server.state.weight_version, server.state.is_paused) == ("1", False)
        publishing.servers.close()

    @pytest.mark.parametrize("action", ["die", "answer and die"])
    @pytest.mark.parametrize("route", CONTROL_POSTS)
    def test_a_server_that_dies_is_waited_for_and_given_everything(self, server, route, action):
        publishing = Publishing(server, "retry")
        publishing.publish(policy(seed=3), 0)
        if route == "POST /init_weight_transfer_engine":
            # It dies once more while it is connected again.
            server.restart()
        server.script[route] = action
        restart = threading.Thread(target=lambda: (server.ended.wait(20), time.sleep(0.3), server.restart()))
        restart.start()
        report = publishing.publish(policy(), 1)
        restart.join()
        # `answer and die` of the last control request is seen when the version is read.
        assert report.num_failures >= 1
        assert serves(server, policy())
        assert (server.state.weight_version, server.state.is_paused) == ("1", False)
        publishing.servers.close()

    def test_a_server_that_restarted_in_between_is_recognised_without_a_failure(self, server):
        publishing = Publishing(server, "retry")
        publishing.publish(policy(), 0)
        server.restart()
        assert not serves(server, policy())
        report = publishing.publish(policy(), 1)
        assert (report.num_retries, report.num_failures) == (0, 0)
        assert serves(server, policy())
        publishing.servers.close()

    def test_it_ends_after_so_many_attempts_with_the_servers_state(self, server):
        publishing = Publishing(server, "retry")
        server.script["POST /update_weights"] = 500
        error = publishing.failure()
        assert server.routes.count("POST /update_weights") == 3
        assert "holds no complete policy" in error.why
        assert server.state.is_paused
        publishing.servers.close()

    def test_a_server_that_stays_away_ends_the_run(self, server):
        publishing = Publishing(server, "retry")
        publishing.options.max_publish_retries = 1
        publishing.options.vllm_server_timeout = 0.2
        publishing.publish(policy(), 0)
        server.stop()
        error = publishing.failure()
        assert isinstance(error, WeightSyncTimeout)
        assert "is not healthy after 0 s (no connection)" in error.what
        publishing.servers.close()

    def test_pausing_goes_on_beyond_the_number_of_retries(self, server):
        publishing = Publishing(server, "pause")
        server.script["POST /start_weight_update"] = [500] * 5 + [None]
        report = publishing.publish(policy(), 1)
        assert (report.num_retries, report.num_failures) == (5, 5)
        assert serves(server, policy())
        publishing.servers.close()

    def test_another_trainer_on_the_same_server_is_never_fought(self, server):
        publishing = Publishing(server, "pause")
        publishing.publish(policy(), 0)
        server.state.weight_version = "17"
        with pytest.raises(PublishConflictError, match=r"reports weight version '17', this trainer published 0"):
            publishing.publish(policy(), 1)
        assert "POST /start_weight_update" not in server.routes[len(FIRST_PUBLISH) :]
        publishing.servers.close()

    def test_a_gpu_that_is_lost_is_not_tried_again(self, server, monkeypatch):
        publishing = Publishing(server, "pause")
        sent = []

        def send(specs):
            sent.append(specs)
            raise DeviceLostError("It is lost.", "A worker ended.", "Start again.")

        (link,) = publishing.servers.links
        monkeypatch.setattr(link.transport, "send", send)
        with pytest.raises(DeviceLostError, match="in state `transferring`: It is lost"):
            publishing.publish(policy(), 0)
        assert len(sent) == 1
        publishing.servers.close()


class TestVerify:
    def test_another_version_pauses_the_server_again(self, publishing, server):
        server.script["GET /weight_info"] = {"weight_version": "7"}
        error = publishing.failure()
        assert "reports weight version '7', this trainer published 1" in error.what
        assert "Another trainer" in error.why
        assert "is paused" in error.why
        assert server.state.is_paused
        assert server.routes[-2:] == ["GET /weight_info", "POST /pause"]

    def test_a_policy_that_did_not_arrive_pauses_the_server_again(self, publishing, server):
        # Version, manifest and reports are right, the weights are not those that were sent.
        other = policy(seed=1).state_dict()
        load, server.load = server.load, lambda update: (load(update), server.model.load_state_dict(other))
        error = publishing.failure()
        assert "Trainer and server disagree after the publish" in error.what
        assert "--logprob_probe_tolerance" in error.fix
        assert server.state.is_paused

    def test_nan_of_the_trainer_pauses_the_server_again(self, publishing, server):
        model = policy()
        model.lm_head.weight.data[3, 3] = float("nan")
        with pytest.raises(WeightSyncError, match=r"mean \|logprob difference\| (nan|inf)"):
            publishing.publish(model, 1)
        assert server.state.is_paused

    @pytest.mark.parametrize("value", [float("nan"), float("-inf")])
    def test_logprobs_of_the_server_that_are_no_numbers_pause_it_again(self, publishing, server, value):
        server.score = lambda ids: [None, *[{str(token): {"logprob": value, "rank": 1}} for token in ids[1:]]]
        with pytest.raises(WeightSyncError, match=r"mean \|logprob difference\| (nan|inf)"):
            publishing.publish(policy(), 1)
        assert server.state.is_paused

    @pytest.mark.parametrize("action", [500, "close", "stall", "html", "missing", "dribble"])
    @pytest.mark.parametrize("route", ["GET /weight_info", "POST /v1/completions"])
    def test_a_policy_that_cannot_be_proved_is_not_served(self, publishing, server, route, action):
        publishing.client.request_timeout = DEADLINE_S
        server.script[route] = action
        error = publishing.failure()
        assert "failed in state `verified`" in error.what
        assert "is paused and holds a policy that is not proven to be the trainer's" in error.why
        assert server.state.is_paused
        assert server.routes.count(route) == 1

    def test_a_server_that_cannot_be_paused_again_is_said_to_serve(self, publishing, server):
        server.script["POST /pause"] = [None, 500]
        server.script["POST /v1/completions"] = 500
        error = publishing.failure()
        assert "could not be paused" in error.why
        assert "may serve a policy that is not proven" in error.why
        assert not server.state.is_paused


class TestProbeInterval:
    """Logprobs are compared on the first publish to a server and then on every third."""

    @pytest.fixture
    def publishing(self, server: ScriptedServer) -> Iterator[Publishing]:
        publishing = Publishing(server, "retry", logprob_probe_interval=3)
        yield publishing
        publishing.servers.close()

    def probed(self, publishing: Publishing, versions: range) -> list[bool]:
        return [publishing.publish(policy(seed=version), version).probe is not None for version in versions]

    def test_the_first_and_every_third_are_probed(self, publishing, server):
        assert self.probed(publishing, range(7)) == [True, False, False, True, False, False, True]
        assert server.routes.count("POST /v1/completions") == 3
        assert server.routes.count("GET /weight_info") == 7 + 6
        assert serves(server, policy(seed=6))

    def test_the_trainers_answer_is_not_computed_in_between(self, publishing):
        class Counted(LogprobProbe):
            num_references = 0

            def reference(self, *args: Any, **options: Any) -> Any:
                self.num_references += 1
                return super().reference(*args, **options)

        publishing.probe = Counted(None, VOCAB_SIZE)
        self.probed(publishing, range(4))
        assert publishing.probe.num_references == 2

    def test_a_server_that_was_restarted_is_probed_again(self, publishing, server, fast_retries):
        self.probed(publishing, range(2))
        server.restart()
        assert self.probed(publishing, range(2, 4)) == [True, False]

    def test_a_failed_transfer_is_followed_by_a_probe(self, publishing, server, fast_retries):
        self.probed(publishing, range(2))
        server.script["POST /update_weights"] = [500, None]
        assert self.probed(publishing, range(2, 3)) == [True]

    def test_without_checksums_of_the_workers_every_publish_is_probed(self, publishing):
        send = publishing.link.transport.send
        publishing.link.transport.send = lambda specs: replace(send(specs), has_checksums=False)
        assert self.probed(publishing, range(3)) == [True, True, True]


class HeldTransfers:
    """Holds what a server is to load until it is told to go on."""

    def __init__(self, server: ScriptedServer):
        self.go_on = threading.Event()
        self.has_begun = threading.Event()
        self._load, server.load = server.load, self._wait

    def _wait(self, update: dict[str, Any]) -> None:
        self.has_begun.set()
        assert self.go_on.wait(10)
        self._load(update)


class TestBackground:
    """`weight_sync_background`: the model changes while its policy is on its way."""

    @pytest.fixture
    def publishing(self, server: ScriptedServer) -> Iterator[Publishing]:
        publishing = Publishing(server, weight_sync_background=True, weight_sync_mode="merged")
        yield publishing
        publishing.publisher.close()

    def test_the_first_publish_of_a_run_is_waited_for(self, publishing, server):
        assert publishing.publisher.publish_step(policy(), 0) == {}
        assert serves(server, policy())
        publishing.publisher.begin_run(4)
        assert publishing.publisher.publish_step(policy(seed=2), 4) == {}
        assert server.state.weight_version == "4"
        assert serves(server, policy(seed=2))

    def test_training_goes_on_and_what_is_proven_is_the_policy_that_was_published(self, publishing, server):
        model = policy()
        publishing.publisher.publish_step(model, 0)
        perturb(model, seed=1, scale=0.05)
        published = copy.deepcopy(model)
        held = HeldTransfers(server)
        metrics = publishing.publisher.publish_step(model, 1)
        assert publishing.publisher.policy_version == 1
        assert metrics.keys() == {"perf/weight_sync_blocked_s", "perf/weight_sync_fraction"}
        assert held.has_begun.wait(10)
        assert server.state.weight_version == "0"
        # The next step.
        perturb(model, seed=2, scale=0.05)
        held.go_on.set()
        metrics = publishing.publisher.finish()
        assert server.state.weight_version == "1"
        assert serves(server, published)
        assert not server.state.is_paused
        assert metrics["logprob_probe/mean_abs_diff"] < 0.05
        assert metrics["perf/weight_sync_s"] > 0
        assert publishing.publisher.finish() == {}

    def test_one_is_in_flight_and_they_arrive_in_order(self, publishing, server):
        model = policy()
        held = HeldTransfers(server)
        held.go_on.set()
        for step in range(5):
            perturb(model, seed=step, scale=0.01)
            publishing.publisher.publish_step(model, step)
        publishing.publisher.finish()
        versions = [request.body["weight_version"] for request in server.requests if "finish" in request.route]
        assert versions == ["0", "1", "2", "3", "4"]
        assert serves(server, model)

    def test_a_failure_is_raised_by_the_next_step(self, publishing, server):
        publishing.publisher.publish_step(policy(), 0)
        server.script["POST /update_weights"] = 500
        publishing.publisher.publish_step(policy(seed=2), 1)
        with pytest.raises(WeightSyncError, match="500"):
            publishing.publisher.publish_step(policy(seed=3), 2)
        assert server.state.is_paused
        # Said once; nothing is in flight any more.
        assert publishing.publisher.finish() == {}

    def test_a_failure_is_mended_beside_the_training(self, server, fast_retries):
        publishing = Publishing(server, "retry", weight_sync_background=True, weight_sync_mode="merged")
        publishing.publisher.publish_step(policy(), 0)
        server.script["POST /update_weights"] = ["close", None]
        publishing.publisher.publish_step(policy(seed=2), 1)
        metrics = publishing.publisher.finish()
        assert (metrics["perf/weight_sync_retries"], metrics["perf/weight_sync_failures"]) == (1, 1)
        assert serves(server, policy(seed=2))
        publishing.publisher.close()

    def test_a_run_that_ends_gives_up_what_does_not_end(self, publishing, server, monkeypatch, caplog):
        monkeypatch.setattr(publisher_module, "CLOSE_S", 0.2)
        publishing.publisher.publish_step(policy(), 0)
        held = HeldTransfers(server)
        publishing.publisher.publish_step(policy(seed=2), 1)
        assert held.has_begun.wait(10)
        publishing.publisher.close()
        assert "policy version 1 has not ended after 0 s" in caplog.text
        held.go_on.set()

    def test_a_session_waits_for_it(self, publishing, server):
        publishing.publisher.publish_step(policy(), 0)
        publishing.publisher.publish_step(policy(seed=2), 1)
        with publishing.publisher.weight_sync(7) as sync:
            assert server.state.weight_version == "1"
            sync.push(policy(seed=3))
        assert serves(server, policy(seed=3))


class TestSession:
    """`with weight_sync(version) as sync`: paused inside, resumed and proven afterwards."""

    def test_pauses_on_entry_and_delivers_at_the_end(self, publishing, server):
        with publishing.publisher.weight_sync(4) as sync:
            assert server.routes == ["POST /pause"]
            sync.push(policy())
            assert server.routes == ["POST /pause", *CONNECT]
        assert server.routes == ["POST /pause", *CONNECT, *DELIVER[1:]]
        assert serves(server, policy())
        assert (server.state.weight_version, server.state.is_paused) == ("4", False)
        assert sync.report.probe.mean_abs_diff < 0.05

    def test_takes_pairs_of_name_and_tensor(self, publishing, server):
        with publishing.publisher.weight_sync(1) as sync:
            sync.push((name, parameter.detach()) for name, parameter in policy().named_parameters())
        assert serves(server, policy())
        assert sync.report.probe is None
        assert "POST /v1/completions" not in server.routes

    def test_a_second_push_replaces_the_first(self, publishing, server):
        with publishing.publisher.weight_sync(1) as sync:
            sync.push(policy(seed=5))
            sync.push(policy())
        assert serves(server, policy())

    def test_an_error_inside_leaves_the_server_paused_with_the_old_policy(self, publishing, server):
        with pytest.raises(KeyError), publishing.publisher.weight_sync(1) as sync:
            sync.push(policy())
            raise KeyError("a tensor")
        assert server.state.is_paused
        assert "POST /start_weight_update" not in server.routes
        assert (
            serves(server, policy(seed=1).to(torch.bfloat16).float()) is False
            or server.state.weight_version == "default"
        )

    def test_nothing_pushed_is_an_error(self, publishing, server):
        with (
            pytest.raises(WeightSyncError, match=r"Nothing was pushed as policy version 1"),
            publishing.publisher.weight_sync(1),
        ):
            pass
        assert server.state.is_paused

    def test_the_client_does_it_on_its_own(self, server):
        client = AtroposVLLMClient(server.base_url, connection_timeout=5, request_timeout=10)
        with client.weight_sync(policy_version=1) as sync:
            sync.push(policy())
        assert serves(server, policy())
        assert sync.report.probe.mean_abs_diff < 0.05

    def test_an_unknown_option_is_refused(self, server):
        client = AtroposVLLMClient(server.base_url, connection_timeout=5)
        with pytest.raises(TypeError, match=r"no option \['tokeniser'\]"), client.weight_sync(1, tokeniser=None):
            pass


class TestSeveralServers:
    def test_all_hold_the_policy_and_a_failing_one_does_not_hold_up_the_other(self, server, fast_retries):
        with ScriptedServer(policy(seed=2)) as second:
            both = [Publishing(server, "retry"), Publishing(second, "retry")]
            servers = ServerGroup([publishing.link for publishing in both], both[0].options)
            second.script["POST /update_weights"] = [500, None]
            report = both[0].publisher_of(servers).publish(policy(), 3)
            assert (report.num_retries, report.num_failures) == (1, 1)
            for each in (server, second):
                assert serves(each, policy())
                assert (each.state.weight_version, each.state.is_paused) == ("3", False)
            # The healthy one was published to once.
            assert server.routes.count("POST /update_weights") == 1
            servers.close()
            assert second.offences == []


def test_every_request_carries_the_api_key(publishing, server):
    publishing.publish(policy(), 0)
    assert {request.headers.get("Authorization") for request in server.requests} == {"Bearer secret"}


def test_no_thread_outlives_a_publish(publishing):
    before = set(threading.enumerate())
    publishing.publish(policy(), 0)
    # The scripted server answers each request on a thread of its own.
    left = {thread for thread in set(threading.enumerate()) - before if "process_request" not in thread.name}
    assert left == set()
