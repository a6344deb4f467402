"""Trees through layers that carry a state from token to token: Mamba, gated delta nets, short convolutions.

Such a layer runs over the tokens of a row in their order, and a row with a tree is no path. Here it runs over each piece of a
path between two forks, from the state that the piece before has left: what rollouts share is computed once, and each
branch goes on from there, with gradients through the states. The layers of transformers do that themselves when they continue
from a cache; all that is added is a cache which autograd can follow.

Shape letters: L positions of a row, H hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.cache_utils import Cache, LinearAttentionLayer


CACHE_ARGUMENTS = ("cache_params", "past_key_values")
"""What the forward of a layer with a state calls the cache."""

MIN_INNER_TOKENS = 8
"""Shortest path between two forks that is run once, alone: the call costs more than to run fewer tokens in each branch. At least
2: a single token that goes on from a state is taken for one that is generated, for which kernels have no gradient."""

MIN_FILL = 0.5
"""Shortest piece that shares a padded batch with the longest of it, as a share of that."""


@dataclass(frozen=True)
class Piece:
    """Tokens of a path between two forks.

    `positions` (T,) int64 are those of the row, of which the first `num_copies` stand in another piece, too, whose output is
    taken. `parent` is the number of the piece that it goes on from, None at the beginning of a tree; `has_children` says
    whether others go on from it.
    """

    positions: Tensor
    num_copies: int
    parent: int | None
    has_children: bool


def tree_pieces(subtree_end: Tensor, position_ids: Tensor) -> list[Piece]:
    """Cut a row of trees without padding, `subtree_end` and `position_ids` (1, L) int64, into pieces; parents come first.

    A short piece that others go on from is not one of its own: each of them begins with its tokens.
    """
    pieces: list[Piece] = []
    # By number of the span: the piece that spans below go on from, and what they begin with.
    below: list[tuple[int | None, Tensor, int]] = []
    spans = _spans(subtree_end[0].cpu(), position_ids[0].cpu())
    parents = {parent for _, _, parent in spans}
    for number, (start, end, over) in enumerate(spans):
        parent, copies, num_copies = (None, torch.zeros(0, dtype=torch.int64), 0) if over is None else below[over]
        positions = torch.cat([copies, torch.arange(start, end)])
        has_children = number in parents
        if over is not None:
            # Whoever comes next takes the output from here.
            below[over] = (parent, copies, len(copies))
        if has_children and end - start < MIN_INNER_TOKENS:
            below.append((parent, positions, num_copies))
        else:
            below.append((len(pieces), torch.zeros(0, dtype=torch.int64), 0))
            pieces.append(Piece(positions, num_copies, parent, has_children))
    return pieces


def _spans(ends: Tensor, depths: Tensor) -> list[tuple[int, int, int | None]]:
    """Start, end, and number of the span above of every path between two forks, in their order. `ends` and `depths` (L,) are
    a row of `subtree_end` and of `position_ids`.
    """
    length = ends.numel()
    is_child = (depths[1:] == depths[:-1] + 1) & (ends[:-1] > torch.arange(1, length))
    jumps = [0, *((~is_child).nonzero()[:, 0] + 1).tolist()]
    token_above: dict[int, int] = {}
    for jump in jumps:
        depth = int(depths[jump])
        if depth:
            # Depth first, it is the last token before that is one step higher.
            token_above[jump] = int((depths[:jump] == depth - 1).nonzero()[-1])
    for token in list(token_above.values()):
        # Its first child follows it, and is a branch like the others.
        token_above.setdefault(token + 1, token)
    starts = sorted({*jumps, *token_above})
    stops = [*starts[1:], length]
    number_of_last = {stop - 1: number for number, stop in enumerate(stops)}
    above = [number_of_last[token_above[start]] if start in token_above else None for start in starts]
    return list(zip(starts, stops, above, strict=True))


class KeptStates(LinearAttentionLayer):  # type: ignore[misc]
    """The states of one layer as the layer made them, where transformers copies them into memory of its own."""

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Keep the end of what the convolution sees, and return all of it. See `LinearAttentionLayer.update_conv_state`."""
        if not self.has_previous_state[state_idx]:
            size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            self.conv_kernel_size[state_idx] = size
            missing = max(size - conv_states.shape[-1], 0)
            seen = nn.functional.pad(conv_states, (missing, 0)) if missing else conv_states
        else:
            seen = torch.cat([self.conv_states[state_idx], conv_states], dim=-1)
        self.has_previous_state[state_idx] = True
        self.conv_states[state_idx] = seen[..., -self.conv_kernel_size[state_idx] :]
        return seen

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Keep the state. See `LinearAttentionLayer.update_recurrent_state`."""
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states

    @classmethod
    def of_branches(cls, parents: Sequence[KeptStates]) -> KeptStates:
        """The states from which branches go on, one row for each: `parents` have one row each."""
        states = cls(number_of_states=parents[0].number_of_states)
        for name in ("conv_states", "recurrent_states"):
            for index in range(states.number_of_states):
                rows = [getattr(parent, name)[index] for parent in parents]
                if rows[0] is not None:
                    getattr(states, name)[index] = torch.cat(rows)
        states.has_previous_state = dict(parents[0].has_previous_state)
        states.conv_kernel_size = dict(parents[0].conv_kernel_size)
        return states


@dataclass(frozen=True)
class Batch:
    """Pieces that run together.

    `index` (B, T) int64 are their positions, padded on the right, where no token of a piece sees it. `outputs` says which
    outputs of each are taken, `parents` from which pieces they go on, none at the beginning of trees. `number` is that of the one piece
    that others go on from, None if none does.
    """

    index: Tensor
    outputs: tuple[slice, ...]
    parents: tuple[int, ...]
    number: int | None


@dataclass(frozen=True)
class Schedule:
    """How a row of trees is run, the same in every layer: `batches` one after the other, whose outputs are put in the order
    `order` (L,) int64.
    """

    batches: tuple[Batch, ...]
    order: Tensor


def make_schedule(pieces: Sequence[Piece], device: torch.device) -> Schedule:
    """Plan how pieces are run, with tensors on a device."""
    batches, positions = [], []
    for numbers in _batches(pieces):
        members = [pieces[number] for number in numbers]
        index = nn.utils.rnn.pad_sequence([piece.positions for piece in members], batch_first=True)
        if index.shape[1] == 1:
            index = index.expand(-1, 2)
        positions += [piece.positions[piece.num_copies :] for piece in members]
        outputs = tuple(slice(piece.num_copies, len(piece.positions)) for piece in members)
        parents = tuple(piece.parent for piece in members if piece.parent is not None)
        batches.append(Batch(index.to(device), outputs, parents, numbers[0] if members[0].has_children else None))
    return Schedule(tuple(batches), torch.cat(positions).argsort().to(device))


def _batches(pieces: Sequence[Piece]) -> Iterator[list[int]]:
    """Numbers of pieces that run together: one that others go on from alone, because padding would run into its state; then the
    others, those that begin a tree and those that do not, with others of like length.
    """

    def length(number: int) -> int:
        return len(pieces[number].positions)

    yield from ([number] for number, piece in enumerate(pieces) if piece.has_children)
    for begins in (True, False):
        leaves = [
            number
            for number, piece in enumerate(pieces)
            if not piece.has_children and (piece.parent is None) == begins
        ]
        leaves.sort(key=length, reverse=True)
        while leaves:
            least = MIN_FILL * length(leaves[0])
            batch = [number for number in leaves if length(number) >= least]
            yield batch
            leaves = leaves[len(batch) :]


class BranchingForward:
    """The forward of a layer with a state, in the place of its own, which it calls for each piece of a tree.

    `schedule` is that of the row that the model is given; None: it is given no tree.
    """

    def __init__(self, layer: nn.Module, cache_argument: str):
        self.own: Callable[..., Any] = layer.forward
        self.schedule: Schedule | None = None
        self._layer = layer
        self._cache_argument = cache_argument

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run over hidden states (1, L, H) as if each path of their tree were a row of its own."""
        if self.schedule is None:
            return self.own(hidden_states, *args, **kwargs)
        length = self.schedule.order.numel()
        if hidden_states.shape[:2] != (1, length):
            raise RuntimeError(f"The layer is given {tuple(hidden_states.shape)} for a tree of {length} tokens.")
        # A tree has no mask of padding, and no training has a cache.
        kwargs = {name: value for name, value in kwargs.items() if name not in (*CACHE_ARGUMENTS, "attention_mask")}
        row = hidden_states.squeeze(0)
        outputs: list[Tensor] = []
        states: dict[int, KeptStates] = {}
        for batch in self.schedule.batches:
            parents = [states[number] for number in batch.parents]
            cache = KeptStates.of_branches(parents) if parents else KeptStates()
            output = self._run(row[batch.index], cache, **kwargs)
            if batch.number is not None:
                states[batch.number] = cache
            outputs += [of_piece[taken] for of_piece, taken in zip(output, batch.outputs, strict=True)]
        return torch.cat(outputs)[self.schedule.order][None]

    def _run(self, hidden_states: Tensor, states: KeptStates, **kwargs: Any) -> Tensor:
        layer_idx: int = self._layer.layer_idx  # type: ignore[assignment]
        cache = Cache(layers=[states] * (layer_idx + 1))
        output: Tensor = self.own(hidden_states, **{self._cache_argument: cache}, **kwargs)
        return output


