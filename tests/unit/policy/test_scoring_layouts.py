"""Which layout real models can take: found out by comparing with each sequence run alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from scoring_cases import (
    CPU,
    MAX_LENGTH,
    RECURRENT,
    assert_scores_are_the_models_own,
    own_logprobs,
    plan,
    recurrent,
    rollouts,
    scored_logprobs,
    tiny,
    tiny_llama,
)
from transformers import (
    AttentionInterface,
    BloomConfig,
    BloomForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    Exaone4Config,
    Exaone4ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)
from transformers.masking_utils import AttentionMaskInterface

from trl_atropos.data.micro_batches import RolloutCollator
from trl_atropos.errors import PreflightError
from trl_atropos.policy import plan as planning
from trl_atropos.policy import tree_attention, tree_states
from trl_atropos.policy.forward import make_forward
from trl_atropos.policy.layouts import LAYOUTS
from trl_atropos.policy.load import make_reference_model
from trl_atropos.policy.options import PolicyOptions
from trl_atropos.policy.scoring import ForwardPlan, takes_lengths


class TestLayout:
    @pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
    def test_a_plain_transformer_takes_trees(self, attn_implementation, caplog):
        model = tiny_llama(attn_implementation)
        found = plan(model)
        assert found == ForwardPlan("tree", projects_in_pieces=True)
        assert "is not used" not in caplog.text
        assert_scores_are_the_models_own(model, found)

    def test_flex_attention_takes_trees_in_the_forward_pass(self):
        # Forward only: flex attention has no backward on a CPU. Not compiled, which takes a minute and a C++ compiler.
        model = tiny_llama("flex_attention")
        with torch.compiler.set_stance("force_eager"):
            found = plan(model)
            assert found == ForwardPlan("tree", projects_in_pieces=True)
            with torch.no_grad():
                scored = scored_logprobs(model, found)
        with torch.no_grad():
            torch.testing.assert_close(scored, own_logprobs(tiny_llama("sdpa"), rollouts()), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_the_layout_that_was_asked_for_is_taken(self, layout, attn_implementation):
        model = tiny_llama(attn_implementation)
        found = plan(model, layout)
        assert found == ForwardPlan(layout, projects_in_pieces=True)
        assert_scores_are_the_models_own(model, found)

    @pytest.mark.parametrize("max_length", [2, 3, 10])
    def test_rollouts_may_be_shorter_than_the_sequences_of_the_check(self, max_length):
        assert plan(tiny_llama(), max_length=max_length) == ForwardPlan("tree", projects_in_pieces=True)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_learned_positions_follow_the_layout(self, layout):
        model = tiny(OPTForCausalLM, OPTConfig, ffn_dim=64, word_embed_proj_dim=32, init_std=0.2)
        if layout == "packed":
            # OPT makes its mask before it knows the positions, so nothing keeps packed rows apart.
            with pytest.raises(PreflightError, match="sequence_layout is packed, and it gives other logprobs"):
                plan(model, layout)
        else:
            assert_scores_are_the_models_own(model, plan(model, layout))


# model class, config class, options that make a window of 16 tokens
WINDOWS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 16}),
    "ministral": (MinistralForCausalLM, MinistralConfig, {"sliding_window": 16, "head_dim": 8}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {"sliding_window": 16}),
    "starcoder2": (Starcoder2ForCausalLM, Starcoder2Config, {"sliding_window": 16}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config,
              {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config,
              {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "head_dim": 8}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"sliding_window": 16, "head_dim": 8}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig,
               {"sliding_window": 16, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "cohere2": (Cohere2ForCausalLM, Cohere2Config,
                {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "olmo3": (Olmo3ForCausalLM, Olmo3Config,
              {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "exaone4": (Exaone4ForCausalLM, Exaone4Config,
                {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt_oss": (GptOssForCausalLM, GptOssConfig,
                {"sliding_window": 16, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
                 "layer_types": ["sliding_attention", "full_attention"]}),
}  # fmt: skip
# A layer with chunks, and one whose queries are scaled by another number every 8 tokens.
LLAMA4 = {"attention_chunk_size": 16, "floor_scale": 8, "attn_scale": 0.5, "head_dim": 8, "intermediate_size_mlp": 64,
          "num_local_experts": 4, "no_rope_layers": [1, 0]}  # fmt: skip
WITHOUT_SDPA = ("gpt_oss",)
"""transformers has only eager attention of these on a CPU, because of their attention sinks."""


def assert_trees_are_exact(model: Any, alone: Any) -> None:
    """Scores and gradient of trees are those of a model of the same weights, one rollout at a time, by the kernels of torch."""
    found = plan(model)
    assert found == ForwardPlan("tree", projects_in_pieces=True)
    expected = own_logprobs(alone, rollouts())
    scored = scored_logprobs(model, found)
    torch.testing.assert_close(scored, expected, rtol=0, atol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    gradients = [
        torch.autograd.grad((weights * logprobs).sum(), list(each.parameters()), materialize_grads=True)
        for each, logprobs in ((model, scored), (alone, expected))
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


class TestRounding:
    """What another kernel computes in bfloat16 is farther away than padded rows of the same kernel."""

    def comparison(self, dtype: torch.dtype) -> planning._Comparison:
        model = tiny_llama().to(dtype)
        comparison = planning._Comparison(model, model, 128, dtype, torch.device("cpu"))
        with torch.no_grad():
            comparison.run_alone(24)
        return comparison

    def test_it_is_what_coarse_embeddings_make(self):
        assert 1e-4 < self.comparison(torch.bfloat16).roundings[24] < 0.1
        assert self.comparison(torch.float32).roundings[24] == 0.0

    def test_it_leaves_the_model_and_the_random_numbers_alone(self):
        state = torch.get_rng_state()
        comparison = self.comparison(torch.bfloat16)
        assert not comparison.model.get_input_embeddings()._forward_hooks
        again = planning._logprobs_alone(
            comparison.model, [sequence for group in comparison._groups(24) for sequence in group], torch.device("cpu")
        )
        assert torch.equal(again, comparison.alone[24])
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize(("share", "is_refused"), [(0.9, False), (1.1, True)])
    def test_a_layout_may_be_as_far_away(self, monkeypatch, share, is_refused):
        comparison = self.comparison(torch.bfloat16)
        accepted = planning.ROUNDING_TOLERANCE_RATIO * comparison.roundings[24]
        monkeypatch.setattr(planning._Comparison, "difference", lambda *args: share * accepted)
        reason = comparison.refuses(ForwardPlan("tree", True), 1e-4)
        assert (reason is not None) == is_refused


class TestSlidingWindow:
    @pytest.mark.parametrize("name", sorted(WINDOWS))
    def test_trees_have_windows(self, name):
        model_class, config_class, options = WINDOWS[name]
        implementation = "eager" if name in WITHOUT_SDPA else "sdpa"
        assert_trees_are_exact(*(tiny(model_class, config_class, implementation, **options) for _ in range(2)))

    @pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt_oss"])
    def test_the_reference_has_them_too(self, name):
        model_class, config_class, options = WINDOWS[name]
        model = tiny(model_class, config_class, "eager" if name in WITHOUT_SDPA else "sdpa", **options)
        reference = make_reference_model(model, PolicyOptions())
        forward = make_forward(
            model,
            model,
            reference,
            Accelerator(cpu=True),
            layout="auto",
            max_length=MAX_LENGTH,
            needs_reference=True,
        )
        assert forward.scorer.plan.layout == "tree"
        collate = RolloutCollator("tree", temperature=1.0, shares_between_groups=forward.scorer.shares_between_groups)
        batch = collate(rollouts())
        with torch.no_grad():
            scores, _ = forward.scorer(model, batch)
        # Nothing is trained yet.
        torch.testing.assert_close(forward.reference.logprobs(model, batch), scores.logprobs, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("name", sorted(WINDOWS))
    def test_the_window_makes_a_difference(self, name):
        # Otherwise the test above could not fail.
        model_class, config_class, options = WINDOWS[name]
        implementation = "eager" if name in WITHOUT_SDPA else "sdpa"
        windowed, whole = (
            tiny(model_class, config_class, implementation, **{**options, "sliding_window": window})
            for window in (16, MAX_LENGTH)
        )
        with torch.no_grad():
            difference = own_logprobs(windowed, rollouts()) - own_logprobs(whole, rollouts())
        assert difference.abs().max() > 1e-3

    @pytest.mark.parametrize("name", sorted(WINDOWS.keys() - WITHOUT_SDPA))
    def test_eager_attention_takes_packed_rows_and_says_why(self, name, caplog):
        model_class, config_class, options = WINDOWS[name]
        model = tiny(model_class, config_class, "eager", **options)
        found = plan(model)
        assert found.projects_in_pieces
        assert found.layout == "packed"
        assert found.fallbacks == (
            "the tree layout is not used: the model's sliding window of 16 tokens is shorter than max_length (64), and only "
            "sdpa has trees with windows, not eager",
        )
        warnings = [record.getMessage() for record in caplog.records if record.name.startswith("trl_atropos.")]
        assert warnings == [f"Forward passes are slower than they could be: {why}." for why in found.fallbacks]
        assert_scores_are_the_models_own(model, found)

    def test_layers_that_do_not_say_their_window_are_found_out(self, monkeypatch):
        attend = tree_attention.tree_sdpa

        def forget(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
            return attend(*args, **kwargs)

        monkeypatch.setattr(tree_attention, "tree_sdpa", forget)
        model_class, config_class, options = WINDOWS["gemma3"]
        # Longer than the sequences of a check without a window.
        model = tiny(model_class, config_class, **{**options, "sliding_window": 40})
        found = plan(model)
        assert (found.layout, model.config._attn_implementation) == ("packed", "sdpa")
        (reason,) = found.fallbacks
        assert reason.startswith("the tree layout is not used: it gives other logprobs on this model")

    @pytest.mark.parametrize("name", WINDOWS)
    def test_a_window_that_covers_rollouts_takes_trees(self, name):
        model_class, config_class, options = WINDOWS[name]
        implementation = "eager" if name in WITHOUT_SDPA else "sdpa"
        model = tiny(model_class, config_class, implementation, **{**options, "sliding_window": MAX_LENGTH})
        found = plan(model)
        assert found == ForwardPlan("tree", projects_in_pieces=True)
        assert_scores_are_the_models_own(model, found)

    def test_a_window_that_is_switched_off_does_not_count(self):
        model = tiny(Qwen2ForCausalLM, Qwen2Config, use_sliding_window=False, sliding_window=16)
        assert plan(model).layout == "tree"

    def test_a_tree_that_was_asked_for_stops_the_run(self):
        model_class, config_class, options = WINDOWS["mistral"]
        with pytest.raises(PreflightError) as caught:
            plan(tiny(model_class, config_class, "eager", **options), "tree")
        assert caught.value.what.startswith(
            "sequence_layout is tree, and the model's sliding window of 16 tokens is shorter than max_length (64)"
        )
        assert "--sequence_layout auto" in caught.value.fix

    def test_a_window_under_another_name_is_found_too(self):
        # GPT-Neo's is window_size. Longer than the sequences of the check, shorter than max_length: the comparison alone
        # cannot see it.
        model = tiny(
            GPTNeoForCausalLM, GPTNeoConfig, "eager", num_layers=2, num_heads=4, window_size=36,
            attention_types=[[["global", "local"], 1]],
        )  # fmt: skip
        assert_scores_are_the_models_own(model, plan(model))


class TestCountsOfTheRow:
    """Llama 4 counts chunks, and the steps by which it scales queries, from the start of a row."""

    # Beyond MAX_LENGTH, only rows of several rollouts are long enough; those of the trees here have 114 tokens.
    @pytest.mark.parametrize("options", [{}, {"attention_chunk_size": 80, "floor_scale": 70}])
    def test_trees_count_on_paths(self, options):
        assert_trees_are_exact(*(tiny(Llama4ForCausalLM, Llama4TextConfig, **{**LLAMA4, **options}) for _ in range(2)))

    @pytest.mark.parametrize("name", ["attention_chunk_size", "floor_scale"])
    def test_the_counts_make_a_difference(self, name):
        # Otherwise the test above could not fail.
        counted, uncounted = (
            tiny(Llama4ForCausalLM, Llama4TextConfig, **{**LLAMA4, name: tokens}) for tokens in (LLAMA4[name], 256)
        )
        with torch.no_grad():
            difference = own_logprobs(counted, rollouts()) - own_logprobs(uncounted, rollouts())
        assert difference.abs().max() > 1e-3

    @pytest.mark.parametrize("chunk", [16, 256])
    def test_other_attention_takes_padded_rows(self, chunk):
        model = tiny(
            Llama4ForCausalLM,
            Llama4TextConfig,
            "eager",
            **{**LLAMA4, "attention_chunk_size": chunk, "floor_scale": chunk},
        )
        found = plan(model)
        assert found.layout == "padded"
        tree, packed = found.fallbacks
        assert tree.endswith("not eager")
        assert packed == (
            "the packed layout is not used: layers of the model count attention chunk size from the start of a row"
        )
        assert_scores_are_the_models_own(model, found)


@pytest.fixture
def unknown_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the layers of a model carried a state that nobody knows of."""
    monkeypatch.setattr(planning, "layers_with_states", lambda model: [])


