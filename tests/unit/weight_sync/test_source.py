"""What is published: names, shapes and dtypes of a checkpoint, what training can change, and what is refused."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import tiny_gpt2, tiny_llama, tiny_mixtral, tiny_qwen3
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from trl_atropos.errors import PreflightError
from trl_atropos.weight_sync.base import check_same_tensor
from trl_atropos.weight_sync.weights.modules import fused_groups
from trl_atropos.weight_sync.weights.source import PolicyWeights


Q = ["q_proj"]


def lora(**options: Any) -> LoraConfig:
    # Random adapters: with PEFT's own start B is 0 and a lost delta would not show.
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options})


def adapted(model: nn.Module | None = None, **options: Any) -> PeftModel:
    return get_peft_model(tiny_llama() if model is None else model, lora(**options))


def published(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What arrives: every tensor copied at the moment it is yielded, as staging does."""
    source = PolicyWeights(model, dtype)
    return {name: tensor.clone() for name, tensor in source.tensors(source.manifest())}


def trained_names(model: nn.Module) -> set[str]:
    return {spec.name for spec in PolicyWeights(model, torch.bfloat16).manifest() if spec.is_trained}


def digests(model: nn.Module) -> dict[str, str]:
    return {
        name: hashlib.sha256(parameter.detach().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, parameter in model.named_parameters()
    }


class TestPlainModel:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("build", [tiny_llama, tiny_qwen3])
    def test_names_are_those_of_the_checkpoint_without_a_tied_head(self, build, tied):
        model = build(tied=tied)
        assert published(model).keys() == set(model.state_dict()) - ({"lm_head.weight"} if tied else set())

    @pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_mixtral])
    def test_equals_what_save_pretrained_writes(self, build, tmp_path):
        # transformers fuses the experts of Mixtral and renames its modules; a checkpoint has them as they were.
        model = build()
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        ours = published(model)
        assert ours.keys() == saved.keys()
        assert all(torch.equal(ours[name], saved[name]) for name in saved)

    def test_tensors_are_the_parameters_themselves(self):
        model = tiny_llama()
        parameters = dict(model.named_parameters())
        source = PolicyWeights(model, torch.bfloat16)
        for name, tensor in source.tensors(source.manifest()):
            assert tensor.data_ptr() == parameters[name].data_ptr()
            assert not tensor.requires_grad

    def test_the_manifest_announces_the_servers_dtype_and_the_size_on_the_wire(self):
        specs = {spec.name: spec for spec in PolicyWeights(tiny_llama(), torch.bfloat16).manifest()}
        embedding = specs["model.embed_tokens.weight"]
        assert {spec.dtype for spec in specs.values()} == {torch.bfloat16}
        assert embedding.shape == (64, 32)
        # 64 x 32 numbers of 2 bytes
        assert (embedding.num_bytes, embedding.dtype_name) == (4096, "bfloat16")

    def test_persistent_buffers_are_published_in_their_own_dtype_and_others_are_not(self):
        model = tiny_llama()
        mlp = model.model.layers[0].mlp
        mlp.register_buffer("e_score_correction_bias", torch.randn(8))
        mlp.register_buffer("scratch", torch.randn(8), persistent=False)
        specs = {spec.name: spec for spec in PolicyWeights(model, torch.bfloat16).manifest()}
        name = "model.layers.0.mlp.e_score_correction_bias"
        assert specs.keys() == set(model.state_dict())
        assert specs[name].dtype == torch.float32
        assert torch.equal(published(model)[name], mlp.e_score_correction_bias)

    def test_wrappers_of_torch_do_not_show_in_the_names(self):
        model = tiny_llama()
        expected = [spec.name for spec in PolicyWeights(model, torch.bfloat16).manifest()]
        model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
        compiled = torch.compile(model)
        assert [spec.name for spec in PolicyWeights(compiled, torch.bfloat16).manifest()] == expected
        assert list(published(compiled)) == expected


