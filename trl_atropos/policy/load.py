"""Makes the policy that is trained: load, adapt, switch dropout off, copy the reference."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, ProcessorMixin
from transformers.integrations import deepspeed_config, is_deepspeed_zero3_enabled
from transformers.utils.peft_utils import find_adapter_config_file

from ..errors import PreflightError
from .options import PolicyOptions
from .rotary import pin_rotary_frequencies


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


logger = logging.getLogger(__name__)

LEARNED_POSITIONS = ("wpe", "embed_positions", "position_embeddings")
"""What models call the embedding of their positions, if they have one."""

REFERENCE_ADAPTER = "ref"
"""Name of the adapter that gives the reference where the policy without an adapter does not; TRL's name."""


@dataclass(frozen=True)
class PreparedPolicy:
    """What a trainer starts from.

    `model` is the policy with its adapter, `processing_class` its tokenizer, None if it has none, and
    `reference_model` a frozen copy of the starting policy, None if the KL term needs none.
    """

    model: nn.Module
    processing_class: Any
    reference_model: PreTrainedModel | None


def prepare_policy(
    model: str | PreTrainedModel | nn.Module,
    options: PolicyOptions,
    processing_class: Any,
    peft_config: PeftConfig | None,
    *,
    needs_reference: bool,
    sequence_parallel_size: int,
    max_length: int,
) -> PreparedPolicy:
    """Load what is given by name, add the adapter, switch dropout off, fix rotary frequencies, and copy the reference.

    The reference is the policy that training starts from. With a fresh adapter that is the policy without it; with one
    that was trained, or whose initialisation changes the base, the adapter is copied ([`add_reference_adapter`]).
    `max_length` is the longest rollout in tokens.

    Raises:
        ValueError: nothing of the policy can be trained; it has fewer positions than `max_length`; it asks for the
            auxiliary loss of routers; or a copy of a whole model is needed, and
            `sequence_parallel_size` (ranks that share a sequence) is above 1.
    """
    policy = load_model(model, options)
    if processing_class is None and getattr(policy.config, "_name_or_path", None):
        processing_class = AutoTokenizer.from_pretrained(
            policy.config._name_or_path, trust_remote_code=options.trust_remote_code
        )
    if peft_config is not None:
        policy = add_adapter(policy, peft_config)
    check_trainable(policy)
    check_positions(policy, max_length)
    check_router_loss(policy)
    if needs_reference and hasattr(policy, "peft_config"):
        add_reference_adapter(policy)
    if options.disable_dropout:
        disable_dropout(policy)
    pinned = pin_rotary_frequencies(policy, max_length)
    if pinned:
        logger.info(
            f"Rotary frequencies ({', '.join(sorted(pinned))}) are the same for every rollout up to max_length ({max_length}), as in "
            "vLLM; transformers would take them from the longest row of a forward pass."
        )
    # Before the optimizer's first step: the copy must be of the starting policy.
    needs_copy = needs_reference and not hasattr(policy, "peft_config")
    if needs_copy and sequence_parallel_size > 1:
        raise ValueError(
            f"beta is not 0, and {sequence_parallel_size} ranks share each sequence. TRL prepares the copy of the policy for "
            "data-parallel ranks only. Train an adapter (--use_peft), set --ref_logprobs require, or --beta 0."
        )
    reference = make_reference_model(model, options) if needs_copy else None
    if reference is not None:
        pin_rotary_frequencies(reference, max_length)
    return PreparedPolicy(policy, processing_class, reference)


def load_model(model: str | PreTrainedModel | nn.Module, options: PolicyOptions) -> PreTrainedModel:
    """Return the policy: the instance itself, or the checkpoint loaded in float32 unless the options say otherwise.

    The directory or Hub id of an adapter gives its base model with the adapter, which is trained on.
    """
    init_kwargs = options.model_init_kwargs or {}
    assert isinstance(init_kwargs, dict), "TrainingArguments parses the options that are dictionaries"
    if not isinstance(model, str):
        if init_kwargs:
            raise ValueError(
                f"model_init_kwargs {init_kwargs} was given together with a model instance. They only act "
                "when the trainer loads the model. Leave them out, or pass the model as a string."
            )
        return model
    kwargs = {"trust_remote_code": options.trust_remote_code, **init_kwargs}
    # A step at lr 1e-6 is below the resolution of bf16 weights: updates would be rounded away.
    kwargs.setdefault("dtype", torch.float32)
    if find_adapter_config_file(model, revision=kwargs.get("revision")) is not None:
        from peft import AutoPeftModelForCausalLM

        # What transformers would load is frozen.
        return AutoPeftModelForCausalLM.from_pretrained(model, is_trainable=True, **kwargs)
    return AutoModelForCausalLM.from_pretrained(model, **kwargs)


