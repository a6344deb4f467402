"""Small helpers around the policy: the gradient of a tied embedding, and what ends a completion."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scoring_cases import tiny_llama

from trl_atropos.errors import PreflightError
from trl_atropos.policy.load import eos_token_ids, use_sparse_embedding_gradient


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
