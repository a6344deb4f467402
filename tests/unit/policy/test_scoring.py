"""Scores of real models: those of each sequence run alone, whatever happens between hidden states and logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scoring_cases import (
    VOCAB_SIZE,
    assert_scores_are_the_models_own,
    own_logprobs,
    plan,
    rollouts,
    scored_logprobs,
    tiny,
    tiny_llama,
)
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from trl_atropos.data.micro_batches import RolloutCollator
from trl_atropos.errors import PreflightError
from trl_atropos.policy import logprobs
from trl_atropos.policy.layouts import LAYOUTS
from trl_atropos.policy.scoring import ForwardPlan, PolicyScorer
from trl_atropos.types import Rollout


class AddsToOneLogit(LlamaForCausalLM):
    """Changes its logits in a way that no option of the config tells."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.nn.functional.one_hot(torch.tensor(0), VOCAB_SIZE)
        return output


def mixes_rows(model: PreTrainedModel) -> PreTrainedModel:
    """Adds to every hidden state the mean over the rows of the batch: what no attention mask can undo."""

    def mix(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(0, keepdim=True)
        return output

    model.model.register_forward_hook(mix)
    return model


# model class, config class, the option under which the logits are not what the head returns, a value that says so, and
# one that does nothing
TRANSFORMED: dict[str, tuple[Any, Any, str, float, float | None]] = {
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, "final_logit_softcapping", 2.0, None),
    "cohere": (CohereForCausalLM, CohereConfig, "logit_scale", 0.3, 1.0),
    "granite": (GraniteForCausalLM, GraniteConfig, "logits_scaling", 4.0, 1.0),
}


class TestHead:
    @pytest.mark.parametrize("name", TRANSFORMED)
    def test_known_transforms_of_the_logits_are_applied_to_the_pieces(self, name):
        model_class, config_class, option, value, neutral = TRANSFORMED[name]
        model = tiny(model_class, config_class, head_dim=8, **{option: value})
        found = plan(model)
        assert found == ForwardPlan("tree", projects_in_pieces=True)
        assert_scores_are_the_models_own(model, found)
        # Guards the guard: without the transform the scores are others.
        with torch.no_grad():
            transformed = scored_logprobs(model, found)
            setattr(model.config, option, neutral)
            assert (scored_logprobs(model, found) - transformed).abs().mean() > 1e-2

    def test_an_unknown_transform_is_noticed_and_the_models_own_logits_are_taken(self, caplog):
        model = tiny(AddsToOneLogit, LlamaConfig)
        found = plan(model)
        assert (found.layout, found.projects_in_pieces) == ("tree", False)
        (reason,) = found.fallbacks
        assert reason.startswith("the model changes its logits in an unknown way (mean |logprob difference| ")
        assert "made at once" in reason
        assert reason in caplog.text
        assert_scores_are_the_models_own(model, found)

    @pytest.mark.parametrize("name", TRANSFORMED)
    @pytest.mark.parametrize("is_tied", [True, False])
    def test_pieces_of_a_sharded_head_are_made_inside_of_the_models_forward(self, monkeypatch, name, is_tied):
        model_class, config_class, option, value, _ = TRANSFORMED[name]
        model = tiny(model_class, config_class, head_dim=8, tie_word_embeddings=is_tied, **{option: value})
        outside = plan(model)
        expected = gradients(model, scored_logprobs(model, outside).sum())
        # What DeepSpeed's ZeRO-3 marks its parameters with.
        model.lm_head.weight.ds_id = 0
        found = plan(model)
        assert found == ForwardPlan("tree", projects_in_pieces=True, is_head_sharded=True)
        monkeypatch.setitem(logprobs.MAX_LOGITS, "cpu", 3 * VOCAB_SIZE)
        assert_scores_are_the_models_own(model, found)
        is_whole, sizes = [False], []
        model.register_forward_pre_hook(lambda *args: is_whole.__setitem__(0, True))
        model.register_forward_hook(lambda *args: is_whole.__setitem__(0, False))
        project = type(model.lm_head).forward

        def watched(head: nn.Module, hidden: Tensor) -> Tensor:
            if head is model.lm_head:
                assert is_whole[0], "outside of forward and backward, the weight is in pieces"
                sizes.append(hidden.numel() // hidden.shape[-1])
            return project(head, hidden)

        monkeypatch.setattr(type(model.lm_head), "forward", watched)
        loss = scored_logprobs(model, found).sum()
        is_whole[0] = True
        ours = gradients(model, loss)
        # Pieces of at most three rows, then the empty output of the model, and the same pieces in the backward pass.
        num_pieces = sizes.index(0)
        assert max(sizes) == 3
        assert num_pieces > 1
        assert sorted(sizes[:num_pieces]) == sorted(sizes[num_pieces + 1 :])
        for name, gradient in expected.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=name)

    def test_rows_that_depend_on_each_other_stop_the_run(self):
        model = mixes_rows(tiny_llama())
        with pytest.raises(PreflightError) as caught:
            plan(model)
        assert "Padded rows give other logprobs than each sequence run alone" in caught.value.what
        assert "--per_device_train_batch_size 1" in caught.value.fix

    @pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
    def test_tied_embeddings(self, attn_implementation):
        model = tiny_llama(attn_implementation, tie_word_embeddings=True)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        found = plan(model)
        assert found == ForwardPlan("tree", projects_in_pieces=True)
        assert_scores_are_the_models_own(model, found)

    @pytest.mark.parametrize(
        "options",
        [{"target_modules": ["q_proj", "lm_head"]},
         {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
         {"target_modules": ["q_proj"]}],
        ids=["lora_on_the_head", "head_saved", "body_only"],
    )  # fmt: skip
    def test_adapters(self, options):
        torch.manual_seed(1)
        base = tiny_llama()
        before = own_logprobs(base, rollouts()).detach()
        model = get_peft_model(base, LoraConfig(init_lora_weights=False, **options)).eval()
        if "modules_to_save" in options:
            with torch.no_grad():
                model.get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)
        found = plan(model)
        assert found == ForwardPlan("tree", projects_in_pieces=True)
        assert_scores_are_the_models_own(model, found)
        with torch.no_grad():
            assert (scored_logprobs(model, found) - before).abs().mean() > 1e-2


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


