"""Publishes of a policy that is sharded over ranks: what test_gathering.py compares.

    torchrun --nproc_per_node 2 launched_gather.py OUTPUT PARALLELISM CASE...

Each rank leaves its results in `OUTPUT/rank{rank}.pt`.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_llama
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trl_atropos.errors import PreflightError
from trl_atropos.weight_sync.base import PolicyLayout, TensorSpec
from trl_atropos.weight_sync.weights.adapter import check_adapter, take_adapter
from trl_atropos.weight_sync.weights.source import PolicyWeights
from trl_atropos.weight_sync.weights.staging import StagedPolicy


DTYPE = torch.bfloat16
# Not a multiple of the number of ranks: the last piece is smaller.
VOCAB_SIZE = 67
LEARNING_RATE = 0.5
# A rank that waits for one that left ends here instead of in the test's deadline.
COLLECTIVE_TIMEOUT = timedelta(seconds=60)


def lora_policy(**options: Any) -> nn.Module:
    model = get_peft_model(
        tiny_llama(vocab_size=VOCAB_SIZE), LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **options)
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name or "modules_to_save" in name:
                parameter.mul_(1 + 0.5 * torch.rand_like(parameter))
    return model


POLICIES: dict[str, Callable[[], nn.Module]] = {
    "full": lambda: tiny_llama(vocab_size=VOCAB_SIZE),
    "full_tied": lambda: tiny_llama(vocab_size=VOCAB_SIZE, tied=True),
    "lora": lambda: lora_policy(target_modules="all-linear", modules_to_save=["norm"]),
    "adapter": lambda: lora_policy(target_modules="all-linear"),
    "dora": lambda: lora_policy(target_modules=["q_proj", "down_proj", "embed_tokens"], use_dora=True),
}


class StoppingSource:
    """Breaks the consumer of rank 0 in the middle, as a full disk or a wrong shape would."""

    is_collective = True

    def __init__(self, source: PolicyWeights):
        self._source = source

    def manifest(self) -> Sequence[TensorSpec]:
        return self._source.manifest()

    def tensors(self, specs: Sequence[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
        for number, (name, tensor) in enumerate(self._source.tensors(specs)):
            yield name, tensor[..., :1] if number == 5 and dist.get_rank() == 0 else tensor


def stage(source: Any) -> torch.Tensor:
    """The bytes that a transport would be given."""
    specs = source.manifest()
    layout = PolicyLayout(specs)
    memory = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    StagedPolicy(layout).stage(source, specs, [memory])
    return memory


def live_bytes(model: nn.Module, held: set[int]) -> int:
    """Bytes of whole parameters and of all tensors that were made since `gc.freeze`, without memory at these addresses."""
    # A thread of gloo lets go of the tensors of a finished collective a moment later.
    time.sleep(0.02)
    new = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter)]
    memories = {}
    for tensor in [*new, *whole_parameters(model)]:
        if tensor.device.type == "cpu":
            memory = tensor.untyped_storage()
            memories[memory.data_ptr()] = memory.nbytes()
    return sum(num_bytes for address, num_bytes in memories.items() if address not in held)


def peak_bytes(model: nn.Module) -> tuple[int, int]:
    """The most bytes that a publish adds at any tensor: in gathered parameters, and with what is merged of them."""
    source = PolicyWeights(model, DTYPE)
    specs = source.manifest()
    held = {piece.untyped_storage().data_ptr() for piece in pieces(model).values()}
    gc.collect()
    gc.freeze()
    before = live_bytes(model, held)
    gathered = total = 0
    for _, tensor in source.tensors(specs):
        added = live_bytes(model, held) - before
        is_merged = all(tensor.data_ptr() != parameter.data_ptr() for parameter in whole_parameters(model))
        gathered = max(gathered, added - (tensor.untyped_storage().nbytes() if is_merged else 0))
        total = max(total, added)
    gc.unfreeze()
    return gathered, total


def whole_parameters(model: nn.Module) -> list[nn.Parameter]:
    held = [parameter for module in model.modules() for parameter in module._parameters.values()]
    return [parameter for parameter in held if parameter is not None and not isinstance(parameter, DTensor)]


def largest_module_bytes(policy: nn.Module) -> int:
    """Of the unsharded policy: a LoRA layer with its adapters counts as one module."""
    sizes = []
    for module in policy.modules():
        parameters = module.parameters() if hasattr(module, "base_layer") else module.parameters(recurse=False)
        sizes.append(sum(parameter.numel() * parameter.element_size() for parameter in parameters))
    return max(sizes)


class Sharded:
    """A policy sharded by FSDP2 or by DeepSpeed ZeRO-3, with plain gradient descent."""

    def __init__(self, policy: nn.Module, parallelism: str):
        self.parallelism = parallelism
        if parallelism == "fsdp2":
            base = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
            for layer in base.model.layers:
                fully_shard(layer)
            fully_shard(policy)
            self.model = self.engine = policy
            self.optimizer: Any = torch.optim.SGD(self.trained(), lr=LEARNING_RATE)
        else:
            import deepspeed

            config = {
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
                "zero_allow_untested_optimizer": True,
            }
            optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=LEARNING_RATE)
            self.engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=config)
            self.model, self.optimizer = self.engine.module, self.engine

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def step(self) -> float:
        """One step of training, on different tokens on every rank."""
        tokens = torch.randint(64, (1, 12), generator=torch.Generator().manual_seed(dist.get_rank()))
        loss = self.engine(input_ids=tokens, labels=tokens).loss
        if self.parallelism == "fsdp2":
            loss.backward()
        else:
            self.engine.backward(loss)
        self.optimizer.step()
        if self.parallelism == "fsdp2":
            self.optimizer.zero_grad()
        return loss.item()

    def held(self) -> dict[str, tuple[int, torch.Tensor]]:
        """What this rank holds of every parameter: the object, and a copy of the numbers."""
        objects = dict(self.model.named_parameters())
        return {name: (id(objects[name]), piece.clone()) for name, piece in pieces(self.model).items()}


def pieces(model: nn.Module) -> dict[str, torch.Tensor]:
    """The numbers that this rank holds of every parameter."""
    named = {}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_tensor"):
            named[name] = parameter.ds_tensor.detach()
        elif isinstance(parameter, DTensor):
            named[name] = parameter.detach().to_local()
    return named


def assert_sharded(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) or parameter.shape == (0,), (name, parameter.shape)


def error_of(action: Callable[[], object]) -> str | None:
    try:
        action()
    except (ValueError, KeyError) as exc:
        return f"{type(exc).__name__}: {exc}"
    return None


def stage_with_a_broken_merge(model: nn.Module, source: PolicyWeights) -> None:
    """On rank 0 one DoRA layer cannot be merged."""
    layers = [module for module in model.modules() if getattr(module, "lora_variant", None)]
    if not layers or dist.get_rank() != 0:
        stage(source)
        return
    scaling = layers[1].scaling
    layers[1].scaling = {}
    try:
        stage(source)
    finally:
        layers[1].scaling = scaling


def stop_early(source: PolicyWeights) -> None:
    """Rank 0 leaves after three tensors."""
    tensors = source.tensors(source.manifest())
    for number, _ in enumerate(tensors):
        if number == 2 and dist.get_rank() == 0:
            break
    tensors.close()


def same_pieces(first: dict[str, tuple[int, torch.Tensor]], second: dict[str, tuple[int, torch.Tensor]]) -> bool:
    return first.keys() == second.keys() and all(
        first[name][0] == second[name][0] and torch.equal(first[name][1], second[name][1]) for name in first
    )


def take(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """The adapter, of the policy that can be published as one."""
    try:
        check_adapter(model)
    except PreflightError:
        return None
    return take_adapter(model, DTYPE).tensors


def same_adapter(first: dict[str, torch.Tensor] | None, second: dict[str, torch.Tensor] | None) -> bool | None:
    if first is None or second is None:
        return None
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def run_case(name: str, parallelism: str) -> dict[str, Any]:
    policy = POLICIES[name]()
    whole_manifest = PolicyWeights(policy, DTYPE).manifest()
    whole = stage(PolicyWeights(policy, DTYPE))
    whole_adapter = take(policy)
    largest = largest_module_bytes(policy)
    undisturbed = Sharded(policy, parallelism)
    num_whole = sum(parameter.numel() for parameter in POLICIES[name]().parameters())
    assert_sharded(undisturbed.model)
    num_held = sum(piece.numel() for piece in pieces(undisturbed.model).values())
    undisturbed_losses = [undisturbed.step() for _ in range(3)]

    sharded = Sharded(POLICIES[name](), parallelism)
    source = PolicyWeights(sharded.model, DTYPE)
    before = sharded.held()
    published = stage(source)
    adapter = take(sharded.model)
    peak_gathered, peak = peak_bytes(sharded.model)
    errors = {
        "consumer": error_of(lambda: stage(StoppingSource(source))),
        "merge": error_of(lambda: stage_with_a_broken_merge(sharded.model, source)),
    }
    stop_early(source)
    assert_sharded(sharded.model)
    after = sharded.held()
    losses = []
    for _ in range(3):
        losses.append(sharded.step())
        # Between steps, too, as training publishes.
        stage(source)
    return {
        "is_collective": source.is_collective,
        "same_manifest": source.manifest() == whole_manifest,
        "bytes_are_equal": torch.equal(published, whole),
        "adapter_is_equal": same_adapter(adapter, whole_adapter),
        "pieces_are_the_same": same_pieces(before, after),
        "held_fraction": num_held / num_whole,
        "peak_gathered_bytes": peak_gathered,
        "peak_bytes": peak,
        "largest_module_bytes": largest,
        "errors": errors,
        "losses": losses,
        "undisturbed_losses": undisturbed_losses,
        "bytes_moved_by_training": not torch.equal(stage(source), whole),
        "bytes_after_training_are_equal": torch.equal(stage(source), stage(PolicyWeights(undisturbed.model, DTYPE))),
        "gather_s": source.gather_s,
    }


def main(output: Path, parallelism: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    if parallelism == "zero3":
        import deepspeed

        # Reduce with gloo: DeepSpeed's own operation would be compiled on the spot.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", timeout=COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
    results = {name: run_case(name, parallelism) for name in names}
    torch.save(results, output / f"rank{os.environ['RANK']}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
