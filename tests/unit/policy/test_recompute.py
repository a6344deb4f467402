"""Selective recomputation: the same gradient, bit for bit, from fewer saved bytes; and in which cases a tensor is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scoring_cases import RECURRENT, recurrent, scored_logprobs, tiny, tiny_llama
from short_runs import train
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from trl_atropos.policy.layouts import LAYOUTS
from trl_atropos.policy.recompute import recompute_selectively, run_selectively, unwatched
from trl_atropos.policy.scoring import ForwardPlan
from trl_atropos.policy.tree_attention import TREE_SDPA, register_tree_attention


def gemma3() -> nn.Module:
    return tiny(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )


def qwen3_moe() -> nn.Module:
    return tiny(
        Qwen3MoeForCausalLM, Qwen3MoeConfig, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    )


def lora() -> nn.Module:
    options: Any = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}
    model = get_peft_model(tiny_llama(), LoraConfig(**options))
    # As gradient checkpointing has it: the embedding is frozen, and its output has a gradient all the same.
    model.enable_input_require_grads()
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny_llama, "gemma3": gemma3, "qwen3_moe": qwen3_moe, "lora": lora,
    **{name: lambda name=name: recurrent(name) for name in RECURRENT},
}  # fmt: skip


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return func(*args, **(kwargs or {}))


class Storages(TorchDispatchMode):
    """Knows the memory of all that was computed, besides that of some tensors."""

    def __init__(self, besides: Iterable[Tensor]) -> None:
        super().__init__()
        self._besides = {tensor.untyped_storage().data_ptr() for tensor in besides}
        self._found: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._besides:
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self._found[reference.cdata] = (reference, storage.nbytes())
        return outputs

    def num_bytes_alive(self) -> int:
        """Bytes of what was not freed yet."""
        return sum(size for reference, size in self._found.values() if not reference.expired())


def gradients(model: nn.Module, plan: ForwardPlan) -> tuple[dict[str, Tensor], int]:
    """Gradients of the logprobs of two groups, and the number of products of matrices that they took."""
    model.train().zero_grad()
    with Products() as products:
        scored_logprobs(model, plan).sum().backward()
    found = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return found, products.number


def enable(model: nn.Module) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    recompute_selectively(model)


class TestGradient:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("name", MODELS)
    def test_it_is_bit_for_bit_that_without_checkpointing_and_takes_no_product_more(self, name, layout):
        model = MODELS[name]()
        if layout == "packed" and name in RECURRENT:
            # Those are not kept apart by positions; both sides would be wrong in the same way.
            layout = "padded"
        if layout == "tree":
            register_tree_attention()
            model.set_attn_implementation(TREE_SDPA)
        plan = ForwardPlan(layout, projects_in_pieces=True, branches_states=layout == "tree" and name in RECURRENT)
        expected, num_products = gradients(model, plan)
        enable(model)
        ours, ours_products = gradients(model, plan)
        assert ours.keys() == expected.keys()
        for parameter, gradient in expected.items():
            assert torch.equal(ours[parameter], gradient), parameter
        assert ours_products == num_products

    @pytest.mark.parametrize("name", ["llama", "lora"])
    def test_in_mixed_precision_too(self, name):
        model = MODELS[name]().train()
        found = []
        for _ in range(2):
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = model(torch.arange(12)[None], use_cache=False).logits
            output.float().logsumexp(-1).sum().backward()
            found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
            enable(model)
        assert len(found[0]) == len(found[1]) > 0
        assert all(map(torch.equal, *found))

    def test_a_run_trains_the_same_weights(self, tmp_path):
        options = [{}, {"recompute_granularity": "selective", "gradient_checkpointing_kwargs": {"every_n_layers": 2}}]
        models = [train(tmp_path, gradient_checkpointing=bool(chosen), **chosen).model for chosen in options]
        functions = [
            layer._gradient_checkpointing_func for layer in models[1].model.layers if layer.gradient_checkpointing
        ]
        assert functions == [run_selectively] * -(-len(models[1].model.layers) // 2)
        assert all(map(torch.equal, *(model.state_dict().values() for model in models)))


def test_attention_that_is_compiled_within_a_layer_is_refused():
    model = tiny_llama()
    model.gradient_checkpointing_enable()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"flex_attention.*--recompute_granularity full"):
        recompute_selectively(model)


def test_what_is_compiled_outside_of_the_watch_stays_whole():
    compiled = torch.compile(lambda x: (x * 2).sin(), backend="aot_eager", fullgraph=True)

    def function(x: Tensor) -> Tensor:
        with unwatched():
            return compiled(x * 3)

    given = torch.linspace(-1, 1, 8).requires_grad_()
    (expected,) = torch.autograd.grad(function(given).sum(), given)
    (gradient,) = torch.autograd.grad(run_selectively(function, given).sum(), given)
    torch.testing.assert_close(gradient, expected)


class TestMemory:
    def kept_bytes(self, model: nn.Module, autocast: bool = False) -> int:
        with Storages(model.parameters()) as storages, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = model.train().model(torch.arange(12)[None], use_cache=False)
        assert output.last_hidden_state.requires_grad
        return storages.num_bytes_alive()

    def test_of_a_layer_the_outputs_of_norms_and_the_gated_product_are_not_kept(self):
        model = tiny_llama()
        before = self.kept_bytes(model)
        enable(model)
        # Of 2 layers with 12 tokens in float32: the scaled and the weighted output of 2 norms of 32, and the activation and
        # the product, 64 each.
        assert before - self.kept_bytes(model) == 2 * 12 * 4 * (2 * 2 * 32 + 2 * 64)

    def test_in_mixed_precision_the_casts_before_products_are_not_kept_either(self):
        model = tiny_llama()
        before = self.kept_bytes(model, autocast=True)
        enable(model)
        # As above, in bfloat16 behind the products of matrices. The output of a norm is float32, and was cast for each of
        # 3 and of 2 products instead of being kept. In the place of the residual sum in float32, what attention adds is kept.
        expected = 2 * 12 * (4 * 2 * 32 + 2 * 5 * 32 + 2 * 2 * 64 + (4 - 2) * 32)
        assert before - self.kept_bytes(model, autocast=True) == expected


def kept_by(function: Callable[..., Tensor], *args: Tensor, selective: bool = True) -> tuple[Tensor, int]:
    with Storages(args) as storages:
        output = run_selectively(function, *args) if selective else function(*args)
    return output, storages.num_bytes_alive()


class TestTensors:
    """Single ones, of 8 floats."""

    def check(self, function: Callable[..., Tensor], num_kept: int) -> None:
        """The gradient is right, and so many tensors are kept, the output included."""
        found = []
        for selective in (False, True):
            given = torch.linspace(-1, 1, 8).requires_grad_()
            output, num_bytes = kept_by(function, given, selective=selective)
            if selective:
                assert num_bytes == num_kept * 8 * 4
            (gradient,) = torch.autograd.grad(output.sum(), given)
            found.append(gradient)
        assert torch.equal(*found)

    def test_what_is_made_of_kept_ones_is_made_again(self):
        # sin saves what it is given, exp its output.
        self.check(lambda x: x.sin() + (x * 2).sin(), num_kept=1)
        self.check(lambda x: ((x.exp() * 2) * 3 + 1).sin(), num_kept=2)

    def test_one_that_costs_as_much_to_keep_as_what_it_is_made_of_is_kept(self):
        self.check(lambda x: (x.cumsum(0) * 2).sin(), num_kept=2)

    def test_a_view_of_one_that_is_made_again_is_a_view_of_it(self):
        # The output, that of exp, and the memory of the factor.
        self.check(lambda x: x.sin()[2] * (x * 2)[2:].view(3, 2).t().cos().exp(), num_kept=(6 + 6 + 8) / 8)

    def test_one_that_was_changed_in_place_is_kept(self):
        self.check(lambda x: (x * 2).add_(1).sin(), num_kept=2)

    def test_one_made_of_what_was_changed_in_place_is_kept(self):
        def function(x: Tensor) -> Tensor:
            kept, one = x.cos(), x.detach()[:1].cos()
            made = one + x
            one.add_(1)
            return kept + made.sin()

        self.check(function, num_kept=2)

    def test_what_is_changed_in_place_when_it_is_to_be_made_again_is_an_error(self):
        given = torch.linspace(-1, 1, 8).requires_grad_()
        one = torch.ones(1)
        output = run_selectively(lambda x: x.cos() + (one + x).sin(), given)
        one.add_(1)
        with pytest.raises(RuntimeError, match=r"shape \(1,\) was changed in place .* --recompute_granularity full"):
            output.sum().backward()

    def test_none_without_elements_is_taken_for_another(self):
        given = torch.zeros(0, 3, requires_grad=True)
        output = run_selectively(lambda x: F.silu(x * 2) * (x + 1), given)
        output.sum().backward()
        assert given.grad.shape == (0, 3)

    def test_without_gradients_nothing_is_watched(self):
        with torch.no_grad():
            output, num_bytes = kept_by(lambda x: (x * 2).sin(), torch.ones(8))
        assert num_bytes == 8 * 4 and not output.requires_grad
