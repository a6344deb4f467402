"""Publishes to a real SGLang server that go wrong. Every other phase: tests/unit/weight_sync/test_sglang_publisher.py."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from inference_server_contract import REQUEST_TIMEOUT_S, Served
from servers import START_TIMEOUT_S
from sglang_server import SGLangServer

from trl_atropos.weight_sync.options import WeightSyncOptions
from trl_atropos.weight_sync.probe import LogprobProbe
from trl_atropos.weight_sync.publisher import PolicyPublisher
from trl_atropos.weight_sync.server_group import ServerGroup
from trl_atropos.weight_sync.server_link import ServerLink
from trl_atropos.weight_sync.transports.sglang_group import SGLangGlooTransport


def test_a_tensor_that_does_not_arrive_is_found(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the workers report nothing, SGLang answers 200 to a part of a policy: the probe finds it."""
    send = SGLangGlooTransport.send
    monkeypatch.setattr(SGLangGlooTransport, "send", lambda self, specs: send(self, specs[: len(specs) // 2]))
    served.publish_fails(11, match="logprob")
    monkeypatch.undo()
    assert served.publish(12) < 0.1


def test_a_server_that_is_killed_in_mid_publish_is_given_everything_once_it_is_back(
    sglang: SGLangServer, served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    is_killed = threading.Event()
    broadcast = SGLangGlooTransport._broadcast

    def kill_in_the_first(transport: SGLangGlooTransport, tensors: Sequence[torch.Tensor]) -> None:
        if not is_killed.is_set():
            sglang.kill()
            is_killed.set()
        broadcast(transport, tensors)

    def restart() -> None:
        assert is_killed.wait(REQUEST_TIMEOUT_S)
        sglang.start()

    monkeypatch.setattr(SGLangGlooTransport, "_broadcast", kill_in_the_first)
    options = WeightSyncOptions(on_publish_failure="retry", vllm_server_timeout=START_TIMEOUT_S)
    link = ServerLink(served.connect(), SGLangGlooTransport(REQUEST_TIMEOUT_S), torch.bfloat16, options)
    policy = served.policy(13)
    probe = LogprobProbe(served.tokenizer, policy.config.vocab_size)
    publisher = PolicyPublisher(options, torch.bfloat16, ServerGroup([link], options), make_probe=lambda model: probe)
    restarting = threading.Thread(target=restart)
    restarting.start()
    served.version += 1
    report = publisher.publish(policy, served.version)
    restarting.join()
    publisher.close()
    assert (report.num_retries, report.num_failures) == (1, 1)
    assert "failed in state `transferring`" in caplog.text and "holds no complete policy" in caplog.text
    assert report.probe is not None and report.probe.mean_abs_diff < 0.1
    assert served.connect().get_weight_version() == str(served.version)
