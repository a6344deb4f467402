"""Our transports in TRL's AsyncGRPOTrainer: the protocol it asks for, what arrives on the server, and what failures leave."""

from __future__ import annotations

import inspect
import queue
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from scripted_server import ScriptedServer
from tiny_models import perturb, tiny_llama
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, packing
from trl.experimental.async_grpo.async_grpo_trainer import WeightTransferProtocol
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from trl_atropos.errors import PublishConflictError, WeightSyncError
from trl_atropos.weight_sync.async_grpo import AsyncGRPOWeightTransfer
from trl_atropos.weight_sync.base import PolicyLayout, TensorSpec, TransferReport
from trl_atropos.weight_sync.client import AtroposVLLMClient


SYNC = [
    "POST /pause",
    "POST /start_weight_update",
    "POST /update_weights",
    "POST /finish_weight_update",
    "POST /resume",
    "GET /weight_info",
]


class MemoryTransport:
    """A `WeightTransport` whose worker is a dict in this process.

    Attributes:
        received (`dict[str, torch.Tensor]`):
            What the worker holds.
    """

    def __init__(self) -> None:
        self.received: dict[str, torch.Tensor] = {}
        self.is_open = False

    def open(self, client: AtroposVLLMClient, layout: PolicyLayout) -> torch.Tensor:
        self._client, self._layout = client, layout
        self._memory = torch.zeros(layout.num_bytes, dtype=torch.uint8)
        client.init_weight_transfer_engine({"num_bytes": layout.num_bytes})
        self.is_open = True
        return self._memory

    def prepare(self, specs: Sequence[TensorSpec]) -> None:
        pass

    def send(self, specs: Sequence[TensorSpec]) -> TransferReport:
        self._client.update_weights({"names": [spec.name for spec in specs]})
        self.received |= {spec.name: self._layout.view(self._memory, spec).clone() for spec in specs}
        return TransferReport(sum(spec.num_bytes for spec in specs), load_s=0.0)

    def close(self) -> None:
        self.is_open = False


def specs_of(model: torch.nn.Module) -> list[TensorSpec]:
    return [TensorSpec(name, torch.bfloat16, tuple(tensor.shape)) for name, tensor in model.named_parameters()]


def holds(transport: MemoryTransport, model: torch.nn.Module) -> bool:
    expected = {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.named_parameters()}
    return expected.keys() == transport.received.keys() and all(
        torch.equal(transport.received[name], tensor) for name, tensor in expected.items()
    )


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def client(server: ScriptedServer) -> AtroposVLLMClient:
    client = AtroposVLLMClient(server.base_url, connection_timeout=5, request_timeout=5)
    server.requests.clear()
    return client


@pytest.fixture
def transport() -> MemoryTransport:
    return MemoryTransport()


@pytest.fixture
def transfer(client: AtroposVLLMClient, transport: MemoryTransport, server: ScriptedServer) -> AsyncGRPOWeightTransfer:
    transfer = AsyncGRPOWeightTransfer(client, transport, specs_of(tiny_llama()))
    transfer.init_weight_transfer()
    assert server.routes == ["POST /init_weight_transfer_engine"]
    server.requests.clear()
    return transfer


def sync(transfer: AsyncGRPOWeightTransfer, model: torch.nn.Module) -> None:
    """What the trainer does."""
    transfer.pause()
    transfer.send_weights(model.named_parameters())
    transfer.resume()


class TestProtocol:
    def test_has_every_method_of_trls_protocol_with_its_parameters(self):
        methods = {
            name: method
            for name, method in vars(WeightTransferProtocol).items()
            if inspect.isfunction(method) and not name.startswith("_")
        }
        assert len(methods) == 5
        for name, method in methods.items():
            ours = inspect.signature(getattr(AsyncGRPOWeightTransfer, name))
            assert list(ours.parameters) == list(inspect.signature(method).parameters), name


class TestSync:
    def test_order_and_versions(self, transfer, transport, server):
        model = tiny_llama()
        for version in (1, 2):
            server.requests.clear()
            sync(transfer, model)
            assert server.routes == SYNC
            assert server.last("POST /finish_weight_update").body == {"weight_version": str(version)}
            assert (transfer.policy_version, server.state.weight_version) == (version, str(version))
            assert holds(transport, model)
            perturb(model, seed=version, scale=0.1)
        assert not server.state.is_paused
        assert server.offences == []

    def test_counts_on_from_a_resumed_run(self, client, transport, server):
        transfer = AsyncGRPOWeightTransfer(client, transport, specs_of(tiny_llama()), policy_version=40)
        transfer.init_weight_transfer()
        sync(transfer, tiny_llama())
        assert server.state.weight_version == "41"

    def test_a_pause_in_which_nothing_is_sent_serves_the_previous_policy(self, transfer, server):
        transfer.pause()
        transfer.resume()
        assert (server.state.weight_version, server.state.is_paused) == ("default", False)

    def test_an_update_that_a_killed_trainer_left_open_is_replaced(self, transfer, transport, server):
        server.state.is_updating = True
        model = tiny_llama(seed=3)
        sync(transfer, model)
        assert holds(transport, model)
        assert server.state.weight_version == "1"

    def test_destroy_releases_the_transport_and_keeps_the_policy(self, transfer, transport, server):
        sync(transfer, tiny_llama())
        transfer.destroy()
        assert not transport.is_open
        assert (server.state.weight_version, server.state.is_paused) == ("1", False)