class TestRecurrentLayers:
    @pytest.mark.parametrize("name", RECURRENT)
    def test_trees_branch_their_states(self, name, caplog):
        model = recurrent(name)
        found = plan(model)
        assert found == ForwardPlan("tree", projects_in_pieces=True, branches_states=True)
        assert "is not used" not in caplog.text
        assert_scores_are_the_models_own(model, found)

    @pytest.mark.parametrize("name", RECURRENT)
    def test_unknown_ones_take_padded_rows(self, name, caplog, unknown_states):
        model = recurrent(name)
        found = plan(model)
        assert (found.layout, found.projects_in_pieces, found.branches_states) == ("padded", True, False)
        assert [reason.split(":")[0] for reason in found.fallbacks] == [
            "the tree layout is not used", "the packed layout is not used",
        ]  # fmt: skip
        assert all("gives other logprobs on this model" in reason for reason in found.fallbacks)
        assert all(reason in caplog.text for reason in found.fallbacks)
        assert_scores_are_the_models_own(model, found)

    @pytest.mark.parametrize("layout", ["tree", "packed"])
    def test_a_layout_that_was_asked_for_and_is_wrong_stops_the_run(self, layout, unknown_states):
        with pytest.raises(PreflightError) as caught:
            plan(recurrent("bamba"), layout)
        assert f"sequence_layout is {layout}, and it gives other logprobs on this model" in caught.value.what
        assert "--sequence_layout auto" in caught.value.fix

    @pytest.mark.parametrize("name", RECURRENT)
    def test_unknown_ones_are_found_out_in_bfloat16_as_well(self, name, unknown_states):
        # Rounding moves padded rows of these models by less than 0.001 nats, a wrong layout by 0.01 to 0.3.
        assert plan(recurrent(name).to(torch.bfloat16), dtype=torch.bfloat16).layout == "padded"

    @pytest.mark.parametrize("name", RECURRENT)
    def test_trees_branch_their_states_in_bfloat16(self, name):
        model = recurrent(name).to(torch.bfloat16)
        found = plan(model, dtype=torch.bfloat16)
        assert (found.layout, found.branches_states) == ("tree", True)

    def test_kernels_that_leave_out_the_gradient_of_a_state_are_not_used(self, monkeypatch):
        def without_gradient(cls: type[tree_states.KeptStates], parents: Any) -> tree_states.KeptStates:
            states = of_branches(parents)
            states.recurrent_states = {index: state.detach() for index, state in states.recurrent_states.items()}
            return states

        of_branches = tree_states.KeptStates.of_branches
        monkeypatch.setattr(tree_states.KeptStates, "of_branches", classmethod(without_gradient))
        model = recurrent("bamba")
        found = plan(model)
        assert found.layout == "padded"
        assert "the gradient of a layer with a state is off by" in found.fallbacks[0]
        assert_scores_are_the_models_own(model, found)

    def test_a_cache_that_they_cannot_use_is_a_no(self, monkeypatch):
        def of_several(*args: Any, **kwargs: Any) -> None:
            raise KeyError(1)

        monkeypatch.setattr(tree_states.KeptStates, "update_conv_state", of_several)
        model = recurrent("bamba")
        found = plan(model)
        assert found.layout == "padded"
        assert "KeyError" in found.fallbacks[0]
        assert_scores_are_the_models_own(model, found)

    def test_compiled_ones_are_left_as_they_are(self):
        model = recurrent("bamba")
        comparison = planning._Comparison(model, torch.compile(model), MAX_LENGTH, torch.float32, CPU)
        assert not comparison.branches_states

    def test_under_zero_3_they_are_left_as_they_are(self):
        model = recurrent("bamba")
        for parameter in model.parameters():
            parameter.ds_id = 0
        found = plan(model)
        assert found.layout == "padded"
        assert "ZeRO-3" in found.fallbacks[0]

    def test_another_layout_leaves_the_layers_as_they_were(self):
        model = recurrent("bamba")
        tree_states.branch_states(model)
        plan(model, "padded")
        assert not [module for module in model.modules() if "forward" in vars(module)]

    def test_eager_attention_takes_padded_rows(self):
        assert plan(recurrent("bamba", "eager")).layout == "padded"

    def test_a_purely_recurrent_model_that_cannot_take_a_tree_falls_back(self):
        # Its forward raises on a four-dimensional mask: that is a no to the layout, not the end of the run.
        model = tiny(MambaForCausalLM, MambaConfig, "eager", state_size=8)
        found = plan(model)
        assert found.layout == "padded"
        assert_scores_are_the_models_own(model, found)


