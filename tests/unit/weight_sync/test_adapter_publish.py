"""What of a policy fits into an adapter, what is written, and which files a server may still need.

Real servers are met in tests/e2e/test_adapter_publish.py.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from scripted_server import ScriptedServer
from tiny_models import tiny_gpt2, tiny_llama
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from trl_atropos.errors import PreflightError, VLLMServerError, WeightSyncError
from trl_atropos.weight_sync.client import AtroposVLLMClient
from trl_atropos.weight_sync.transports import adapter_files
from trl_atropos.weight_sync.transports.adapter_files import AdapterTransfer, SavedAdapter, check_server
from trl_atropos.weight_sync.weights.adapter import AdapterNeeds, check_adapter, take_adapter


LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def policy(**options: Any) -> PeftModel:
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return get_peft_model(tiny_llama(seed=1), LoraConfig(**config))


def with_trained_norm() -> PeftModel:
    model = policy()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


def with_second_adapter() -> PeftModel:
    model = policy()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    return model


def merged() -> PeftModel:
    model = policy()
    model.merge_adapter()
    return model


def disabled() -> PeftModel:
    model = policy()
    model.base_model.disable_adapter_layers()
    return model


def scaled() -> PeftModel:
    model = policy()
    model.get_base_model().model.layers[1].mlp.up_proj.set_scale("default", 3.0)
    return model


class TestWhatFits:
    def test_plain_adapter_needs_its_rank_and_its_modules(self):
        assert check_adapter(policy()) == AdapterNeeds(4, frozenset(LINEAR))

    def test_largest_rank_counts(self):
        needs = check_adapter(policy(rank_pattern={"q_proj": 16, "v_proj": 2}))
        assert needs == AdapterNeeds(16, frozenset(LINEAR))

    def test_only_the_layers_that_are_adapted_count(self):
        needs = check_adapter(policy(target_modules=["q_proj", "down_proj"], layers_to_transform=[1]))
        assert needs == AdapterNeeds(4, frozenset({"q_proj", "down_proj"}))

    @pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
    def test_ways_to_begin_that_leave_the_base_alone(self, init: Any):
        assert check_adapter(policy(init_lora_weights=init)).rank == 4

    def test_rank_stabilised_scaling(self):
        assert check_adapter(policy(use_rslora=True)).rank == 4

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: tiny_llama(), "LlamaForCausalLM has no LoRA adapter"),
            (lambda: policy(use_dora=True), "use_dora=True"),
            (lambda: policy(lora_bias=True, target_modules=["q_proj"]), "lora_bias=True"),
            (lambda: policy(bias="all"), "bias='all'"),
            (lambda: policy(bias="lora_only"), "bias='lora_only'"),
            (lambda: policy(modules_to_save=["norm"]), r"modules_to_save=\['norm'\]"),
            (lambda: policy(target_modules=["lm_head"]), "targets `lm_head`, the output head"),
            (lambda: policy(target_modules=["embed_tokens"]), "targets `model.embed_tokens`, the embeddings"),
            (lambda: policy(trainable_token_indices=[1]), r"trainable_token_indices=\[1\]"),
            (lambda: policy(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
            (lambda: policy(init_lora_weights="olora"), "init_lora_weights='olora'"),
            (lambda: policy(target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)]), "layer_replication="),
            (lambda: policy(target_modules=[], target_parameters=["q_proj.weight"]), "target_parameters="),
            (with_trained_norm, "`base_model.model.model.norm.weight` is trained beside the adapter 'default'"),
            (with_second_adapter, "2 adapters are active"),
            (merged, "merged in `model.layers.0.self_attn.q_proj`"),
            (disabled, "disabled in `model.layers.0.self_attn.q_proj`"),
            # 3.0 * 8 / 4 instead of 8 / 4
            (scaled, "`model.layers.1.mlp.up_proj` scales the adapter 'default' by 6.0, its rank and alpha give 2.0"),
            (
                lambda: get_peft_model(tiny_llama(), PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
                "PrefixTuningConfig",
            ),
        ],
    )
    def test_what_does_not_is_refused_by_name(self, make: Callable[[], torch.nn.Module], words: str):
        with pytest.raises(PreflightError, match=words):
            check_adapter(make())

    def test_transposed_layers_fit(self):
        config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
        assert check_adapter(get_peft_model(tiny_gpt2(), config)) == AdapterNeeds(4, frozenset({"c_attn"}))


class TestWhatIsTaken:
    def test_tensors_are_those_that_peft_saves(self, tmp_path: Path):
        model = policy()
        model.save_pretrained(tmp_path)
        expected = load_file(tmp_path / "adapter_model.safetensors")
        taken = take_adapter(model, torch.float32).tensors
        assert taken.keys() == expected.keys()
        assert all(torch.equal(taken[name], expected[name]) for name in expected)

    def test_in_the_servers_dtype_and_not_the_models_memory(self):
        model = policy()
        taken = take_adapter(model, torch.bfloat16).tensors
        before = {name: tensor.clone() for name, tensor in taken.items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        assert {tensor.dtype for tensor in taken.values()} == {torch.bfloat16}
        assert all(torch.equal(taken[name], before[name]) for name in taken)

    def test_memory_is_its_own_also_without_a_cast(self):
        model = policy().to(torch.bfloat16)
        parameters = {parameter.data_ptr() for parameter in model.parameters()}
        taken = take_adapter(model, torch.bfloat16).tensors
        assert parameters.isdisjoint(tensor.data_ptr() for tensor in taken.values())

    def test_only_the_active_adapter(self):
        model = policy()
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.set_adapter("second")
        assert check_adapter(model) == AdapterNeeds(2, frozenset({"q_proj"}))
        taken = take_adapter(model, torch.float32)
        # Two layers, A and B.
        assert len(taken.tensors) == 4
        layer = model.get_base_model().model.layers[1].self_attn.q_proj
        name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
        assert torch.equal(taken.tensors[name], layer.lora_B["second"].weight)
        assert taken.config.r == 2

    def test_names_are_without_those_of_wrappers(self):
        plain = policy()
        names = set(take_adapter(plain, torch.float32).tensors)
        layers = plain.get_base_model().model.layers
        layers[0] = checkpoint_wrapper(layers[0])
        layers[1].compile()
        layers[1].mlp = torch.compile(layers[1].mlp)
        assert set(take_adapter(plain, torch.float32).tensors) == names

    def test_configuration_of_the_model_stays_as_it_is(self):
        model = policy()
        assert take_adapter(model, torch.float32).config.inference_mode
        assert not model.peft_config["default"].inference_mode


class LoraServer(ScriptedServer):
    """A scripted server with LoRA and our middleware's count of requests in flight."""

    def __init__(self) -> None:
        super().__init__()
        self.num_in_flight: dict[str, int] = {}
        self.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = True
        self.config["device_config"] = {"device_type": "cpu"}
        self.config["lora_config"] = {"max_lora_rank": 8, "max_loras": 2, "target_modules": sorted(LINEAR)}

    def get_atropos_adapter(self, request: Any) -> Any:
        return {
            "lora_name": self.state.routed_adapter,
            "policy_version": None,
            "num_in_flight": self.num_in_flight,
        }

    def connect(self) -> AtroposVLLMClient:
        client = AtroposVLLMClient(self.base_url, connection_timeout=5, request_timeout=20)
        self.requests.clear()
        return client


