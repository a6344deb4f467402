"""The names and shapes that a checkpoint has where the model of transformers has others.

transformers renames and fuses while it loads: the experts of a Mixtral are one parameter of the model and many tensors of
the checkpoint. A server loads checkpoints, so what is published goes the way back that `save_pretrained` goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ...errors import PreflightError


class CheckpointNames:
    """What becomes of the tensors of each module in a checkpoint.

    `model` is the base model. `tensors` holds, for each module by name, its tensors by full name, on the meta device.

    Raises:
        [`PreflightError`]: naming tensors that a checkpoint stores together with those of another module.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Mapping[str, torch.Tensor]]):
        self._model = model
        everything = {name: tensor for of_module in tensors.values() for name, tensor in of_module.items()}
        names = {id(tensor): name for name, tensor in everything.items()}
        whole = self._revert(everything)
        # A tensor that comes back as the same object was renamed at most.
        self._renamed = {names[id(tensor)]: name for name, tensor in whole.items() if id(tensor) in names}
        self._outputs: dict[str, dict[str, torch.Tensor]] = {module: {} for module in tensors}
        for module, of_module in tensors.items():
            for together in self.convertible(of_module):
                self._outputs[module].update(self.convert({name: of_module[name] for name in together}))
        one_by_one = {name: tensor.shape for outputs in self._outputs.values() for name, tensor in outputs.items()}
        differing = one_by_one.items() ^ {name: tensor.shape for name, tensor in whole.items()}.items()
        if differing:
            raise PreflightError(
                f"A checkpoint of {type(model).__name__} stores {sorted(name for name, _ in differing)[:3]} "
                "as a mixture of several modules.",
                "A policy is published module by module, so that no more than one of them has to be gathered.",
                "Train this model without a server of its own, or open an issue with its name.",
            )

    def of_module(self, module: str) -> Mapping[str, torch.Tensor]:
        """The tensors of a module as a checkpoint has them: names, shapes and dtypes, on the meta device."""
        return self._outputs[module]

    def convertible(self, names: Iterable[str]) -> list[list[str]]:
        """The tensors of one module, in the pieces that can be converted: each alone, unless transformers mixes them."""
        names = list(names)
        return [[name] for name in names] if all(name in self._renamed for name in names) else [names]

    def convert(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same tensors as a checkpoint has them. `tensors` is one of the pieces of `convertible`, by full name."""
        if all(name in self._renamed for name in tensors):
            return {self._renamed[name]: tensor for name, tensor in tensors.items()}
        return self._revert(tensors)

    def _revert(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not isinstance(self._model, PreTrainedModel):
            return dict(tensors)
        reverted: dict[str, torch.Tensor] = revert_weight_conversion(self._model, dict(tensors))
        return reverted