def test_position_biases_made_of_the_mask_fall_back_from_trees():
    # ALiBi: the forward unpacks the mask as (B, T) and raises on another.
    model = tiny(BloomForCausalLM, BloomConfig, "eager", n_layer=2, n_head=4)
    found = plan(model)
    assert found.layout == "padded"
    assert_scores_are_the_models_own(model, found)


class TestPackedRowsOfFlashAttention:
    """Its kernels need a GPU: what stands in here has their contract, and computes each sequence with sdpa."""

    NAME = "flash_attention_stand_in"

    @pytest.fixture
    def seen(self):
        seen: list[dict[str, Any]] = []

        def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
            assert attention_mask is None
            seen.append(kwargs)
            starts = kwargs["cu_seq_lens_q"].tolist()
            assert kwargs["cu_seq_lens_k"].tolist() == starts
            lengths = [end - start for start, end in itertools.pairwise(starts)]
            assert sum(lengths) == query.shape[2]
            assert kwargs["max_length_q"] == kwargs["max_length_k"] == max(lengths)
            parts = [
                torch.nn.functional.scaled_dot_product_attention(
                    *(part[:, :, start:end] for part in (query, key, value)),
                    is_causal=True,
                    scale=scaling,
                    enable_gqa=True,
                )
                for start, end in itertools.pairwise(starts)
            ]
            return torch.cat(parts, dim=2).transpose(1, 2), None

        AttentionInterface.register(self.NAME, attend)
        AttentionMaskInterface.register(self.NAME, lambda *args, **kwargs: None)
        yield seen
        AttentionInterface._global_mapping.pop(self.NAME)
        AttentionMaskInterface._global_mapping.pop(self.NAME)

    @pytest.mark.parametrize("has_adapter", [False, True])
    def test_every_layer_is_told_where_sequences_begin(self, seen, has_adapter):
        model = tiny_llama()
        expected = own_logprobs(model, rollouts())
        model.config._attn_implementation = self.NAME
        if has_adapter:
            model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
        found = ForwardPlan("packed", projects_in_pieces=True)
        scored = scored_logprobs(model, found)
        torch.testing.assert_close(scored, expected, atol=1e-5, rtol=0)
        assert len(seen) == model.config.num_hidden_layers

    def test_a_forward_that_does_not_hand_them_on_is_not_given_them(self):
        class Old(LlamaForCausalLM):
            def forward(self, input_ids=None, position_ids=None, use_cache=None):
                return super().forward(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)

        model = tiny(Old, LlamaConfig)
        model.config._attn_implementation = self.NAME
        assert not takes_lengths(model)

    @pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
    def test_other_attention_finds_them_in_the_positions(self, attn_implementation):
        assert not takes_lengths(tiny_llama(attn_implementation))
