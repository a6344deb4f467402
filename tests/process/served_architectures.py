"""Serves one tiny model after the other with vLLM in this process, publishes to it, and prints a line of JSON for each.

Usage: python served_architectures.py [--swapped] DIRECTORY NAME...

A line has `name`, and either `error`, or the logprobs of the server at the `start` and after `again` (the same weights),
`other` (weights of another seed) and `back` (those of the start), and the trainer's own for both, `start_trainer` and
`other_trainer`: lists by sequence. `why_not_beside` says why its policies are not loaded beside the served one; where it is
empty, those of `other` and `back` were, and `meanwhile` are the logprobs of the server between the loading and the finish of
`other`. `num_known` is of how many modules vLLM knows something, after `again` and after `back`. Then `part` is published, the
attention and the like of the first layer as in `other`, in the place of those of `start`, and so is `part_again`, beside
them where that is possible; and `healed` are the logprobs after such a part was loaded in place, and `other` in the same
update, to be loaded beside a policy that is not whole any more. With `--swapped` the server starts with the weights that are
`other` without it.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import transformers
import vllm.v1.engine.core
from tiny_models import byte_tokenizer
from transformers import PreTrainedModel
from vllm import LLM, SamplingParams
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.inputs import TokensPrompt
from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO
from vllm.model_executor.models import registry
from vllm.platforms import current_platform

from trl_atropos.policy.rotary import pin_rotary_frequencies
from trl_atropos.weight_sync.transports.layerwise_engine import LayerwiseEngine, LayerwiseUpdateInfo
from trl_atropos.weight_sync.transports.reports import WorkerReport
from trl_atropos.weight_sync.weights.source import PolicyWeights


MAX_LENGTH = 256
MEMORY: dict[str, Any] = (
    {} if current_platform.is_cpu() else {"kv_cache_memory_bytes": 2**30, "gpu_memory_utilization": 0.1}
)
"""Of a server on a GPU, which would take what is free; on a CPU a variable of vLLM says it."""
SEQUENCES = [[7, 11, 13, 17, 19, 23, 29, 31, 37, 41], [250, 3, 250, 3, 99, 98, 97, 96], [5] * 6]
SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1, "bos_token_id": None,
    "eos_token_id": 256, "pad_token_id": 256,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64}
MAMBA: dict[str, Any] = {"mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 16}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16,
    "original_max_position_embeddings": 64,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "Gemma3": {"config": "Gemma3TextConfig", "head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32},
    "Mistral": {"head_dim": 32, "sliding_window": 8},
    "Phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
    "Qwen3Moe": {**EXPERTS, "head_dim": 32, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "Mixtral": {**LOCAL_EXPERTS, "sliding_window": None},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "num_key_value_heads": 4},
    "GptOss": {**LOCAL_EXPERTS, "head_dim": 32, "sliding_window": 8},
    "DeepseekV2": {
        "num_key_value_heads": 4, "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32,
        "v_head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1,
        "moe_intermediate_size": 64, "first_k_dense_replace": 1, "topk_method": "greedy", "topk_group": 1,
    },
    "Qwen3Next": {
        **EXPERTS, "head_dim": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "layer_types": ["linear_attention", "full_attention"], "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 64, "norm_topk_prob": True,
    },
    "Lfm2": {
        "layer_types": ["conv", "conv"], "conv_L_cache": 3, "conv_dim": 128, "block_dim": 128, "block_auto_adjust_ff_dim": False,
        "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 1,
    },
    "FalconH1": {**MAMBA, "head_dim": 32, "mamba_d_ssm": 128, "mamba_n_heads": 4},
    "GraniteMoeHybrid": {
        **MAMBA, **LOCAL_EXPERTS, "mamba_n_heads": 8, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 64,
    },
}  # fmt: skip
"""What distinguishes a tiny model of each family; `config` names its class if the name of the family does not."""

MIXER = re.compile(r".*layers\.0\.(self_attn|linear_attn|conv|mamba)\.")
"""The part of a layer beside its experts."""

PRELOADED = (
    vllm.v1.engine.core,
    importlib.import_module(f"vllm.v1.worker.{'cpu' if current_platform.is_cpu() else 'gpu'}_worker"),
)
"""What every server imports, here once for all of them."""

_SENT: dict[str, torch.Tensor] = {}
"""What the engine of this process is sent."""

_REPORTS: queue.SimpleQueue[WorkerReport] = queue.SimpleQueue()
"""What it answers."""


@dataclass
class NoInitInfo(WeightTransferInitInfo):
    """There is nothing to connect to."""


class MemoryEngine(LayerwiseEngine[NoInitInfo, LayerwiseUpdateInfo]):
    """Takes what lies in `_SENT`."""

    init_info_cls = NoInitInfo
    update_info_cls = LayerwiseUpdateInfo

    def connect(self, init_info: NoInitInfo) -> None:
        """Do nothing."""

    def receive(self, update_info: LayerwiseUpdateInfo) -> WorkerReport:
        """Load all."""
        self.load(update_info, iter(_SENT.items()))
        return WorkerReport(update_info.sequence, len(_SENT), 0, 0)

    def report(self, report: WorkerReport) -> None:
        """Put it where `publish` waits for it."""
        _REPORTS.put(report)

    def shutdown(self) -> None:
        """Do nothing."""


def make(name: str, seed: int) -> PreTrainedModel:
    """A model with large random weights in bfloat16; one-dimensional ones are not 0 or 1, where an error would not show."""
    options = dict(FAMILIES[name])
    config_class = getattr(transformers, options.pop("config", f"{name}Config"))
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config_class(**{**SIZES, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(torch.bfloat16)


def trainer_logprobs(model: PreTrainedModel) -> list[list[float]]:
    """What a trainer scores that holds these weights in float32."""
    model = model.float().eval()
    pin_rotary_frequencies(model, MAX_LENGTH)
    rows = []
    for sequence in SEQUENCES:
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0].log_softmax(-1)
        rows.append([float(logprobs[i - 1, token]) for i, token in enumerate(sequence) if i > 0])
    return rows


def server_logprobs(server: LLM) -> list[list[float]]:
    """What the server answers."""
    prompts = [TokensPrompt(prompt_token_ids=sequence) for sequence in SEQUENCES]
    outputs = server.generate(
        prompts, SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0.0), use_tqdm=False
    )
    return [
        [output.prompt_logprobs[i][token].logprob for i, token in enumerate(sequence) if i > 0]
        for output, sequence in zip(outputs, SEQUENCES, strict=True)
    ]


def publish(server: LLM, model: PreTrainedModel, *, is_beside: bool, part: str = "") -> list[list[float]]:
    """Send what a trainer sends, or those of it whose names begin with `part`, and return what the server answers meanwhile,
    if it does.
    """
    server.start_weight_update()
    load(server, model, is_beside=is_beside, part=part, is_complete=not part)
    meanwhile = server_logprobs(server) if is_beside else []
    server.finish_weight_update()
    return meanwhile


def load(server: LLM, model: PreTrainedModel, *, is_beside: bool, part: str = "", is_complete: bool = True) -> None:
    """Send it into the update that was started."""
    source = PolicyWeights(model, torch.bfloat16)
    specs = [spec for spec in source.manifest() if spec.name.startswith(part)]
    _SENT.clear()
    _SENT.update((name, tensor.clone()) for name, tensor in source.tensors(specs))
    server.update_weights(
        {
            "update_info": {
                "sequence": 1,
                "is_complete": is_complete,
                "is_beside": is_beside,
                "names": [spec.name for spec in specs],
                "dtype_names": [str(spec.dtype).removeprefix("torch.") for spec in specs],
                "shapes": [list(spec.shape) for spec in specs],
                "offsets": [0] * len(specs),
            }
        }
    )
    report = _REPORTS.get(timeout=60)
    if report.error:
        raise RuntimeError(report.error)


def publish_parts(
    server: LLM, start: PreTrainedModel, other: PreTrainedModel, *, is_beside: bool
) -> dict[str, list[list[float]]]:
    """Return the logprobs after a part of `other` is published over `start`, in its place and beside it, and after an update
    in which the whole of `other` follows a part.
    """
    part = next(found[0] for name, _ in start.named_parameters() if (found := MIXER.match(name)))
    logprobs = {}
    for moment, is_part_beside in (("part", False), ("part_again", is_beside)):
        publish(server, start, is_beside=False)
        publish(server, other, is_beside=is_part_beside, part=part)
        logprobs[moment] = server_logprobs(server)
    server.start_weight_update()
    load(server, start, is_beside=False, part=part)
    load(server, other, is_beside=is_beside)
    server.finish_weight_update()
    logprobs["healed"] = server_logprobs(server)
    return logprobs


def serve(directory: Path, name: str, seeds: tuple[int, int]) -> dict[str, Any]:
    """Start a server with the weights of the first seed, publish the same, those of the second, and the first again."""
    start, other = (make(name, seed) for seed in seeds)
    start.save_pretrained(directory / name)
    byte_tokenizer().save_pretrained(directory / name)
    server = LLM(
        model=str(directory / name), enforce_eager=True, max_model_len=MAX_LENGTH, dtype="bfloat16",
        distributed_executor_backend="uni", weight_transfer_config={"backend": "memory"}, enable_prefix_caching=False,
        **MEMORY,
    )  # fmt: skip
    logprobs = {"start": server_logprobs(server)}
    server.init_weight_transfer_engine({"init_info": {}})
    (why,) = server.collective_rpc(lambda worker: worker.weight_transfer_engine.why_not_beside())
    num_known = []
    for moment, model in (("again", start), ("other", other), ("back", start)):
        meanwhile = publish(server, model, is_beside=not why and moment != "again")
        logprobs[moment] = server_logprobs(server)
        if moment == "other":
            logprobs["meanwhile"] = meanwhile
        else:
            num_known.append(len(LAYERWISE_INFO))
    return {
        **logprobs,
        **publish_parts(server, start, other, is_beside=not why),
        "why_not_beside": why,
        "num_known": num_known,
        "start_trainer": trainer_logprobs(start),
        "other_trainer": trainer_logprobs(other),
    }


def in_a_child(run: Callable[[], dict[str, Any]]) -> None:
    """Run in a fork, which has imported everything and ends with all that a server leaves behind."""
    child = os.fork()
    if child == 0:
        in_this_process(run)
        os._exit(0)
    os.waitpid(child, 0)


def in_this_process(run: Callable[[], dict[str, Any]]) -> None:
    """Run, and print the line of what was run or of its error."""
    try:
        line = run()
    except Exception as exc:
        traceback.print_exc()
        line = {"error": str(exc)}
    os.write(RESULTS, (json.dumps(line) + "\n").encode())


if __name__ == "__main__":
    # vLLM prints to standard output.
    RESULTS = os.dup(1)
    os.dup2(2, 1)
    # vLLM compiles its sampler otherwise, which takes longer than everything else.
    torch._dynamo.config.disable = True
    WeightTransferEngineFactory.register_engine("memory", MemoryEngine)
    # Otherwise each family is imported once more, to see what it can.
    registry._run_in_subprocess = lambda inspect: inspect()
    # CUDA does not work in a fork: there each family has its own process.
    run_one = in_a_child if current_platform.is_cpu() else in_this_process
    arguments = [argument for argument in sys.argv[1:] if argument != "--swapped"]
    seeds = (1, 2) if arguments == sys.argv[1:] else (2, 1)
    for family in arguments[1:]:
        run_one(lambda family=family: {"name": family, **serve(Path(arguments[0]), family, seeds)})
