"""Rotary frequencies of a run, fixed where transformers takes them from the longest row of a forward pass.

With `longrope` (Phi-3 and others, https://huggingface.co/papers/2402.13753) transformers computes with other frequencies as soon
as one row is longer than the lengths of pretraining, and with `dynamic` with others for each such length: what a rollout scores
would depend on its neighbours. vLLM decides once for all sequences, and so does this module, as vLLM does.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


PINNED = "pinned"
"""Takes the place of the type of a rotary embedding whose frequencies are fixed; transformers changes those of no other type than
the two above."""


def longrope_boundary(config: Any) -> int | None:
    """Return the number of tokens up to which a `longrope` model has its short frequencies; None for any other model."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    of_layers = parameters.values() if all(isinstance(value, dict) for value in parameters.values()) else [parameters]
    boundaries = [
        values["original_max_position_embeddings"] for values in of_layers if values.get("rope_type") == "longrope"
    ]
    return min(boundaries, default=None)


def pin_rotary_frequencies(model: nn.Module, max_length: int) -> set[str]:
    """Fix the frequencies of every rotary embedding that would take them from the longest row, and return their types.

    `max_length` is the longest rollout in tokens. Those of `longrope` become the long ones if it is above the lengths of
    pretraining; those of `dynamic` stay what they are for the model's `max_position_embeddings`.
    """
    return {kind for module in model.modules() for kind in _pin(module, max_length)}


def _pin(module: Any, max_length: int) -> list[str]:
    """Pin one module, if it is a rotary embedding of transformers with such frequencies; returns their types."""
    types = getattr(module, "rope_type", None)
    if isinstance(types, str):
        if not _depends_on_length(types):
            return []
        _pin_layers_of_type(module, types, None, max_length)
        module.rope_type = PINNED
        return [types]
    if not isinstance(types, dict):
        return []
    found = {layer_type: kind for layer_type, kind in types.items() if _depends_on_length(kind)}
    for layer_type, kind in found.items():
        _pin_layers_of_type(module, kind, layer_type, max_length)
    module.rope_type = {**types, **dict.fromkeys(found, PINNED)}
    return list(found.values())


def _depends_on_length(rope_type: str) -> bool:
    return rope_type == "longrope" or "dynamic" in rope_type


def _pin_layers_of_type(module: Any, rope_type: str, layer_type: str | None, max_length: int) -> None:
    """Compute the frequencies; `layer_type` is None where all layers have the same."""
    name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
    of_layers = {} if layer_type is None else {"layer_type": layer_type}
    # For `dynamic`, no length stands for `max_position_embeddings`.
    length = max_length if rope_type == "longrope" else None
    frequencies, _ = ROPE_INIT_FUNCTIONS[rope_type](
        module.config, getattr(module, name).device, seq_len=length, **of_layers
    )
    module.register_buffer(name, frequencies, persistent=False)