class TestIteration:
    @pytest.mark.parametrize("build", [tiny_mixtral, lambda: adapted(target_modules="all-linear")])
    def test_follows_the_manifest_every_time(self, build):
        source = PolicyWeights(build(), torch.bfloat16)
        for _ in range(2):
            specs = source.manifest()
            for spec, (name, tensor) in zip(specs, source.tensors(specs), strict=True):
                check_same_tensor(spec, name, tensor)

    @pytest.mark.parametrize("build", [tiny_mixtral, lambda: adapted(target_modules=Q)])
    def test_yields_the_part_that_is_asked_for(self, build):
        source = PolicyWeights(build(), torch.bfloat16)
        part = source.manifest()[3::4]
        assert [name for name, _ in source.tensors(part)] == [spec.name for spec in part]

    def test_a_source_that_leaves_its_manifest_is_refused(self):
        spec = PolicyWeights(tiny_llama(), torch.bfloat16).manifest()[0]
        with pytest.raises(ValueError, match=r"yields 'other' .* announces 'model.embed_tokens.weight'"):
            check_same_tensor(spec, "other", torch.zeros(spec.shape))
        with pytest.raises(ValueError, match=r"of shape \(1, 2\)"):
            check_same_tensor(spec, spec.name, torch.zeros(1, 2))

    def test_reports_the_time_of_the_last_iteration_only(self):
        source = PolicyWeights(adapted(target_modules="all-linear"), torch.bfloat16)
        specs = source.manifest()
        for _ in source.tensors(specs):
            pass
        whole = source.merge_s
        for _ in source.tensors(specs[:1]):
            pass
        assert not source.is_collective
        # One of 21 tensors, and not a merged one.
        assert 0 < source.merge_s < whole


class TestWhatTrainingCanChange:
    def test_everything_of_a_model_that_is_trained_as_a_whole(self):
        model = tiny_llama()
        assert trained_names(model) == set(model.state_dict())

    def test_the_whole_attention_of_each_layer_where_only_one_projection_is_adapted(self):
        # vLLM keeps q, k and v in one tensor and writes it anew from what it is sent (finding F5).
        projections = [f"model.layers.{n}.self_attn.{p}_proj.weight" for n in range(2) for p in "qkvo"]
        assert trained_names(adapted(target_modules=Q)) == set(projections)

    def test_norms_of_queries_and_keys_go_with_their_attention(self):
        trained = trained_names(adapted(tiny_qwen3(), target_modules=["v_proj"]))
        assert {"model.layers.0.self_attn.q_norm.weight", "model.layers.1.self_attn.k_norm.weight"} <= trained
        assert not any("mlp" in name for name in trained)

    def test_modules_that_are_saved_stand_alone_beside_the_layers(self):
        trained = trained_names(adapted(target_modules=Q, modules_to_save=["lm_head", "model.norm"]))
        assert {name for name in trained if "self_attn" not in name} == {"lm_head.weight", "model.norm.weight"}

    def test_all_experts_of_a_layer_and_what_routes_to_them_are_one_group(self):
        model = tiny_mixtral()
        model.requires_grad_(False)
        model.model.layers[1].mlp.experts.down_proj.requires_grad_(True)
        experts = {f"model.layers.1.block_sparse_moe.experts.{e}.w{w}.weight" for e in range(4) for w in (1, 2, 3)}
        assert trained_names(model) == experts | {"model.layers.1.block_sparse_moe.gate.weight"}

    def test_a_saved_copy_of_tied_embeddings_is_trained(self):
        model = adapted(tiny_llama(tied=True), target_modules=Q, modules_to_save=["lm_head"], ensure_weight_tying=True)
        trained = trained_names(model)
        assert "model.embed_tokens.weight" in trained
        assert "lm_head.weight" not in trained

    @pytest.mark.parametrize(("options", "leaf"), [({"bias": "lora_only"}, "bias"), ({"lora_bias": True}, "bias")])
    def test_trained_biases(self, options, leaf):
        model = adapted(tiny_gpt2(), target_modules=["c_fc"], fan_in_fan_out=True, **options)
        assert f"transformer.h.0.mlp.c_fc.{leaf}" in trained_names(model)

    def test_nothing_of_a_frozen_adapter(self):
        model = adapted(target_modules=Q)
        model.requires_grad_(False)
        assert trained_names(model) == set()

    def test_groups_of_a_deepseek_model(self):
        attention = [f"model.layers.3.self_attn.{name}" for name in ("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj")]
        experts = ["mlp.experts.0.gate_proj", "mlp.experts.11.down_proj", "mlp.shared_experts.up_proj", "mlp.gate"]
        above = ["model.embed_tokens", "model.norm", "lm_head"]
        groups = fused_groups([*attention, *(f"model.layers.3.{name}" for name in experts), *above])
        assert {groups[name] for name in attention} == {"model.layers.3.self_attn"}
        assert {groups[f"model.layers.3.{name}"] for name in experts} == {"model.layers.3.mlp"}
        assert [groups[name] for name in above] == above