class StateBranches:
    """Gives the layers of a model that have a state trees to run over.

    What counts for them is the last call of `model`: gradient checkpointing runs layers again after it.
    """

    def __init__(self, model: nn.Module):
        self._layers = layers_with_states(model)
        self._forwards = [BranchingForward(layer, cache_argument) for layer, cache_argument in self._layers]
        for (layer, _), forward in zip(self._layers, self._forwards, strict=True):
            layer.forward = forward
        self._next: Schedule | None = None
        self._hook = model.register_forward_pre_hook(lambda model, args: self._begin())

    def take(self, subtree_end: Tensor, position_ids: Tensor) -> None:
        """Say what the next call of the model is given, as `tree_pieces` takes it; a call before which nothing is said is
        given no tree.
        """
        self._next = make_schedule(tree_pieces(subtree_end, position_ids), position_ids.device)

    def remove(self) -> None:
        """Leave the layers as they were."""
        self._hook.remove()
        for layer, _ in self._layers:
            del layer.forward

    def _begin(self) -> None:
        schedule, self._next = self._next, None
        for forward in self._forwards:
            forward.schedule = schedule


_BRANCHES: WeakKeyDictionary[nn.Module, StateBranches] = WeakKeyDictionary()
"""Of every model that has some: whoever scores with a model shares them."""


