"""A bitsandbytes base is published dequantised."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_llama
from torch import nn

from trl_atropos.weight_sync.weights.source import PolicyWeights


BITS = ["nf4", "int8"]
# bitsandbytes rearranges rows of whole blocks only, and a block of NF4 has 64 weights.
HIDDEN_SIZE = 64


def quantized(kind: str) -> nn.Module:
    """All linear layers of the decoder in bitsandbytes' form, as transformers puts them there."""
    model = tiny_llama(hidden_size=HIDDEN_SIZE)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if not isinstance(linear, nn.Linear):
                    continue
                size = (linear.in_features, linear.out_features)
                if kind == "nf4":
                    packed = bnb.nn.Linear4bit(*size, bias=False, quant_type="nf4", compute_dtype=torch.float32)
                else:
                    packed = bnb.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
                packed.load_state_dict(linear.state_dict())
                setattr(parent, name, packed.to("cpu"))
    return model


def adapted(kind: str, **options: object) -> PeftModel:
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": ["q_proj"], **options}
    return get_peft_model(quantized(kind), LoraConfig(**options))


def published(model: nn.Module) -> dict[str, torch.Tensor]:
    source = PolicyWeights(model, torch.float32)
    return {name: tensor.clone() for name, tensor in source.tensors(source.manifest())}


@pytest.mark.parametrize("kind", BITS)
def test_the_base_is_really_quantised(kind):
    # Guards the guard: 64 x 64 numbers are 2048 bytes in NF4 and 4096 in int8.
    weight = quantized(kind).model.layers[0].self_attn.q_proj.weight
    assert weight.numel() * weight.element_size() == {"nf4": 2048, "int8": 4096}[kind]


def assert_published_computes_the_same(policy: PeftModel, tolerance: float) -> None:
    plain = tiny_llama(seed=1, hidden_size=HIDDEN_SIZE)
    plain.load_state_dict(published(policy))
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, actual = policy(input_ids=tokens).logits, plain(input_ids=tokens).logits
    assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("kind", BITS)
def test_a_plain_model_with_the_published_tensors_computes_what_the_policy_computes(kind, options):
    # An int8 layer rounds its inputs, too, to 127 steps of the largest.
    assert_published_computes_the_same(adapted(kind, **options), {"nf4": 1e-5, "int8": 2e-2}[kind])


def test_weights_that_bitsandbytes_rearranged_in_eval_mode_are_published_in_order():
    # On a CPU with AVX512 in bfloat16; on any other nothing is rearranged. The rearranged layers compute in bfloat16.
    policy = adapted("nf4").eval()
    with torch.no_grad():
        policy(input_ids=torch.tensor([[1, 2, 3]]))
    assert_published_computes_the_same(policy, 2e-2)


@pytest.mark.parametrize("kind", BITS)
def test_every_weight_is_published_near_what_was_quantised(kind):
    exact = dict(tiny_llama(hidden_size=HIDDEN_SIZE).named_parameters())
    tensors = published(quantized(kind))
    assert tensors.keys() == exact.keys()
    # Half of the widest gap of the values of NF4, between -1 and -0.6962, and of the 127 steps of int8, which are counted
    # in float16.
    half_gap = {"nf4": 0.152, "int8": 0.5 / 127 + 2**-11}[kind]
    for name, tensor in tensors.items():
        assert (tensor - exact[name]).abs().max() <= 1.01 * half_gap * exact[name].abs().max()


@pytest.mark.parametrize("kind", BITS)
def test_the_manifest_knows_the_shapes_without_dequantising_and_what_is_trained(kind):
    specs = {spec.name: spec for spec in PolicyWeights(adapted(kind), torch.bfloat16).manifest()}
    down, query = specs["model.layers.0.mlp.down_proj.weight"], specs["model.layers.0.self_attn.q_proj.weight"]
    assert (down.shape, down.dtype, down.is_trained) == ((64, 128), torch.bfloat16, False)
    assert (query.shape, query.dtype, query.is_trained) == ((64, 64), torch.bfloat16, True)


@pytest.mark.parametrize("kind", BITS)
def test_the_packed_weights_stay_what_and_where_they_are(kind):
    policy = adapted(kind)
    before = {name: (id(parameter), parameter.detach().clone()) for name, parameter in policy.named_parameters()}
    states = [id(module.state.SCB) for module in policy.modules() if hasattr(module, "state")]
    published(policy)
    for name, parameter in policy.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert [id(module.state.SCB) for module in policy.modules() if hasattr(module, "state")] == states