def add_adapter(model: PreTrainedModel, peft_config: PeftConfig) -> nn.Module:
    """Wrap the policy with a fresh adapter."""
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ValueError(
            "A PeftModel was given together with a peft_config. It already has an adapter, and training a second one on "
            "top is not what is usually meant. Pass the base model, or leave peft_config out."
        )
    adapted: nn.Module = get_peft_model(model, peft_config)
    return adapted


def check_trainable(policy: nn.Module) -> None:
    """Refuse a policy of which nothing is trained, and warn about weights too coarse for small steps.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if not trained:
        hint = "Load the adapter with `is_trainable=True`" if hasattr(policy, "peft_config") else "Set requires_grad"
        raise ValueError(
            f"No parameter of the policy ({type(policy).__name__}) requires a gradient. Every step would leave it as it is. "
            f"{hint}, or pass the model by its path, which loads it trainable."
        )
    if deepspeed_config() is not None:
        # It keeps weights in float32 of its own.
        return
    coarse = {parameter.dtype for parameter in trained if parameter.dtype in (torch.bfloat16, torch.float16)}
    if coarse:
        logger.warning(
            f"Weights in {', '.join(sorted(map(str, coarse)))} are trained. A step at a learning rate of 1e-6 is below their "
            "resolution, so most updates are rounded away. Load the model in float32 (the default where it is given by its "
            "path, or --dtype float32); --bf16 then computes in bfloat16 all the same."
        )


def check_positions(policy: Any, max_length: int) -> None:
    """Refuse rollouts, of up to `max_length` tokens, that a model with learned positions has no positions for.

    Raises:
        ValueError: names both lengths.
    """
    num_positions = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    is_learned = any(
        isinstance(module, nn.Embedding) and name.rpartition(".")[2] in LEARNED_POSITIONS
        for name, module in policy.named_modules()
    )
    if is_learned and num_positions is not None and max_length > num_positions:
        raise ValueError(
            f"max_length is {max_length}, and the policy has learned {num_positions} positions. A longer rollout would end the run in "
            f"the middle. Set --max_length {num_positions}, and let the environments sample no longer ones."
        )


def check_router_loss(policy: Any) -> None:
    """Refuse a policy whose config asks for the auxiliary loss of its routers, and say that one with experts has none here.

    Raises:
        ValueError: `output_router_logits` is on.
    """
    config = policy.config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            f"The config of the policy has output_router_logits, with which transformers adds {coefficient} times an auxiliary loss "
            "that balances experts. It depends on how a step is split into micro-batches, and is not part of the loss here. Set "
            "output_router_logits to False (--model_init_kwargs '{\"output_router_logits\": false}')."
        )
    if coefficient and hasattr(config, "output_router_logits"):
        logger.warning(
            f"The policy has experts, and router_aux_loss_coef is {coefficient}: the auxiliary loss that balances them in pretraining is "
            "not part of the loss here."
        )


def add_reference_adapter(model: PeftModel) -> None:
    """Give a policy a frozen copy of its adapter, `REFERENCE_ADAPTER`, unless the policy without it is where it starts.

    Raises:
        ValueError: several adapters are active, which no single one stands for.
    """
    if REFERENCE_ADAPTER in model.peft_config or _starts_without_effect(model):
        return
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    if len(model.active_adapters) != 1:
        raise ValueError(
            f"beta is not 0, and the adapters {model.active_adapters} are active. The reference needs a copy of where the "
            "policy starts, which is made of one adapter. Merge all but one into the base, or set --beta 0."
        )
    (adapter,) = model.active_adapters
    config = copy.deepcopy(model.peft_config[adapter])
    config.inference_mode = True
    if hasattr(config, "init_lora_weights"):
        # Some initialisations take out of the base what they put into the adapter: that must not happen again.
        config.init_lora_weights = False
    weights = get_peft_model_state_dict(model, adapter_name=adapter)
    before = set(model.parameters())
    with keeping_what_is_trained(model):
        model.add_adapter(REFERENCE_ADAPTER, config)
        set_peft_model_state_dict(model, weights, adapter_name=REFERENCE_ADAPTER)
        model.set_adapter(adapter)
    for parameter in set(model.parameters()) - before:
        parameter.requires_grad_(False)


@contextmanager
def keeping_what_is_trained(model: nn.Module) -> Iterator[None]:
    """Afterwards, the parameters that a model has now require a gradient as they do now.

    To activate an adapter, PEFT has all of it require one, also what was frozen by hand, and nothing of the others.
    """
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, is_trained in trained:
            parameter.requires_grad_(is_trained)


def _starts_without_effect(model: PeftModel) -> bool:
    """Whether a policy computes the same with its adapter as without: fresh LoRA, of which one factor is 0."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return False
        if isinstance(module, BaseTunerLayer):
            if not isinstance(module, LoraLayer):
                return False
            # Of a linear layer the second factor is 0 at first, of an embedding the first one.
            factors = [*module.lora_B.parameters(), *module.lora_embedding_A.parameters()]
            if any(bool(factor.any()) for factor in factors):
                return False
    return not any(config.is_prompt_learning for config in model.peft_config.values())


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def make_reference_model(model: str | PreTrainedModel | nn.Module, options: PolicyOptions) -> PreTrainedModel:
    """Make the frozen copy of a model that has no adapter. A path is loaded again, which is the only way under ZeRO-3.

    Raises:
        ValueError: an instance, under ZeRO-3: there is no whole model in this process to copy.
    """
    if isinstance(model, str):
        reference = load_model(model, options)
    elif is_deepspeed_zero3_enabled():
        raise ValueError(
            "beta is not 0, the model was given as an instance, and ZeRO-3 keeps only a piece of it in this process. It "
            "cannot be copied for the reference. Pass the model as a path, or set --ref_logprobs require."
        )
    else:
        reference = copy.deepcopy(model)
    disable_dropout(reference)
    reference.requires_grad_(False)
    reference.eval()
    return reference


