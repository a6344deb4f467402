"""What `architectures` runs for each: `python -m gpu_sections.architecture NAME DIRECTORY DEVICE`.

A model with random weights trains in float32 on recorded groups, in the layout that is chosen for it; and from the same
weights with every rollout alone.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from .bench import Bench
from .training import make_trainer, what_it_did


COMMON = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
MIXED = {"sliding_window": 256, "layer_types": ["sliding_attention", "full_attention"]}

ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {}),
    "mistral, window": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 256}),
    "gemma2, softcap": ("Gemma2ForCausalLM", "Gemma2Config", MIXED),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", MIXED),
    "gpt_oss, sinks": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**MIXED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "llama4, chunks": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            "attention_chunk_size": 256,
            "floor_scale": 200,
            "attn_scale": 0.5,
            "num_local_experts": 4,
            "intermediate_size_mlp": 512,
            "no_rope_layers": [1, 0],
        },
    ),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", MIXED),
    "qwen3_next, gated delta": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "layer_types": ["linear_attention", "full_attention"],
            "decoder_sparse_step": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 128,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    ),
    "deepseek_v3, latent heads": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "head_dim": 32,
            "q_lora_rank": 64,
            "kv_lora_rank": 64,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 32,
            "v_head_dim": 64,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 128,
            "first_k_dense_replace": 1,
        },
    ),
    "falcon_h1, recurrent": (
        "FalconH1ForCausalLM",
        "FalconH1Config",
        {"mamba_d_ssm": 256, "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 64},
    ),
    "lfm2, convolutions": (
        "Lfm2ForCausalLM",
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention"]},
    ),
}
"""Model class, configuration class, and what differs from `COMMON`."""

TINY_ARCHITECTURES = ("gemma3",)

NUM_TOKENS = 1500
"""Of the longest rollout: a row with a group is long enough for blocks."""


def main(name: str, directory: Path, device: torch.device) -> None:
    bench = Bench("architectures", device, is_tiny=device.type == "cpu")
    model_class, config_class, changes = ARCHITECTURES[name]
    torch.manual_seed(0)
    with device:
        config = getattr(transformers, config_class)(**{**COMMON, **changes})
        model = getattr(transformers, model_class)(config)
    alone = copy.deepcopy(model)
    chosen = train(bench, directory / "chosen", model)
    reference = train(
        bench,
        directory / "alone",
        alone,
        sequence_layout="padded",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
    )
    print(json.dumps({**chosen, "grad_norm_alone": reference["grad_norm"], "loss_alone": reference["loss"]}))


def train(bench: Bench, directory: Path, model: nn.Module, **options: Any) -> dict[str, Any]:
    directory.mkdir(parents=True)
    num_tokens = 120 if bench.is_tiny else NUM_TOKENS
    trainer = make_trainer(
        bench,
        directory / "groups.jsonl",
        str(directory),
        model=model,
        num_tokens=num_tokens,
        **{"bf16": False, "max_length": 2048, **options},
    )
    trainer.train()
    return what_it_did(trainer)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), torch.device(sys.argv[3]))
