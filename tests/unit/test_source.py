"""What is published: names, dtypes, and LoRA merged out of place, against PEFT's own merge."""

from __future__ import annotations

import copy
import hashlib
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from trl_atropos.errors import PreflightError
from trl_atropos.weight_sync.base import check_same_tensor
from trl_atropos.weight_sync.source import PolicyWeights


def tiny_llama(*, tied: bool = False, num_layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32))


def lora(**options: Any) -> LoraConfig:
    # Random adapters: with PEFT's own start B is 0 and a lost delta would not show.
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options})


def adapted(model: nn.Module | None = None, **options: Any) -> PeftModel:
    return get_peft_model(tiny_llama() if model is None else model, lora(**options))


def two_adapters() -> PeftModel:
    model = adapted(target_modules=["q_proj", "v_proj"])
    model.add_adapter("second", lora(r=2, lora_alpha=16, target_modules=["v_proj", "down_proj"]))
    model.base_model.set_adapter(["default", "second"])
    return model


def trained_head() -> PeftModel:
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name:
                parameter += torch.randn_like(parameter)
    return model


MERGEABLE = {
    "lora": lambda: adapted(target_modules="all-linear"),
    "tied_model": lambda: adapted(tiny_llama(tied=True), target_modules=["q_proj", "v_proj"]),
    "rslora": lambda: adapted(target_modules=["q_proj", "down_proj"], use_rslora=True),
    "two_active_adapters": two_adapters,
    "fan_in_fan_out": lambda: adapted(tiny_gpt2(), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    "embeddings": lambda: adapted(target_modules=["embed_tokens", "q_proj"]),
    "untied_head": lambda: adapted(target_modules=["lm_head", "v_proj"]),
    "modules_to_save": trained_head,
    "rank_pattern": lambda: adapted(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2},
                                    alpha_pattern={"v_proj": 32}),
    "trained_biases": lambda: adapted(tiny_gpt2(), target_modules=["c_attn"], fan_in_fan_out=True, bias="all"),
}  # fmt: skip


def published(source: PolicyWeights) -> dict[str, torch.Tensor]:
    """What arrives: every tensor copied at the moment it is yielded, as a transport does."""
    return {name: tensor.clone() for name, tensor in source}


def digests(model: nn.Module) -> dict[str, str]:
    return {
        name: hashlib.sha256(parameter.detach().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, parameter in model.named_parameters()
    }


class TestPlainModel:
    @pytest.mark.parametrize("tied", [False, True])
    def test_names_are_those_of_the_checkpoint_without_a_tied_head(self, tied):
        model = tiny_llama(tied=tied)
        names = {name for name, _ in PolicyWeights(model, torch.bfloat16)}
        assert names == set(model.state_dict()) - ({"lm_head.weight"} if tied else set())

    def test_tensors_are_the_parameters_themselves(self):
        model = tiny_llama()
        parameters = dict(model.named_parameters())
        for name, tensor in PolicyWeights(model, torch.bfloat16):
            assert tensor.data_ptr() == parameters[name].data_ptr()
            assert not tensor.requires_grad

    def test_the_manifest_announces_the_servers_dtype_and_the_size_on_the_wire(self):
        source = PolicyWeights(tiny_llama(), torch.bfloat16)
        specs = {spec.name: spec for spec in source.manifest()}
        embedding = specs["model.embed_tokens.weight"]
        assert {spec.dtype for spec in specs.values()} == {torch.bfloat16}
        assert embedding.shape == (64, 32)
        # 64 x 32 numbers of 2 bytes
        assert (embedding.num_bytes, embedding.dtype_name) == (4096, "bfloat16")

    def test_iterating_follows_the_manifest_every_time(self):
        source = PolicyWeights(adapted(target_modules="all-linear"), torch.bfloat16)
        for _ in range(2):
            for spec, (name, tensor) in zip(source.manifest(), source, strict=True):
                check_same_tensor(spec, name, tensor)

    def test_a_source_that_leaves_its_manifest_is_refused(self):
        spec = PolicyWeights(tiny_llama(), torch.bfloat16).manifest()[0]
        with pytest.raises(ValueError, match=r"yields 'other' .* announces 'model.embed_tokens.weight'"):
            check_same_tensor(spec, "other", torch.zeros(spec.shape))
        with pytest.raises(ValueError, match=r"of shape \(1, 2\)"):
            check_same_tensor(spec, spec.name, torch.zeros(1, 2))


class TestMerge:
    @pytest.mark.parametrize("case", MERGEABLE)
    def test_equals_peft_merge_and_unload(self, case):
        model = MERGEABLE[case]()
        expected = dict(copy.deepcopy(model).float().merge_and_unload().named_parameters())
        ours = published(PolicyWeights(model, torch.bfloat16))

        assert ours.keys() == expected.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, expected[name].detach(), rtol=1e-6, atol=1e-6, msg=name)

    @pytest.mark.parametrize("case", MERGEABLE)
    def test_differs_from_the_base(self, case):
        # Guards the guard: an adapter without effect would pass the comparison above.
        model = MERGEABLE[case]()
        ours = published(PolicyWeights(model, torch.bfloat16))
        base = dict(model.unload().named_parameters())
        assert any(not torch.equal(tensor, base[name]) for name, tensor in ours.items())

    def test_a_half_precision_base_is_merged_in_float32_and_rounded_once(self):
        # float32 adapters on a bfloat16 base, as TRL trains them.
        model = adapted(tiny_llama().to(torch.bfloat16), target_modules=["q_proj"])
        name = "base_model.model.model.layers.0.self_attn.q_proj"
        layer = model.get_submodule(name)
        weights = (layer.lora_B["default"].weight, layer.lora_A["default"].weight)
        assert {weight.dtype for weight in weights} == {torch.float32}
        # W + (alpha / r) B A, alpha / r = 8 / 4
        exact = layer.base_layer.weight.double() + 2 * (weights[0].double() @ weights[1].double())

        merged = published(PolicyWeights(model, torch.bfloat16))["model.layers.0.self_attn.q_proj.weight"]

        assert merged.dtype == torch.float32
        torch.testing.assert_close(merged.double(), exact, rtol=1e-6, atol=1e-6)

    def test_an_inactive_adapter_is_not_published(self):
        model = two_adapters()
        model.set_adapter("default")
        alone = copy.deepcopy(model)
        alone.delete_adapter("second")
        expected = dict(alone.merge_and_unload().named_parameters())
        for name, tensor in PolicyWeights(model, torch.bfloat16):
            torch.testing.assert_close(tensor, expected[name].detach(), rtol=1e-6, atol=1e-6, msg=name)


