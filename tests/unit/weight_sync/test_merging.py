"""Merged LoRA out of place: equal to PEFT's own merge in float32, and to what the PEFT model computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_gpt2, tiny_llama, tiny_qwen3
from torch import nn

from trl_atropos.weight_sync.weights.merging import served_tensor
from trl_atropos.weight_sync.weights.source import PolicyWeights


def lora(**options: Any) -> LoraConfig:
    # Random adapters: with PEFT's own start B is 0 and a lost delta would not show.
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options})


def adapted(model: nn.Module | None = None, **options: Any) -> PeftModel:
    """A PEFT model whose magnitudes, saved modules and trained tokens moved, as after some training."""
    return trained(get_peft_model(tiny_llama() if model is None else model, lora(**options)))


def trained(model: PeftModel) -> PeftModel:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_magnitude", "modules_to_save", "tokens_delta")):
                parameter.mul_(1 + 0.5 * torch.rand_like(parameter))
    return model.eval()


def two_adapters(first: dict[str, Any], second: dict[str, Any]) -> PeftModel:
    model = get_peft_model(tiny_llama(), lora(target_modules=["q_proj", "v_proj"], **first))
    model.add_adapter("second", lora(r=2, lora_alpha=16, target_modules=["v_proj", "down_proj"], **second))
    model.base_model.set_adapter(["default", "second"])
    return trained(model)


Q, ALL, EVERYWHERE = ["q_proj"], "all-linear", ["embed_tokens", "q_proj", "lm_head"]
TRANSPOSED: dict[str, Any] = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
DORA: dict[str, Any] = {"use_dora": True}

CASES: dict[str, Callable[[], PeftModel]] = {
    "lora": lambda: adapted(target_modules=ALL),
    "lora_tied": lambda: adapted(tiny_llama(tied=True), target_modules=ALL),
    "lora_of_a_second_architecture": lambda: adapted(tiny_qwen3(tied=True), target_modules=ALL),
    "q_and_v_only": lambda: adapted(target_modules=["q_proj", "v_proj"]),
    "rslora": lambda: adapted(target_modules=["q_proj", "down_proj"], use_rslora=True),
    "rslora_tied": lambda: adapted(tiny_llama(tied=True), target_modules=Q, use_rslora=True),
    "rank_pattern": lambda: adapted(
        target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 32}
    ),
    "dora": lambda: adapted(target_modules=ALL, **DORA),
    "dora_tied": lambda: adapted(tiny_llama(tied=True), target_modules=ALL, **DORA),
    "dora_embedding": lambda: adapted(target_modules=EVERYWHERE, **DORA),
    "dora_transposed": lambda: adapted(tiny_gpt2(), **TRANSPOSED, **DORA),
    "transposed": lambda: adapted(tiny_gpt2(), **TRANSPOSED),
    "lora_bias": lambda: adapted(tiny_llama(attention_bias=True), target_modules=Q, lora_bias=True),
    "lora_bias_transposed": lambda: adapted(tiny_gpt2(), **TRANSPOSED, lora_bias=True),
    "biases_of_the_base_trained": lambda: adapted(tiny_gpt2(), **TRANSPOSED, bias="all"),
    "embeddings": lambda: adapted(target_modules=EVERYWHERE),
    "saved_head_and_norm": lambda: adapted(target_modules=Q, modules_to_save=["lm_head", "norm"]),
    "saved_norm_tied": lambda: adapted(tiny_llama(tied=True), target_modules=Q, modules_to_save=["norm"]),
    "saved_embeddings_kept_tied": lambda: adapted(
        tiny_llama(tied=True), target_modules=Q, modules_to_save=["lm_head"], ensure_weight_tying=True
    ),
    "trained_tokens": lambda: adapted(target_modules=Q, trainable_token_indices={"embed_tokens": [1, 5]}),
    "trained_tokens_tied": lambda: adapted(
        tiny_llama(tied=True), target_modules=Q, trainable_token_indices={"embed_tokens": [1, 5]}
    ),
    "two_adapters": lambda: two_adapters({}, {}),
    "dora_after_lora": lambda: two_adapters({}, DORA),
    "lora_after_dora": lambda: two_adapters(DORA, {}),
    "dora_after_dora": lambda: two_adapters(DORA, DORA),
}


def published(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What arrives: every tensor copied at the moment it is yielded, as staging does."""
    source = PolicyWeights(model, dtype)
    return {name: tensor.clone() for name, tensor in source.tensors(source.manifest())}


