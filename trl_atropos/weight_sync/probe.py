"""The proof of a publish: the same sequences scored by the trainer's policy and by the server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import WeightSyncError
from ..policy.logprobs import evaluating, next_token_targets, token_logprobs_and_entropy
from ..types import IGNORE_INDEX


if TYPE_CHECKING:
    from .inference_server import InferenceServer


PROBE_TEXTS = ("Water boils at 100 degrees: def f(n): return n if n < 2 else f(n - 1) + f(n - 2)",)
MAX_PROBE_TOKENS = 20
"""Few: the probe runs in every publish, and a policy that did not arrive shows in any token."""

TYPICAL_NOISE_EPS = 10.0
"""Mean |logprob difference| between float32 and pure bfloat16 arithmetic in units of bfloat16's epsilon (2^-8 = 0.0039):
0.040 for a 30-layer, 135M parameter model."""


@dataclass(frozen=True)
class ProbeResult:
    """How far trainer and server are apart on the probe.

    `mean_abs_diff` and `max_abs_diff` are the mean and the largest absolute difference of the logprobs of the
    `num_tokens` tokens that were scored, in nats.
    """

    mean_abs_diff: float
    max_abs_diff: float
    num_tokens: int


@dataclass(frozen=True)
class ProbeReference:
    """What the trainer's policy answers.

    `sequences` are token ids, each of length 2 or more; `logprobs`, of shape `(N,)` and float32, are the logprobs in
    nats of every token but the first of each sequence, concatenated. `rounding_noise` returns the mean |logprob
    difference| in nats that arithmetic in the server's dtype alone makes on these sequences; it is called only if the
    typical noise is exceeded.
    """

    sequences: list[list[int]]
    logprobs: torch.Tensor
    rounding_noise: Callable[[], float]


def check_probe(
    reference: ProbeReference, client: InferenceServer, dtype: torch.dtype, tolerance: float
) -> ProbeResult:
    """Score the sequences on the server, which must not be paused, and compare.

    `dtype` is the server's. `tolerance` is the largest accepted mean absolute difference, as a multiple of what
    rounding to `dtype` alone makes.

    Raises:
        [`WeightSyncError`]: if the two differ by more, or a logprob is not a number.
    """
    server = torch.tensor([value for row in client.get_prompt_logprobs(reference.sequences) for value in row])
    differences = (reference.logprobs - server).abs()
    result = ProbeResult(differences.mean().item(), differences.max().item(), differences.numel())
    accepted = tolerance * TYPICAL_NOISE_EPS * torch.finfo(dtype).eps
    # Written so that a NaN fails. The noise of this very model is only measured when the typical one is exceeded.
    if not result.mean_abs_diff <= accepted:
        accepted = tolerance * reference.rounding_noise()
    if not result.mean_abs_diff <= accepted:
        raise WeightSyncError(
            f"Trainer and server disagree after the publish: mean |logprob difference| {result.mean_abs_diff:.4f}, "
            f"largest {result.max_abs_diff:.4f} over {result.num_tokens} tokens; {accepted:.4f} is accepted ({tolerance} "
            f"x what rounding to {dtype} explains).",
            "The server does not hold the trainer's policy: another base checkpoint, a weight that its loader dropped, "
            "or logits that it changes (soft-capping, quantisation).",
            "Compare the `Failed to load weights` lines of the server's log; if the difference is plain rounding, raise "
            "--logprob_probe_tolerance.",
        )
    return result


class LogprobProbe:
    """Fixed sequences that both sides score at temperature 1.

    The probe finds a policy that did not arrive, or arrived in part: a stale tied head, a wrong name mapping, another
    checkpoint. It cannot see an update that is smaller than the rounding of the server's dtype; against that stand the
    manifest and the version.

    `processing_class` is a tokenizer, or a processor with one, that encodes the probe's texts; without it, fixed
    pseudo-random ids below `vocab_size` are scored.
    """

    def __init__(self, processing_class: Any, vocab_size: int):
        if processing_class is None:
            generator = torch.Generator().manual_seed(0)
            shape = (len(PROBE_TEXTS), MAX_PROBE_TOKENS)
            self.sequences = torch.randint(vocab_size, shape, generator=generator).tolist()
        else:
            tokenizer = getattr(processing_class, "tokenizer", processing_class)
            encoded = [tokenizer(text)["input_ids"][:MAX_PROBE_TOKENS] for text in PROBE_TEXTS]
            self.sequences = [ids for ids in encoded if len(ids) >= 2]
        self._noise: float | None = None

    def reference(self, model: nn.Module, dtype: torch.dtype, *, is_collective: bool = False) -> ProbeReference:
        """Compute what the server, which serves in `dtype`, must answer.

        `is_collective` says that the model's forward pass is collective because its weights are sharded, so that every
        rank calls this. The rounding noise is then computed at once, the first time, because later only one rank would
        ask.
        """
        logprobs = self.trainer_logprobs(model)
        if is_collective and self._noise is None:
            self._noise = self._rounding_noise(model, logprobs, dtype)
        noise = self._noise
        if noise is not None:
            return ProbeReference(self.sequences, logprobs, lambda: noise)
        return ProbeReference(self.sequences, logprobs, lambda: self._rounding_noise(model, logprobs, dtype))

    def _rounding_noise(self, model: nn.Module, logprobs: torch.Tensor, dtype: torch.dtype) -> float:
        # At least `TYPICAL_NOISE_EPS`: a model that is already held in `dtype` shows no difference to itself.
        device_type = next(model.parameters()).device.type
        with torch.autocast(device_type, dtype=dtype, enabled=dtype is not torch.float32):
            rounded = self.trainer_logprobs(model)
        return max((logprobs - rounded).abs().mean().item(), TYPICAL_NOISE_EPS * torch.finfo(dtype).eps)

    @torch.no_grad()
    def trainer_logprobs(self, model: nn.Module) -> torch.Tensor:
        """Logprobs in nats of every token but the first of each sequence, concatenated."""
        with evaluating(model):
            device = next(model.parameters()).device
            input_ids, attention_mask, labels = _pad(self.sequences, device)
            logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
            targets = next_token_targets(labels)
            scored = targets != IGNORE_INDEX
            logprobs, _ = token_logprobs_and_entropy(logits[scored], targets[scored], temperature=1.0)
            return logprobs.float().cpu()


def _pad(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    length = max(len(sequence) for sequence in sequences)
    input_ids = torch.zeros(len(sequences), length, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = torch.tensor(sequence)
        labels[row, : len(sequence)] = torch.tensor(sequence)
    attention_mask = (labels != IGNORE_INDEX).long()
    return input_ids.to(device), attention_mask.to(device), labels.to(device)