class TestBaseIsOnlyRead:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_hundred_publishes_leave_every_bit(self, dtype):
        model = adapted(tiny_llama(num_layers=1).to(dtype), target_modules="all-linear")
        assert model.get_input_embeddings().weight.dtype == dtype
        source = PolicyWeights(model, torch.bfloat16)
        before = digests(model)
        for _ in range(100):
            for _ in source:
                pass
        assert digests(model) == before

    def test_an_error_in_the_middle_leaves_every_bit_and_the_next_publish_whole(self):
        model = adapted(target_modules="all-linear")
        before = digests(model)
        source = PolicyWeights(model, torch.bfloat16)
        with pytest.raises(ConnectionError):
            for number, _ in enumerate(source):
                if number == 5:
                    raise ConnectionError("the server died")
        assert digests(model) == before
        assert not any(getattr(module, "merged", False) for module in model.modules())
        # The next publish starts anew.
        expected = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
        assert all(torch.allclose(tensor, expected[name]) for name, tensor in published(source).items())

    def test_switched_off_adapters_are_not_published(self):
        model = adapted(target_modules=["q_proj"])
        source = PolicyWeights(model, torch.float32)
        base = dict(tiny_llama().named_parameters())
        with model.disable_adapter():
            switched_off = {name: tensor.clone() for name, tensor in source}
        assert all(torch.equal(tensor, base[name]) for name, tensor in switched_off.items())
        assert any(not torch.equal(tensor, base[name]) for name, tensor in source)

    def test_what_is_yielded_can_be_overwritten(self):
        # For a float32 base `weight.float()` is the weight: a merge in place would write into it.
        model = adapted(target_modules=["q_proj"])
        before = digests(model)
        for name, tensor in PolicyWeights(model, torch.float32):
            if "q_proj" in name:
                tensor.zero_()
        assert digests(model) == before


def with_int8_weight() -> nn.Module:
    model = tiny_llama()
    weight = torch.zeros(32, 32, dtype=torch.int8)
    model.model.layers[1].self_attn.q_proj.weight = nn.Parameter(weight, requires_grad=False)
    return model


def already_merged() -> nn.Module:
    model = adapted(target_modules=["q_proj"])
    model.merge_adapter()
    return model


REFUSED = {
    "dora": (lambda: adapted(target_modules=["q_proj"], use_dora=True), "q_proj", "DoRA"),
    "lora_bias": (lambda: adapted(tiny_gpt2(), target_modules=["c_attn"], fan_in_fan_out=True, lora_bias=True),
                  "c_attn", "bias"),
    "ia3": (lambda: get_peft_model(tiny_llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
            "k_proj", "LoRA"),
    # Acts on a part of the sequence only, so that no merged weight exists.
    "activated_lora": (lambda: adapted(target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[1]),
                       "q_proj", "lora"),
    "tied_head": (lambda: adapted(tiny_llama(tied=True), target_modules=["lm_head"]), "lm_head", "tied"),
    "tied_embedding": (lambda: adapted(tiny_llama(tied=True), target_modules=["embed_tokens"]), "embed_tokens", "tied"),
    # The copy that PEFT trains is not tied any more; the server has one tensor for both.
    "saved_tied_head": (lambda: adapted(tiny_llama(tied=True), target_modules=["q_proj"], modules_to_save=["lm_head"]),
                        "lm_head", "tied"),
    "prompt_tuning": (lambda: get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
                      "PromptTuningConfig", "prompt"),
    "int8": (with_int8_weight, "model.layers.1.self_attn.q_proj.weight", "int8"),
    "already_merged": (already_merged, "q_proj", "merged"),
}  # fmt: skip


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
        base = {name.replace(".base_layer", "").removeprefix("base_model.model."): parameter.detach().clone()
                for name, parameter in model.named_parameters()}  # fmt: skip
        targets = [name for name in merged if not torch.equal(merged[name], base[name])]
        # 2 layers x (q_proj, v_proj)
        assert len(targets) == 4

        ours = self.pack_and_unpack(PolicyWeights(model, torch.float32))
        theirs = self.pack_and_unpack(self.trl_iterator(model))

        assert all(torch.allclose(ours[name], merged[name], atol=1e-6) for name in merged)
        # If this one fails, TRL has mended it: the first assertion is what must hold.
        assert all(torch.allclose(theirs[name], base[name], atol=1e-6) for name in targets)