class TestGradient:
    @pytest.mark.parametrize("in_pieces", [True, False])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_it_is_that_of_each_sequence_run_alone(self, layout, in_pieces):
        model = tiny_llama()
        expected = gradients(model, own_logprobs(model, rollouts()).sum())
        ours = gradients(model, scored_logprobs(model, ForwardPlan(layout, in_pieces)).sum())
        for name, gradient in expected.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize("in_pieces", [True, False])
    def test_with_gradient_checkpointing(self, in_pieces, use_reentrant):
        model = tiny_llama()
        expected = gradients(model, own_logprobs(model, rollouts()).sum())
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train()
        assert plan(model) == ForwardPlan("tree", projects_in_pieces=True)
        ours = gradients(model, scored_logprobs(model, ForwardPlan("tree", in_pieces)).sum())
        for name, gradient in expected.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(("in_pieces", "is_sharded"), [(True, False), (False, False), (True, True)])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_a_micro_batch_without_rollouts_gives_every_parameter_a_gradient_of_0(self, layout, in_pieces, is_sharded):
        # The hooks of DDP and ZeRO wait for every one of them.
        model = tiny_llama()
        batch = RolloutCollator(layout, temperature=1.0)([])
        scores, tie = PolicyScorer(model, ForwardPlan(layout, in_pieces, is_head_sharded=is_sharded))(model, batch)
        assert scores.logprobs.shape == (0,)
        for gradient in gradients(model, scores.logprobs.sum() + scores.entropy.sum() + tie).values():
            assert not gradient.any()


class TestScores:
    @pytest.mark.parametrize("in_pieces", [True, False])
    def test_teacher_tokens_are_scored_at_temperature_1_and_entropy_at_the_sampling_temperature(self, in_pieces):
        model = tiny_llama()
        input_ids, teacher_token_ids = torch.tensor([3, 9, 27]), torch.tensor([[0, 0], [5, 9], [7, 1]])
        rollout = Rollout(
            input_ids=input_ids,
            labels=input_ids.masked_fill(torch.arange(3) == 0, -100),
            reward=0.0,
            advantages=torch.zeros(3),
            temperature=0.5,
            teacher_token_ids=teacher_token_ids,
            teacher_logprobs=torch.full((3, 2), -1.0),
        )
        batch = RolloutCollator("padded", temperature=1.0)([rollout])
        with torch.no_grad():
            scores, _ = PolicyScorer(model, ForwardPlan("padded", in_pieces))(model, batch)
            logits = model(input_ids[None]).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(-1, teacher_token_ids[1:])
        torch.testing.assert_close(scores.teacher_token_logprobs, expected, rtol=0, atol=1e-5)
        at_temperature = torch.distributions.Categorical(logits=logits / 0.5)
        torch.testing.assert_close(scores.logprobs, at_temperature.log_prob(input_ids[1:]), rtol=0, atol=1e-5)
        torch.testing.assert_close(scores.entropy, at_temperature.entropy(), rtol=0, atol=1e-5)