class TestBaseIsOnlyRead:
    @pytest.mark.parametrize(("dtype", "options"), [(torch.float32, {}), (torch.bfloat16, {"use_dora": True})])
    def test_a_thousand_publishes_leave_every_bit(self, dtype, options):
        # PEFT's merge and unmerge move a bfloat16 base by up to 5e-3 in as many cycles (pitfall 2).
        model = adapted(tiny_llama(num_layers=1).to(dtype), target_modules=["q_proj", "down_proj"], **options)
        assert model.get_input_embeddings().weight.dtype == dtype
        source = PolicyWeights(model, torch.bfloat16)
        specs = source.manifest()
        before = digests(model)
        for _ in range(1000):
            for _ in source.tensors(specs):
                pass
        assert digests(model) == before

    def test_an_error_in_the_middle_leaves_every_bit_and_the_next_publish_whole(self):
        model = adapted(target_modules="all-linear")
        before = digests(model)
        source = PolicyWeights(model, torch.float32)
        with pytest.raises(ConnectionError):
            for number, _ in enumerate(source.tensors(source.manifest())):
                if number == 5:
                    raise ConnectionError("the server died")
        assert digests(model) == before
        assert not any(getattr(module, "merged", False) for module in model.modules())
        expected = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
        assert all(torch.allclose(tensor, expected[name]) for name, tensor in published(model).items())


class TestStateOfTheAdapters:
    @staticmethod
    def saved_norm() -> PeftModel:
        model = adapted(target_modules=Q, modules_to_save=["norm"])
        with torch.no_grad():
            model.get_submodule("base_model.model.model.norm.modules_to_save.default").weight.mul_(2)
        return model

    def test_switched_off_adapters_are_not_published_and_neither_are_saved_modules(self):
        model = self.saved_norm()
        source = PolicyWeights(model, torch.float32)
        base = dict(tiny_llama().named_parameters())
        with model.disable_adapter():
            switched_off = {name: tensor.clone() for name, tensor in source.tensors(source.manifest())}
        assert all(torch.equal(tensor, base[name]) for name, tensor in switched_off.items())
        differing = {name for name, tensor in published(model).items() if not torch.equal(tensor, base[name])}
        assert differing == {f"model.layers.{n}.self_attn.q_proj.weight" for n in range(2)} | {"model.norm.weight"}

    def test_the_original_stands_for_a_module_that_only_an_inactive_adapter_saved(self):
        model = self.saved_norm()
        model.add_adapter("second", lora(target_modules=["v_proj"]))
        model.set_adapter("second")
        base = dict(tiny_llama().named_parameters())
        differing = {name for name, tensor in published(model).items() if not torch.equal(tensor, base[name])}
        assert differing == {f"model.layers.{n}.self_attn.v_proj.weight" for n in range(2)}

    def test_an_adapter_that_is_merged_in_later_is_refused(self):
        model = adapted(target_modules=Q)
        source = PolicyWeights(model, torch.float32)
        specs = source.manifest()
        model.merge_adapter()
        with pytest.raises(PreflightError, match="q_proj` holds a merged adapter"):
            next(source.tensors(specs))


def with_int8_weight() -> nn.Module:
    model = tiny_llama()
    weight = torch.zeros(32, 32, dtype=torch.int8)
    model.model.layers[1].self_attn.q_proj.weight = nn.Parameter(weight, requires_grad=False)
    return model


def already_merged() -> nn.Module:
    model = adapted(target_modules=Q)
    model.merge_adapter()
    return model


def dora_after_lora_bias() -> nn.Module:
    model = adapted(tiny_llama(attention_bias=True), target_modules=Q, lora_bias=True)
    model.add_adapter("second", lora(target_modules=Q, use_dora=True))
    model.base_model.set_adapter(["default", "second"])
    return model


def untied_copies() -> nn.Module:
    # As after `model.to(device)`, which gives each of two parameters that share memory its own.
    model = adapted(tiny_llama(tied=True), target_modules=["embed_tokens"], ensure_weight_tying=True)
    head = model.get_submodule("base_model.model.lm_head")
    head.lora_A["default"].weight.data = head.lora_A["default"].weight.data.clone()
    return model