@pytest.fixture
def server() -> Iterator[LoraServer]:
    with LoraServer() as server:
        yield server


@pytest.fixture
def other_server() -> Iterator[LoraServer]:
    with LoraServer() as server:
        yield server


class TestWhichServer:
    NEEDS = AdapterNeeds(8, frozenset({"q_proj", "v_proj"}))

    def test_one_that_can(self, server: LoraServer):
        check_server(server.connect(), self.NEEDS)

    def test_the_head_matters_on_a_cpu_only(self, server: LoraServer):
        server.config["lora_config"]["target_modules"] = None
        with pytest.raises(PreflightError, match=r"output head.*--lora-target-modules q_proj v_proj"):
            check_server(server.connect(), self.NEEDS)
        server.config["device_config"]["device_type"] = "cuda"
        check_server(server.connect(), self.NEEDS)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda server: server.config.update(lora_config=None), "runs without LoRA.*--enable-lora"),
            (lambda server: server.config["lora_config"].update(max_lora_rank=1), "up to 1, .* has 8.*-rank 8 "),
            (lambda server: server.config["lora_config"].update(max_loras=1), "up to 1 adapters.*--max-loras 2"),
            (lambda server: server.config["lora_config"].update(target_modules=["q_proj"]), "no LoRA on v_proj"),
            (lambda server: server.environment.update(VLLM_ALLOW_RUNTIME_LORA_UPDATING=False), "while it runs"),
            (lambda server: server.config["parallel_config"].update(data_parallel_size=2), "2 data-parallel"),
            (lambda server: server.config["parallel_config"].update(_api_process_count=4), "4 API processes"),
            (lambda server: server.script.update({"GET /atropos/adapter": 404}), "--middleware trl_atropos"),
        ],
    )
    def test_one_that_cannot_is_refused_with_its_option(self, server: LoraServer, change: Any, words: str):
        change(server)
        with pytest.raises(PreflightError, match=words):
            check_server(server.connect(), self.NEEDS)

    def test_a_server_that_fails_is_not_one_without_our_route(self, server: LoraServer):
        server.script["GET /atropos/adapter"] = 500
        with pytest.raises(VLLMServerError):
            check_server(server.connect(), self.NEEDS)

    @pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (9, 16), (64, 64), (257, 320)])
    def test_the_option_for_a_rank_is_one_that_vllm_takes(self, server: LoraServer, rank: int, allowed: int):
        server.config["lora_config"] = None
        with pytest.raises(PreflightError, match=f"--max-lora-rank {allowed} "):
            check_server(server.connect(), AdapterNeeds(rank, frozenset({"q_proj"})))