class Autocast(nn.Module):
    """The wrapped model under mixed precision, as accelerate makes it: parameters in float32, arithmetic in bfloat16."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        with autocast():
            return self.model(**inputs)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


class TestMixedPrecision:
    @pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
    def test_the_head_computes_in_what_the_wrapped_forward_computes_in(self, attn_implementation):
        model = tiny_llama(attn_implementation)
        wrapped = Autocast(model)
        found = plan(model, wrapped=wrapped, dtype=torch.bfloat16, autocast=autocast)
        assert found == ForwardPlan("tree", projects_in_pieces=True)
        dtypes: list[torch.dtype] = []
        model.lm_head.register_forward_hook(lambda head, args, logits: dtypes.append(logits.dtype))
        with torch.no_grad():
            expected = own_logprobs(wrapped, rollouts())
            dtypes.clear()
            scored = scored_logprobs(model, found, wrapped, autocast)
        assert set(dtypes) == {torch.bfloat16}
        # A few times the epsilon of bfloat16, 2^-7, for logits of about 1.
        assert (scored - expected).abs().mean() < 4 * 2**-7

    def test_the_head_computes_in_float32_if_told(self):
        model = tiny_llama()
        wrapped = Autocast(model)
        found = plan(model, wrapped=wrapped, dtype=torch.bfloat16, autocast=autocast, has_float32_head=True)
        assert found == ForwardPlan("tree", projects_in_pieces=True, has_float32_head=True)
        padded = ForwardPlan("padded", projects_in_pieces=True, has_float32_head=True)
        dtypes: list[torch.dtype] = []
        model.lm_head.register_forward_hook(lambda head, args, logits: dtypes.append(logits.dtype))
        scored = scored_logprobs(model, padded, wrapped, autocast)
        assert dtypes[-1] == torch.float32
        with torch.no_grad():
            hidden = []
            model.model.register_forward_hook(lambda module, args, output: hidden.append(output.last_hidden_state))
            batch = RolloutCollator("padded", temperature=1.0)(rollouts())
            wrapped(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            logits = hidden[0].float().flatten(0, 1)[batch["prediction_index"]] @ model.lm_head.weight.T
            of_tokens = (logits / batch["temperature"][:, None]).log_softmax(-1)
            expected = of_tokens.gather(-1, batch["targets"][:, None])[:, 0][batch["token_index"]]
        torch.testing.assert_close(scored, expected, rtol=0, atol=1e-5)
        scored.sum().backward()
        assert model.lm_head.weight.grad.dtype == torch.float32

    def test_a_head_that_cannot_compute_in_float32_is_refused(self):
        model = tiny_llama()
        model.lm_head.weight.ds_id = 0
        with pytest.raises(PreflightError, match="called inside of its forward") as caught:
            plan(model, has_float32_head=True)
        assert "the head's weight is sharded" in caught.value.why
        with pytest.raises(PreflightError, match=r"the head has weights in torch\.bfloat16"):
            plan(tiny_llama().to(torch.bfloat16), has_float32_head=True)

    def test_a_transform_of_the_logits_in_bfloat16(self):
        model = tiny(Gemma2ForCausalLM, Gemma2Config, head_dim=8, final_logit_softcapping=2.0)
        wrapped = Autocast(model)
        found = plan(model, wrapped=wrapped, dtype=torch.bfloat16, autocast=autocast)
        assert found.projects_in_pieces
        with torch.no_grad():
            difference = scored_logprobs(model, found, wrapped, autocast) - own_logprobs(wrapped, rollouts())
        assert difference.abs().mean() < 4 * 2**-7


class TestModulesAfterTheCheck:
    @staticmethod
    def modes(model: nn.Module) -> dict[str, bool]:
        return {name: module.training for name, module in model.named_modules()}

    def test_every_module_has_its_own_mode_again(self):
        model = tiny_llama(attention_dropout=0.5)
        model.train()
        model.model.layers[1].mlp.eval()
        before = self.modes(model)
        assert set(before.values()) == {True, False}
        # Dropout would make every comparison fail.
        assert plan(model).layout == "tree"
        assert self.modes(model) == before

    def test_also_after_a_refusal(self):
        model = mixes_rows(tiny_llama())
        model.train()
        model.model.layers[0].self_attn.eval()
        before = self.modes(model)
        with pytest.raises(PreflightError):
            plan(model)
        assert self.modes(model) == before

    def test_no_gradient_and_no_random_number_is_left_behind(self):
        model = tiny_llama()
        model.train()
        state = torch.get_rng_state()
        plan(model)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert torch.equal(torch.get_rng_state(), state)
        # The hooks on the head are gone: all positions have logits again.
        assert model(torch.zeros(1, 5, dtype=torch.int64)).logits.shape == (1, 5, VOCAB_SIZE)
