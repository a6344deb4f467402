"""Options of `AtroposConfig` that say how the policy is loaded and how its forward passes are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..options import PositiveFloat, check_declared
from .layouts import LAYOUTS
from .recompute import GRANULARITIES


SEQUENCE_LAYOUTS = ("auto", *LAYOUTS)


@dataclass
class PolicyOptions:
    """The part of [`AtroposConfig`] that concerns the model."""

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `AutoModelForCausalLM.from_pretrained`, used when the `model` argument of "
            "the trainer is a string."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow models and tokenizers that ship custom Python code."}
    )
    disable_dropout: bool = field(
        default=True,
        metadata={
            "help": "Set every dropout probability to 0. With dropout the importance ratio of a fresh rollout is not 1."
        },
    )
    temperature: PositiveFloat = field(
        default=1.0,
        metadata={
            "help": "Sampling temperature of rollouts for which the wire names none. Applied to the trainer's logits "
            "if the server reports processed logprobs."
        },
    )
    sequence_layout: str = field(
        default="auto",
        metadata={
            "help": "`tree`: prefixes that rollouts of a group share are computed once. `packed`: no padding. `padded`: one "
            "row per rollout. `auto`: the first of these that gives the logprobs of each rollout run alone on this model, "
            "tried at start.",
            "choices": list(SEQUENCE_LAYOUTS),
        },
    )
    activation_offloading: bool = field(
        default=False, metadata={"help": "Keep activations in host memory until the backward pass. Needs a GPU."}
    )
    recompute_granularity: str = field(
        default="full",
        metadata={
            "help": "What `gradient_checkpointing` recomputes. `full`: the layers. `selective`: of what the backward pass needs, that "
            "which elementwise operations make of tensors that are kept anyway; no product of matrices and no attention.",
            "choices": list(GRANULARITIES),
        },
    )
    cast_lm_head_to_fp32: bool = field(
        default=False,
        metadata={
            "help": "Compute logits in float32 also in mixed precision (MiniMax-M1): the head runs outside of autocast. The "
            "server's are in its own dtype all the same."
        },
    )

    def __post_init__(self) -> None:
        check_declared(self, PolicyOptions)