class TestFailures:
    @pytest.mark.parametrize("action", [500, "close", "html"])
    @pytest.mark.parametrize("route", SYNC[1:4])
    def test_the_server_stays_paused_and_is_not_resumed(self, transfer, server, route, action):
        server.script[route] = action
        transfer.pause()
        with pytest.raises(WeightSyncError, match=r"Publishing policy version 1 .* The server is paused"):
            transfer.send_weights(tiny_llama().named_parameters())
        with pytest.raises(WeightSyncError, match="holds no complete policy"):
            transfer.resume()
        assert server.state.is_paused
        assert "POST /resume" not in server.routes
        assert transfer.policy_version == 0

    def test_the_next_sync_mends_it(self, transfer, transport, server):
        server.script["POST /finish_weight_update"] = [500, None]
        transfer.pause()
        with pytest.raises(WeightSyncError):
            transfer.send_weights(tiny_llama().named_parameters())
        model = tiny_llama(seed=5)
        sync(transfer, model)
        assert holds(transport, model)
        assert (server.state.weight_version, server.state.is_paused) == ("1", False)

    def test_a_foreign_version_pauses_the_server_again(self, transfer, server):
        server.script["GET /weight_info"] = {"weight_version": "77"}
        transfer.pause()
        transfer.send_weights(tiny_llama().named_parameters())
        with pytest.raises(PublishConflictError, match="'77'"):
            transfer.resume()
        assert server.state.is_paused

    @pytest.mark.parametrize(
        "change",
        [
            lambda pairs: pairs[:-1],
            lambda pairs: [*pairs, pairs[0]],
            lambda pairs: [pairs[1], pairs[0], *pairs[2:]],
            lambda pairs: [("other.name", pairs[0][1]), *pairs[1:]],
            lambda pairs: [(pairs[0][0], pairs[0][1][:1]), *pairs[1:]],
        ],
        ids=["one too few", "one too many", "another order", "another name", "another shape"],
    )
    def test_another_stream_than_announced_is_refused_before_the_first_byte(self, transfer, server, change):
        stream = iter(change(list(tiny_llama().named_parameters())))
        transfer.pause()
        with pytest.raises(WeightSyncError, match="holds the previous policy"):
            transfer.send_weights(stream)
        # Other ranks gather the rest with it.
        assert next(stream, None) is None
        assert server.routes == ["POST /pause"]
        transfer.resume()
        assert (server.state.weight_version, server.state.is_paused) == ("default", False)


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    **options: Any,
) -> torch.Tensor:
    """Flash attention's function of that name for CPUs: sequences of (T, heads, size), one after the other."""
    outputs = []
    repeats = query.shape[1] // key.shape[1]
    for i in range(len(cu_seqlens_q) - 1):
        q = query[cu_seqlens_q[i] : cu_seqlens_q[i + 1]].transpose(0, 1)
        k, v = (
            x[cu_seqlens_k[i] : cu_seqlens_k[i + 1]].repeat_interleave(repeats, dim=1).transpose(0, 1)
            for x in (key, value)
        )
        # The last query sees every key.
        visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        scores = (q @ k.transpose(1, 2) * softmax_scale).masked_fill(~visible, float("-inf"))
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


class Rollouts:
    """A rollout worker whose rollouts are there from the start."""

    def __init__(self) -> None:
        self.rollout_buffer: queue.Queue = queue.Queue()
        self.metrics_queue: queue.Queue = queue.Queue()
        self.versions: list[int] = []

    def start(self) -> None:
        # The trainer's loader takes the next batch before it trains one.
        for group_id, advantage in enumerate([1.0, -1.0] * 3):
            sample = RolloutSample(
                prompt=[],
                completion=[],
                input_ids=np.array([3, 4, 5, 6 + group_id]),
                completion_mask=np.array([0, 0, 1, 1]),
                # Uniform over 64 tokens: ln(1/64) = -4.2.
                old_log_probs=np.array([0.0, 0.0, -4.2, -4.2]),
                advantage=advantage,
                model_version=1,
                group_id=group_id,
                metrics={},
            )
            self.rollout_buffer.put(sample)

    def stop(self) -> None:
        pass

    def update_model_version(self, model_version: int) -> None:
        self.versions.append(model_version)

    def check_health(self, stale_after_s: float) -> None:
        raise AssertionError("the trainer asks for more rollouts than one step needs")


def test_a_step_of_trls_trainer_brings_its_weights_to_the_server(
    transport, client, server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # The trainer asks for the name of its GPU, and its attention is a CUDA kernel.
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "cpu")
    monkeypatch.setattr(packing, "_flash_attn", lambda: SimpleNamespace(flash_attn_varlen_func=varlen_attention))
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    vocabulary = models.WordLevel({str(token): token for token in range(64)}, unk_token="0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary), eos_token="1", pad_token="2")
    args = AsyncGRPOConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        token_budget=-1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
    )
    rollouts = Rollouts()
    trainer = AsyncGRPOTrainer(
        model=str(tmp_path / "model"),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["3 4"] * 4}),
        processing_class=tokenizer,
        rollout_worker=rollouts,
        weight_transfer=AsyncGRPOWeightTransfer(client, transport, specs_of(model)),
    )
    trainer.train()
    assert not holds(transport, model)
    assert holds(transport, trainer.model)
    # Before the first rollout, and after the step.
    assert server.routes == ["POST /init_weight_transfer_engine", *SYNC, *SYNC]
    assert rollouts.versions == [1, 2]
    assert server.state.weight_version == "2"
    assert not transport.is_open
    assert server.offences == []