def untied_by_hand() -> nn.Module:
    model = tiny_llama(tied=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


Refused = tuple[Callable[[], nn.Module], str, str]
REFUSED: dict[str, Refused] = {
    "lora_bias_without_bias": (lambda: adapted(target_modules=Q, lora_bias=True), "q_proj", "bias"),
    "dora_after_lora_bias": (dora_after_lora_bias, "q_proj", "DoRA scales"),
    "ia3": (
        lambda: get_peft_model(tiny_llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
        "IA3Config",
        "is not LoRA",
    ),
    "ia3_in_the_layers": (
        lambda: get_peft_model(tiny_llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[])).base_model,
        "k_proj",
        "is a peft.tuners.ia3",
    ),
    # Acts on a part of the sequence only, so that no merged weight exists.
    "activated_lora": (
        lambda: adapted(target_modules=Q, task_type="CAUSAL_LM", alora_invocation_tokens=[1]),
        "q_proj",
        "ALora",
    ),
    "fused_experts": (
        lambda: adapted(tiny_mixtral(), target_modules=[], target_parameters=["mlp.experts.gate_up_proj"]),
        "mlp.experts",
        "ParamWrapper",
    ),
    "tied_head": (lambda: adapted(tiny_llama(tied=True), target_modules=["lm_head"]), "lm_head", "tied"),
    "tied_embedding": (
        lambda: adapted(tiny_llama(tied=True), target_modules=["embed_tokens"]),
        "embed_tokens",
        "tied",
    ),
    "tied_dora": (
        lambda: adapted(
            tiny_llama(tied=True), target_modules=["embed_tokens"], ensure_weight_tying=True, use_dora=True
        ),
        "lm_head",
        "tied",
    ),
    "saved_tied_head": (
        lambda: adapted(tiny_llama(tied=True), target_modules=Q, modules_to_save=["lm_head"]),
        "lm_head",
        "tied",
    ),
    "untied_copies": (untied_copies, "lm_head", "tied"),
    "untied_by_hand": (untied_by_hand, "lm_head", "tied"),
    "prompt_tuning": (
        lambda: get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        "PromptTuningConfig",
        "prompt",
    ),
    "int8": (with_int8_weight, "model.layers.1.self_attn.q_proj.weight", "int8"),
    "already_merged": (already_merged, "q_proj", "merged"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_exactly_is_refused_by_name(case):
    build, module, reason = REFUSED[case]
    model = build()
    with pytest.raises(PreflightError) as caught:
        PolicyWeights(model, torch.bfloat16)
    assert module in caught.value.what
    assert reason.lower() in str(caught.value).lower()
    assert caught.value.fix


def test_fsdp1_is_refused_with_its_reason(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(tiny_llama(), device_id=torch.device("cpu"))
        with pytest.raises(PreflightError, match=r"is sharded by FSDP1.* summon_full_params.* FSDP2"):
            PolicyWeights(model, torch.bfloat16)
    finally:
        dist.destroy_process_group()


class TestLateUnmerge:
    """TRL 1.16 yields live weights and un-merges when its iterator is exhausted, which vLLM's packing does before it
    copies: https://github.com/huggingface/trl/blob/v1.16.0/trl/generation/vllm_generation.py (`_iter_named_params`)."""

    @staticmethod
    def pack_and_unpack(weights: Any) -> dict[str, torch.Tensor]:
        """One buffer that holds the whole policy, as every model below 1 GiB meets it."""
        from vllm.distributed.weight_transfer.packed_tensor import pack_tensors, unpack_tensor

        chunk = pack_tensors(iter(weights), lambda item: item[1].contiguous(), 1 << 30)
        return {
            name: tensor.clone()
            for name, tensor in unpack_tensor(
                chunk.packed_tensor, chunk.names, chunk.shapes, chunk.dtypes, chunk.tensor_sizes
            )
        }

    @staticmethod
    def trl_iterator(model: PeftModel) -> Any:
        from trl.generation.vllm_generation import VLLMGeneration

        @contextmanager
        def gather_params(parameters):
            yield

        generation = VLLMGeneration.__new__(VLLMGeneration)
        generation.model = model
        generation._dist = SimpleNamespace(is_fsdp=False, fsdp_version=None, gather_params=gather_params)
        return generation._iter_named_params()

    def test_trl_loses_every_delta_and_we_lose_none(self):
        model = adapted(target_modules=["q_proj", "v_proj"])
        merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
        base = {
            name.replace(".base_layer", "").removeprefix("base_model.model."): parameter.detach().clone()
            for name, parameter in model.named_parameters()
        }
        targets = [name for name in merged if not torch.equal(merged[name], base[name])]
        # 2 layers x (q_proj, v_proj)
        assert len(targets) == 4

        source = PolicyWeights(model, torch.float32)
        ours = self.pack_and_unpack(source.tensors(source.manifest()))
        theirs = self.pack_and_unpack(self.trl_iterator(model))

        assert all(torch.allclose(ours[name], merged[name], atol=1e-6) for name in merged)
        # If this one fails, TRL has mended it: the first assertion is what must hold.
        assert all(torch.allclose(theirs[name], base[name], atol=1e-6) for name in targets)
