"""Small models with random weights, shared by all tests."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)


def tiny_llama(*, seed: int = 0, **config: object) -> LlamaForCausalLM:
    """A float32 Llama with four query and two key-value heads. `config`: see `_sizes`, or more of `LlamaConfig`."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**_sizes(**config)))


def tiny_qwen3(*, seed: int = 0, tied: bool = True, **config: object) -> Qwen3ForCausalLM:
    """A float32 Qwen3, which normalises queries and keys, with four query and two key-value heads."""
    torch.manual_seed(seed)
    sizes = _sizes(tied=tied, **config)
    return Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=sizes["hidden_size"] // 4))


def _sizes(
    *,
    tied: bool = False,
    vocab_size: int = 64,
    hidden_size: int = 32,
    num_layers: int = 2,
    initializer_range: float = 0.02,
    **config: object,
) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": tied,
        "initializer_range": initializer_range,
        **config,
    }


def tiny_gpt2(*, seed: int = 0) -> GPT2LMHeadModel:
    """A float32 GPT-2: transposed weights (`Conv1D`) and a tied head."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32))


def tiny_mixtral(*, seed: int = 0) -> MixtralForCausalLM:
    """A float32 Mixtral with four experts per layer, which transformers fuses and a checkpoint does not."""
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    return MixtralForCausalLM(config)


def perturb(model: PreTrainedModel, *, seed: int, scale: float) -> None:
    """Move every trained parameter by Gaussian noise, as an optimizer step would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for every byte, 0 to 255, and `<eos>`, 256, which also pads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)} | {"<eos>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