def branch_states(model: nn.Module) -> StateBranches:
    """Those of a model, with or without an adapter, which is called as a whole; made if there are none."""
    branches = _BRANCHES.get(model)
    if branches is None:
        branches = _BRANCHES[model] = StateBranches(model)
    return branches


def unbranch_states(model: nn.Module) -> None:
    """Leave the layers of a model as they were."""
    branches = _BRANCHES.pop(model, None)
    if branches is not None:
        branches.remove()


def gradient_difference(layer: nn.Module, config: Any, dtype: torch.dtype, device: torch.device) -> float:
    """How far the gradient of a layer for a path in two pieces is from that for the path as a whole, as a share of its norm:
    kernels may leave out that of a state.

    `layer` is one of `layers_with_states` of a model with this `config`. In the place of one whose weights are sharded a new
    one is run, with random weights.
    """
    (cache_argument,) = [name for found, name in layers_with_states(layer) if found is layer]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        if any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
            layer = type(layer)(config, layer.layer_idx).to(device, dtype)
        forward = BranchingForward(layer, cache_argument)
        num_tokens, fork = 3 * MIN_INNER_TOKENS, 2 * MIN_INNER_TOKENS
        path = torch.randn(1, num_tokens, config.hidden_size).to(device, dtype).requires_grad_()
        weight = torch.randn(path.shape).to(device, dtype)
    in_two = [
        Piece(torch.arange(fork), 0, None, has_children=True),
        Piece(torch.arange(fork, num_tokens), 0, 0, has_children=False),
    ]
    gradients = []
    with torch.enable_grad():
        for forward.schedule in (None, make_schedule(in_two, device)):
            (gradient,) = torch.autograd.grad((forward(path) * weight).sum(), path)
            gradients.append(gradient.float())
    whole, parts = gradients
    return float((parts - whole).norm() / whole.norm())


def layers_with_states(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules that carry a state from token to token and can go on from one, and what their forward calls the cache."""
    found = []
    for module in model.modules():
        if not hasattr(module, "layer_idx") or not any(isinstance(child, nn.Conv1d) for child in module.children()):
            continue
        names = [name for name in CACHE_ARGUMENTS if name in inspect.signature(type(module).forward).parameters]
        if names:
            found.append((module, names[0]))
    return found
