"""What a trainer starts from: adapters that go on, the reference, the gradient of a tied embedding, special ids."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from scoring_cases import tiny_llama
from tiny_models import perturb, tiny_gpt2, tiny_mixtral
from transformers import OPTConfig, OPTForCausalLM

from trl_atropos.errors import PreflightError
from trl_atropos.policy.forward import ReferencePolicy
from trl_atropos.policy.load import (
    REFERENCE_ADAPTER,
    PreparedPolicy,
    check_positions,
    check_router_loss,
    eos_token_ids,
    padding_id,
    prepare_policy,
    use_sparse_embedding_gradient,
)
from trl_atropos.policy.options import PolicyOptions
from trl_atropos.policy.scoring import ForwardPlan, PolicyScorer


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    input_ids = torch.tensor([[3, 5, 3, 9]])
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


class TestSparseEmbeddingGradient:
    def test_the_gradient_is_dense_and_the_same(self):
        model = tiny_llama(tie_word_embeddings=True)
        before = gradients(model)
        assert use_sparse_embedding_gradient(model)
        after = gradients(model)
        assert not after["model.embed_tokens.weight"].is_sparse
        for name, expected in before.items():
            torch.testing.assert_close(after[name], expected)

    def test_no_second_matrix_of_the_heads_size_is_made(self):
        model = tiny_llama(tie_word_embeddings=True)
        use_sparse_embedding_gradient(model)
        input_ids = torch.tensor([[3, 5, 3, 9]])
        (of_embedding,) = torch.autograd.grad(model.get_input_embeddings()(input_ids).sum(), model.lm_head.weight)
        # Four tokens, not one row for each id of the vocabulary.
        assert of_embedding.is_sparse
        assert of_embedding._nnz() == 4

    @pytest.mark.parametrize("case", ["untied", "frozen"])
    def test_it_does_not_apply_where_the_gradient_would_stay_sparse_or_is_none(self, case):
        model = tiny_llama(tie_word_embeddings=case != "untied")
        if case == "frozen":
            model.lm_head.weight.requires_grad_(False)
        assert not use_sparse_embedding_gradient(model)
        assert not model.get_input_embeddings().sparse

    def test_an_adapter_freezes_the_embedding(self):
        model = get_peft_model(tiny_llama(tie_word_embeddings=True), LoraConfig(target_modules=["q_proj"]))
        assert not use_sparse_embedding_gradient(model)


class TestEosTokenIds:
    @pytest.mark.parametrize(("of_generation", "expected"), [(7, {2, 7}), ([7, 8], {2, 7, 8}), (None, {2})])
    def test_of_tokenizer_and_generation_config(self, of_generation, expected):
        model = tiny_llama()
        model.generation_config.eos_token_id = of_generation
        assert eos_token_ids(model, SimpleNamespace(eos_token_id=2), is_required=True) == expected

    def test_none_at_all_is_refused(self):
        model = tiny_llama()
        model.generation_config.eos_token_id = None
        with pytest.raises(PreflightError, match="neither tokenizer nor generation config has an eos_token_id"):
            eos_token_ids(model, None, is_required=True)
        assert eos_token_ids(model, None, is_required=False) is None


def prepare(model: object, peft_config: LoraConfig | None = None, **options: object) -> PreparedPolicy:
    return prepare_policy(
        model,
        PolicyOptions(**options),
        object(),
        peft_config,
        needs_reference=True,
        sequence_parallel_size=1,
        max_length=64,
    )


@pytest.mark.parametrize(
    ("make", "num_positions"),
    [
        (tiny_gpt2, 32),
        (lambda: OPTForCausalLM(OPTConfig(num_hidden_layers=1, hidden_size=16, ffn_dim=16, num_attention_heads=2,
                                          vocab_size=64, max_position_embeddings=24, word_embed_proj_dim=16)), 24),
    ],
    ids=["gpt2", "opt"],
)  # fmt: skip
def test_rollouts_that_the_model_has_no_positions_for_are_refused_with_the_length_that_it_has(make, num_positions):
    check_positions(make(), num_positions)
    with pytest.raises(ValueError, match=rf"Set --max_length {num_positions}") as caught:
        check_positions(make(), num_positions + 1)
    assert f"max_length is {num_positions + 1}" in str(caught.value)
    # With rotary positions a sequence may be longer.
    check_positions(tiny_llama(), 10**6)


def test_the_loss_of_routers_is_refused_if_it_is_asked_for_and_otherwise_said_to_be_left_out(caplog):
    model = tiny_mixtral()
    assert model.config.router_aux_loss_coef > 0
    with caplog.at_level(logging.WARNING):
        check_router_loss(model)
    assert f"router_aux_loss_coef is {model.config.router_aux_loss_coef}" in caplog.text
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="has output_router_logits") as caught:
        check_router_loss(model)
    assert "--model_init_kwargs" in str(caught.value)
    caplog.clear()
    check_router_loss(tiny_llama())
    assert caplog.text == ""


def lora(**options: object) -> LoraConfig:
    return LoraConfig(r=4, **{"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options})


def trained(**options: object) -> PeftModel:
    """A policy with an adapter of an earlier training."""
    model = get_peft_model(tiny_llama(), lora(**options))
    perturb(model, seed=3, scale=0.1)
    return model


# Everything that a run with an adapter can start from, and whether the policy without the adapter is its start.
STARTS: dict[str, tuple[Callable[[], PreparedPolicy], bool]] = {
    "fresh": (lambda: prepare(tiny_llama(), lora()), True),
    "fresh, gaussian": (lambda: prepare(tiny_llama(), lora(init_lora_weights="gaussian")), True),
    "fresh, dora": (lambda: prepare(tiny_llama(), lora(use_dora=True)), True),
    "fresh, embedding": (lambda: prepare(tiny_llama(), lora(target_modules=["embed_tokens"])), True),
    "fresh, module to save": (lambda: prepare(tiny_llama(), lora(modules_to_save=["lm_head"])), False),
    "random": (lambda: prepare(tiny_llama(), lora(init_lora_weights=False)), False),
    "pissa": (lambda: prepare(tiny_llama(), lora(init_lora_weights="pissa")), False),
    "olora": (lambda: prepare(tiny_llama(), lora(init_lora_weights="olora")), False),
    "trained": (lambda: prepare(trained()), False),
    "trained, dora": (lambda: prepare(trained(use_dora=True)), False),
    "trained, module to save": (lambda: prepare(trained(modules_to_save=["norm"])), False),
    "trained, embedding": (lambda: prepare(trained(target_modules=["embed_tokens", "q_proj"])), False),
}


class TestReferenceOfAnAdapter:
    @pytest.mark.parametrize("start", STARTS)
    def test_the_reference_is_the_starting_policy(self, start):
        make, is_without_adapter = STARTS[start]
        prepared = make()
        model, plan = prepared.model.eval(), ForwardPlan("padded", projects_in_pieces=True)
        assert prepared.reference_model is None
        assert (REFERENCE_ADAPTER not in model.peft_config) == is_without_adapter
        input_ids = torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(0))
        batch = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "prediction_index": torch.arange(18).view(2, 9)[:, :-1].flatten(),
            "targets": input_ids[:, 1:].flatten(),
            "temperature": torch.ones(16),
        }
        were_trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        reference = ReferencePolicy(model, None, plan, Accelerator(cpu=True))

        def of_policy() -> torch.Tensor:
            with torch.no_grad():
                return PolicyScorer(model, plan)(model, batch)[0].logprobs

        at_start = of_policy()
        torch.testing.assert_close(reference.logprobs(model, batch), at_start, rtol=0, atol=1e-5)
        # The policy moves, the reference does not, and what is trained is what was.
        perturb(model, seed=4, scale=0.1)
        assert (of_policy() - at_start).abs().max() > 1e-3
        torch.testing.assert_close(reference.logprobs(model, batch), at_start, rtol=0, atol=1e-5)
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == were_trained
        assert not any(f".{REFERENCE_ADAPTER}." in name for name in were_trained)

    def test_what_was_frozen_by_hand_stays_frozen(self):
        model = trained()
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
        were_trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert were_trained
        model = prepare(model).model
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == were_trained

    def test_a_reference_of_ones_own_stays(self):
        model = trained()
        model.add_adapter(REFERENCE_ADAPTER, lora())
        assert prepare(model).model.peft_config.keys() == {"default", REFERENCE_ADAPTER}


class TestAdapterByPath:
    def test_it_is_trained_on(self, tmp_path: Path):
        base, adapter = tmp_path / "base", tmp_path / "adapter"
        tiny_llama().save_pretrained(base)
        saved = trained()
        saved.peft_config["default"].base_model_name_or_path = str(base)
        saved.save_pretrained(adapter)
        model = prepare(str(adapter)).model
        assert isinstance(model, PeftModel)
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert names == {name for name, parameter in saved.named_parameters() if parameter.requires_grad}
        for name, parameter in saved.named_parameters():
            torch.testing.assert_close(model.get_parameter(name), parameter)

    def test_a_second_adapter_on_top_is_refused(self, tmp_path: Path):
        tiny_llama().save_pretrained(tmp_path / "base")
        saved = trained()
        saved.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        saved.save_pretrained(tmp_path / "adapter")
        with pytest.raises(ValueError, match="A PeftModel was given together with a peft_config"):
            prepare(str(tmp_path / "adapter"), lora())


class TestTrainable:
    def test_a_frozen_adapter_is_refused_by_name(self, tmp_path: Path):
        trained().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"PeftModel.*is_trainable=True"):
            prepare(PeftModel.from_pretrained(tiny_llama(), tmp_path))

    def test_a_frozen_model_is_refused(self):
        with pytest.raises(ValueError, match=r"No parameter of the policy \(LlamaForCausalLM\) requires a gradient"):
            prepare(tiny_llama().requires_grad_(False))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_weights_that_are_too_coarse_are_said(self, dtype, caplog):
        with caplog.at_level(logging.WARNING, logger="trl_atropos"):
            prepare(tiny_llama().to(dtype))
        said = [message for message in caplog.messages if "rounded away" in message]
        assert len(said) == (dtype == torch.bfloat16)


@pytest.mark.parametrize(("of_tokenizer", "expected"), [(5, 5), (0, 0), (63, 63), (64, 0), (-1, 0), (None, 0)])
def test_rows_are_padded_with_an_id_that_the_embedding_has(of_tokenizer, expected):
    assert padding_id(SimpleNamespace(pad_token_id=of_tokenizer), 64) == expected
    assert padding_id(None, 64) == 0