def save(transfer: AdapterTransfer, version: int = 1) -> SavedAdapter:
    return transfer.save(take_adapter(policy(), torch.bfloat16), version)


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


class TestWhatIsWritten:
    def test_peft_reads_it_back(self, tmp_path: Path):
        model = policy()
        saved = AdapterTransfer([], tmp_path).save(take_adapter(model, torch.float32), 7)
        restored = PeftModel.from_pretrained(tiny_llama(seed=1), saved.path)
        assert check_adapter(model).rank == restored.peft_config["default"].r
        ids = torch.arange(10)[None]
        assert torch.equal(model(input_ids=ids).logits, restored(input_ids=ids).logits)

    def test_size_and_version_are_reported(self, tmp_path: Path):
        saved = save(AdapterTransfer([], tmp_path), 7)
        assert saved.num_bytes == sum(path.stat().st_size for path in saved.path.iterdir())
        assert saved.policy_version == 7
        assert json.loads((saved.path / "adapter_config.json").read_text())["r"] == 4

    def test_private_to_the_user(self, tmp_path: Path):
        saved = save(AdapterTransfer([], tmp_path / "made" / "here"))
        modes = [stat.S_IMODE(path.stat().st_mode) for path in (saved.path.parent, saved.path, *saved.path.iterdir())]
        assert modes == [0o700, 0o700, 0o600, 0o600]

    def test_every_save_has_a_name_of_its_own(self, tmp_path: Path):
        transfers = [AdapterTransfer([], tmp_path), AdapterTransfer([], tmp_path)]
        names = {save(transfer, 1).name for transfer in transfers for _ in range(2)}
        assert len(names) == 4
        assert names == names_in(tmp_path)

    def test_what_fails_half_way_leaves_nothing(self, tmp_path: Path):
        adapter = take_adapter(policy(), torch.bfloat16)
        # safetensors refuses it after others of the adapter.
        adapter.tensors["z"] = torch.zeros(2, device="meta")
        with pytest.raises(Exception, match="meta"):
            AdapterTransfer([], tmp_path).save(adapter, 1)
        assert names_in(tmp_path) == set()