def logits(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(input_ids=tokens).logits


def load_plain(model: PeftModel, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A model without PEFT that holds what was published and nothing else."""
    base = model.get_base_model()
    plain = type(base)(base.config)
    missing, unexpected = plain.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if base.config.tie_word_embeddings else set())
    return plain.eval()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("case", CASES)
def test_equals_peft_merge_and_unload(case):
    ours = published(CASES[case]())
    merged = CASES[case]().float().merge_and_unload(safe_merge=True)
    expected = dict(merged.named_parameters())
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert_close(tensor, expected[name])


@pytest.mark.parametrize("case", CASES)
def test_a_plain_model_with_the_published_tensors_computes_what_the_policy_computes(case):
    policy = CASES[case]()
    assert_close(logits(load_plain(policy, published(policy))), logits(policy), 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_differs_from_the_base(case):
    # Guards the guard: an adapter without effect would pass the comparisons above.
    policy = CASES[case]()
    with policy.disable_adapter():
        base = logits(policy)
    assert (logits(policy) - base).norm() > 1e-3 * base.norm()


def test_adapters_of_both_sides_of_tied_embeddings_are_published_once():
    # Not in CASES: PEFT 0.21 merges such an adapter twice into the one tensor, first for the embedding, then for the
    # head. What the model computes is the reference.
    policy = adapted(tiny_llama(tied=True), target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    tensors = published(policy)
    assert "lm_head.weight" not in tensors
    assert_close(logits(load_plain(policy, tensors)), logits(policy), 1e-5)


class TestNumerics:
    def merged_and_exact(self, dtype: torch.dtype, adapter_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        policy = adapted(tiny_llama().to(dtype), target_modules=Q)
        layer = policy.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        layer.lora_A.to(adapter_dtype)
        layer.lora_B.to(adapter_dtype)
        # W + (alpha / r) B A, alpha / r = 8 / 4
        delta = 2 * (layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double())
        return served_tensor(layer, "weight"), layer.base_layer.weight.double() + delta

    @pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
    def test_a_half_precision_base_is_merged_in_float32(self, adapter_dtype):
        # bfloat16 keeps 8 bits: rounding W, the delta or the sum to it would leave an error near 2^-9 = 2e-3.
        merged, exact = self.merged_and_exact(torch.bfloat16, adapter_dtype)
        assert merged.dtype == torch.float32
        assert_close(merged.double(), exact)

    def test_the_norm_of_dora_is_that_of_the_base_and_its_own_delta(self):
        policy = two_adapters({}, DORA)
        layer = policy.get_submodule("base_model.model.model.layers.0.self_attn.v_proj")
        base = layer.base_layer.weight.double()
        # scaling 8 / 4 of the first adapter, 16 / 2 of the second
        deltas = {
            adapter: scaling * layer.lora_B[adapter].weight.double() @ layer.lora_A[adapter].weight.double()
            for adapter, scaling in (("default", 2), ("second", 8))
        }
        norm = (base + deltas["second"]).norm(dim=1, keepdim=True)
        magnitude = layer.lora_magnitude_vector["second"].weight.double()[:, None]
        exact = magnitude / norm * (base + deltas["default"] + deltas["second"])
        assert_close(served_tensor(layer, "weight").double(), exact)


class TestNoTrace:
    @pytest.mark.parametrize("case", ["dora", "dora_after_dora", "lora_bias", "trained_tokens"])
    def test_the_layers_keep_no_value_and_no_state(self, case):
        policy = CASES[case]()
        published(policy)
        for module in policy.modules():
            assert not getattr(module, "_caches", None)
            assert not getattr(module, "_dora_cache", None)
            assert not getattr(module, "merged_adapters", None)

    @pytest.mark.parametrize("case", ["lora", "dora_after_lora", "lora_bias", "trained_tokens"])
    def test_what_is_merged_can_be_overwritten(self, case):
        # For a float32 base `weight.float()` is the weight: a merge in place would write into it.
        policy = CASES[case]()
        before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        source = PolicyWeights(policy, torch.float32)
        own = {parameter.data_ptr() for parameter in policy.parameters()}
        num_merged = 0
        for _, tensor in source.tensors(source.manifest()):
            if tensor.data_ptr() not in own:
                num_merged += 1
                tensor.zero_()
        assert num_merged
        assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
