"""Both of our transports against real servers, tensor-parallel ones too, without the publisher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from publishing import BF16_NOISE, SEQUENCES, load, max_abs_diff
from servers import VLLMServer, save_tiny_model
from tiny_models import perturb
from transformers import PreTrainedModel

from trl_atropos.errors import VLLMServerError
from trl_atropos.weight_sync.base import PolicyLayout, TensorSpec
from trl_atropos.weight_sync.client import AtroposVLLMClient
from trl_atropos.weight_sync.transports.gloo import GlooTransport
from trl_atropos.weight_sync.transports.shm import SharedMemoryTransport


TIMEOUT_S = 60.0
MAX_FAILURES = 8
"""More failed requests than one server sees here."""

SMALL_CHUNK_BYTES = 2**16
"""The tiny models then travel in several chunks, and layers are cut by their borders."""

TRANSPORTS = {
    "trl_atropos_shm": SharedMemoryTransport,
    "trl_atropos_gloo": lambda: GlooTransport(TIMEOUT_S, chunk_bytes=SMALL_CHUNK_BYTES),
}


class Policy:
    """Tensors under the server's names, staged without a trainer."""

    def __init__(self, model: PreTrainedModel):
        self.tensors = dict(model.named_parameters())
        self.layout = PolicyLayout(
            [TensorSpec(name, torch.bfloat16, tuple(tensor.shape)) for name, tensor in self.tensors.items()]
        )

    def stage(self, memory: torch.Tensor) -> None:
        for spec in self.layout.specs:
            self.layout.view(memory, spec).copy_(self.tensors[spec.name].detach())

    def specs(self, part: str) -> list[TensorSpec]:
        return [spec for spec in self.layout.specs if part in spec.name]


LOGIT_SPACING = 2.0**-5
"""Between neighbours in bfloat16 from 4 to 8, where the largest logits of the model lie (5.9): a server that sums in another
order, as two workers do, may answer with the neighbour."""


class Connection:
    """A running server and an open transport."""

    def __init__(self, url: str, backend: str, layout: PolicyLayout):
        self.client = AtroposVLLMClient(url, request_timeout=TIMEOUT_S)
        self.transport = TRANSPORTS[backend]()
        self.open(layout)

    def open(self, layout: PolicyLayout) -> None:
        self.memory = self.transport.open(self.client, layout)

    def open_again(self, layout: PolicyLayout) -> None:
        """After a request that failed.

        vLLM's executor stops reading at the first worker that failed. What the others said is read as their answers to
        later requests, one request later with every failure, so harmless ones take them in.
        """
        failures = 0
        for _ in range(MAX_FAILURES if self.client.get_world_size() > 1 else 0):
            try:
                self.client.shutdown_weight_transfer_engine()
            except VLLMServerError:
                failures += 1
        assert failures == self.client.get_world_size() - 1
        self.open(layout)

    def publish(self, policy: Policy, specs: Sequence[TensorSpec] | None = None) -> list[list[float]]:
        """Send all of a policy, or a part of it, and return what the server answers then."""
        policy.stage(self.memory)
        self.client.pause()
        self.client.start_weight_update()
        self.transport.send(policy.layout.specs if specs is None else specs)
        self.client.finish_weight_update("published")
        self.client.resume()
        return self.logprobs()

    def logprobs(self) -> list[list[float]]:
        return self.client.get_prompt_logprobs(SEQUENCES)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """Tied: the output head of vLLM's CPU backend is the hardest to reach."""
    return save_tiny_model(tmp_path_factory.mktemp("model"), tied=True, seed=0)


def trained(model_dir: Path, seed: int, part: str = "") -> Policy:
    """The starting model after a step that moved the parameters whose name holds `part`."""
    model = load(model_dir)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
    perturb(model, seed=seed, scale=0.05)
    return Policy(model)


@pytest.fixture(scope="module", params=["trl_atropos_shm", "trl_atropos_gloo"])
def backend(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=[1, 2], ids=["one_worker", "tensor_parallel"])
def connection(request, backend, model_dir, tmp_path_factory) -> Iterator[Connection]:
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    server = VLLMServer(
        model_dir,
        *("--tensor-parallel-size", str(request.param), "--enforce-eager"),
        log_path=tmp_path_factory.mktemp("log") / "server.log",
        backend=backend,
        environment=environment,
    )
    try:
        server.start()
        yield Connection(server.url, backend, trained(model_dir, 0).layout)
    finally:
        server.stop()


@pytest.fixture(scope="module")
def results() -> dict[str, list[list[float]]]:
    """What the servers of this module answer under the same policy."""
    return {}


def test_a_publish_moves_the_policy_and_every_server_answers_alike(connection, model_dir, results):
    before = connection.logprobs()
    after = connection.publish(trained(model_dir, 1))
    assert max_abs_diff(before, after) > 10 * BF16_NOISE
    first = results.setdefault("published", after)
    assert max_abs_diff(first, after) <= LOGIT_SPACING


@pytest.mark.parametrize(
    "part", ["layers.0.self_attn", "layers.1.mlp", "embed_tokens"], ids=["attention", "mlp", "tied_embedding"]
)
def test_a_partial_publish_equals_a_complete_one_and_leaves_the_rest(connection, model_dir, part):
    start = connection.publish(Policy(load(model_dir)))
    policy = trained(model_dir, 2, part)
    partial = connection.publish(policy, policy.specs(part))
    complete = connection.publish(policy)
    assert max_abs_diff(start, partial) > 2 * BF16_NOISE
    assert max_abs_diff(partial, complete) < BF16_NOISE
    # Untouched layers, prepacked by oneDNN, got their kernel tensors back: once more, with nothing else moved.
    back = connection.publish(Policy(load(model_dir)), policy.specs(part))
    assert max_abs_diff(back, start) < BF16_NOISE


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.v_proj.weight"], "k_proj"),
        (["model.layers.1.mlp.gate_proj.weight"], "up_proj"),
    ],
    ids=["q_and_v_without_k", "gate_without_up"],
)
def test_a_part_of_a_fused_module_is_refused_and_a_complete_publish_heals(connection, model_dir, names, message):
    start = connection.publish(trained(model_dir, 3))
    policy = trained(model_dir, 4)
    with pytest.raises(VLLMServerError, match=message):
        connection.publish(policy, [spec for spec in policy.layout.specs if spec.name in names])
    connection.open_again(policy.layout)
    assert max_abs_diff(connection.publish(trained(model_dir, 3)), start) < BF16_NOISE


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.9.mlp.up_proj.weight"])
def test_names_that_the_model_does_not_know_are_refused(connection, model_dir, name):
    policy = trained(model_dir, 5)
    stranger = trained(model_dir, 5)
    stranger.tensors[name] = torch.zeros(128)
    stranger.layout = PolicyLayout([*policy.layout.specs, TensorSpec(name, torch.bfloat16, (128,))])
    connection.open(stranger.layout)
    with pytest.raises(VLLMServerError):
        connection.publish(stranger)
    connection.open_again(policy.layout)
    connection.publish(policy)