class TestWhatServersKeep:
    def publish(self, transfer: AdapterTransfer, *clients: AtroposVLLMClient, version: int = 1) -> str:
        saved = save(transfer, version)
        for client in clients:
            transfer.load(client, saved)
        for client in clients:
            transfer.discard_old(client)
        return saved.name

    def test_order_of_a_load(self, server: LoraServer, tmp_path: Path):
        client = server.connect()
        transfer = AdapterTransfer([client], tmp_path)
        saved = save(transfer, 3)
        assert transfer.load(client, saved).keys() == {"load", "finish"}
        assert server.routes == [
            "GET /v1/models",
            "POST /v1/load_lora_adapter",
            "POST /atropos/adapter",
            "POST /update_weight_version",
        ]
        assert server.state.adapters == {saved.name: str(saved.path)}
        assert (server.state.routed_adapter, server.state.weight_version) == (saved.name, "3")

    def test_a_load_whose_answer_was_lost_is_done_again(self, server: LoraServer, tmp_path: Path):
        client = server.connect()
        transfer = AdapterTransfer([client], tmp_path)
        saved = save(transfer)
        server.script["POST /update_weight_version"] = ["close", None]
        with pytest.raises(WeightSyncError):
            transfer.load(client, saved)
        transfer.load(client, saved)
        assert server.routes.count("POST /v1/load_lora_adapter") == 1
        assert server.state.weight_version == "1"

    def test_an_adapter_that_is_refused_is_not_routed_to(self, server: LoraServer, tmp_path: Path):
        client = server.connect()
        transfer = AdapterTransfer([client], tmp_path)
        server.script["POST /v1/load_lora_adapter"] = 500
        with pytest.raises(VLLMServerError):
            transfer.load(client, save(transfer))
        assert (server.state.routed_adapter, server.state.weight_version) == (None, "default")

    def test_two_stay_and_the_files_of_a_third_for_one_more_publish(self, server: LoraServer, tmp_path: Path):
        client = server.connect()
        transfer = AdapterTransfer([client], tmp_path)
        names = [self.publish(transfer, client, version=version) for version in range(5)]
        assert list(server.state.adapters) == names[-2:]
        assert names_in(tmp_path) == set(names[-3:])

    def test_what_a_request_uses_stays_however_old(self, server: LoraServer, tmp_path: Path):
        client = server.connect()
        transfer = AdapterTransfer([client], tmp_path)
        first = self.publish(transfer, client)
        server.num_in_flight = {first: 1}
        names = [self.publish(transfer, client) for _ in range(5)]
        assert list(server.state.adapters) == [first, *names[-2:]]
        assert names_in(tmp_path) == {first, *names[-3:]}
        server.num_in_flight = {}
        assert transfer.discard_old(client) == [first]
        assert list(server.state.adapters) == names[-2:]
        assert first in names_in(tmp_path)
        transfer.discard_old(client)
        assert names_in(tmp_path) == set(names[-2:])

    def test_what_another_server_uses_stays(self, server: LoraServer, other_server: LoraServer, tmp_path: Path):
        clients = [server.connect(), other_server.connect()]
        transfer = AdapterTransfer(clients, tmp_path)
        first = self.publish(transfer, *clients)
        other_server.num_in_flight = {first: 1}
        names = [self.publish(transfer, *clients) for _ in range(4)]
        assert list(server.state.adapters) == names[-2:]
        assert list(other_server.state.adapters) == [first, *names[-2:]]
        assert names_in(tmp_path) >= {first, *names[-2:]}

    def test_adapters_of_an_earlier_run_go_and_those_of_others_stay(self, server: LoraServer, tmp_path: Path):
        client = server.connect()
        earlier = AdapterTransfer([client], tmp_path)
        self.publish(earlier, client)
        server.state.adapters["theirs"] = "elsewhere"
        (tmp_path / "theirs").mkdir()
        (tmp_path / f".{adapter_files.NAME_PREFIX}half-written").mkdir()
        transfer = AdapterTransfer([client], tmp_path)
        names = [self.publish(transfer, client) for _ in range(2)]
        transfer.discard_old(client)
        assert set(server.state.adapters) == {"theirs", *names}
        assert names_in(tmp_path) == {"theirs", *names}

    def test_files_stay_until_every_server_was_asked_twice(
        self, server: LoraServer, other_server: LoraServer, tmp_path: Path
    ):
        clients = [server.connect(), other_server.connect()]
        left_behind = self.publish(AdapterTransfer(clients, tmp_path), *clients)
        transfer = AdapterTransfer(clients, tmp_path)
        saved = save(transfer)
        for client in clients:
            transfer.load(client, saved)
        for client in (clients[0], clients[0], clients[0], clients[1]):
            transfer.discard_old(client)
            assert left_behind in names_in(tmp_path)
        transfer.discard_old(clients[1])
        assert names_in(tmp_path) == {saved.name}

    def test_what_answers_for_the_model_is_never_taken_away(self, server: LoraServer, tmp_path: Path):
        client = server.connect()
        earlier = AdapterTransfer([client], tmp_path)
        first = self.publish(earlier, client)
        transfer = AdapterTransfer([client], tmp_path)
        save(transfer)
        for _ in range(3):
            assert transfer.discard_old(client) == []
        assert list(server.state.adapters) == [first]
        assert first in names_in(tmp_path)

    def test_a_server_that_was_restarted_is_given_the_newest(self, server: LoraServer, tmp_path: Path):
        client = server.connect()
        transfer = AdapterTransfer([client], tmp_path)
        self.publish(transfer, client)
        server.restart()
        name = self.publish(transfer, client, version=2)
        assert list(server.state.adapters) == [name]
        assert (server.state.routed_adapter, server.state.weight_version) == (name, "2")