def use_sparse_embedding_gradient(model: PreTrainedModel) -> bool:
    """Let a tied embedding give its gradient as the few rows that occur, not as a second matrix of the head's size.

    The sum with the head's gradient is dense again, so the optimizer sees no difference; what goes away is a matrix of
    zeros of that size, filled, added and dropped in each backward pass. Only for one process: DDP would expect a
    sparse sum.

    Returns whether it applies, which is when the weight is tied and trained.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    applies = (
        isinstance(embedding, nn.Embedding)
        and isinstance(head, nn.Linear)
        and embedding.weight is head.weight
        and embedding.weight.requires_grad
    )
    if applies:
        embedding.sparse = True
    return applies


def tokenizer_of(processing_class: Any) -> Any:
    """Return the tokenizer of a processor, or the tokenizer itself; None of None."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def vocab_size_of(model: nn.Module) -> int:
    """The number of rows of the model's embedding."""
    config: Any = model.config
    vocab_size: int = config.get_text_config().vocab_size
    return vocab_size


def eos_token_ids(model: nn.Module, processing_class: Any, *, is_required: bool) -> frozenset[int] | None:
    """Tokens that end a completion: those of the tokenizer and of the generation config; None if there are none.

    Raises:
        PreflightError: there are none, and `is_required`.
    """
    of_generation = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [getattr(processing_class, "eos_token_id", None)]
    ids += of_generation if isinstance(of_generation, list) else [of_generation]
    found = frozenset(token_id for token_id in ids if token_id is not None)
    if not found and is_required:
        raise PreflightError(
            "mask_truncated_completions is on, and neither tokenizer nor generation config has an eos_token_id.",
            "Every rollout would count as truncated, and none would be trained.",
            "Pass a processing_class with an eos_token, or set --mask_truncated_completions false.",
        )
    return found or None


def padding_id(processing_class: Any, vocab_size: int) -> int:
    """An id with which rows are padded, from 0 to `vocab_size` - 1: the tokenizer's, or 0.

    Nothing attends to padding, so that any id will do that the embedding has; that of a tokenizer with more tokens than
    the model has rows may not be one.
    """
    pad_token_id = getattr(processing_class, "pad_token_id", None)
    return pad_token_id if pad_token_id is not None and 0 <= pad_token_id < vocab_size else 0
