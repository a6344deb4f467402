"""The order of a publish.

    stage    gather, merge, cast, copy              the server serves version v
    pause    freeze generation                      requests in flight and new ones wait
    transfer start, move, load                      the server has no weights
    finish   put the weights in place, name them    the server holds version v+1
    resume   let the waiting requests run           the server serves version v+1
    verify   version read back, logprob probe       on disagreement the server is paused again

Only `stage` and `verify` cost the trainer time that the environments do not see.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import WeightSyncError
from .base import WeightTransport
from .probe import TYPICAL_NOISE_EPS, LogprobProbe, ProbeResult
from .source import PolicyWeights


if TYPE_CHECKING:
    from .vllm_client import AtroposVLLMClient


logger = logging.getLogger(__name__)

SERVER_STATES = {
    "idle": "The server serves the previous policy.",
    "stage": "The server serves the previous policy.",
    "pause": "The server may be paused; it holds the previous policy.",
    "transfer": "The server is paused and holds no complete policy.",
    "finish": "The server is paused and may hold no complete policy.",
    "resume": "The server holds the new policy and may be paused.",
    "verify": "The server is paused and holds a policy that is not proven to be the trainer's.",
}


@dataclass(frozen=True)
class PublishReport:
    """What one publish did.

    Args:
        policy_version (`int`):
            The version that the server now reports.
        num_bytes (`int`):
            Size of the policy on the wire.
        phase_s (`dict[str, float]`):
            Seconds spent in each phase: stage, pause, transfer, finish, resume, verify.
        probe (`ProbeResult`):
            Trainer against server.
    """

    policy_version: int
    num_bytes: int
    phase_s: dict[str, float]
    probe: ProbeResult

    @property
    def total_s(self) -> float:
        """Seconds of the whole publish."""
        return sum(self.phase_s.values())

    @property
    def paused_s(self) -> float:
        """Seconds during which the server did not generate."""
        return sum(self.phase_s[phase] for phase in ("pause", "transfer", "finish", "resume"))

    def metrics(self) -> dict[str, float]:
        """The report under the names of `metrics.METRICS`."""
        return {
            "perf/weight_sync_s": self.total_s,
            "perf/weight_sync_stage_s": self.phase_s["stage"],
            "perf/weight_sync_pause_s": self.paused_s,
            "perf/weight_sync_transfer_s": self.phase_s["transfer"],
            "perf/weight_sync_verify_s": self.phase_s["verify"],
            "perf/weight_sync_bytes": float(self.num_bytes),
            "logprob_probe/mean_abs_diff": self.probe.mean_abs_diff,
        }


class PolicyPublisher:
    """Keeps one server on the newest policy and proves it after every publish.

    Args:
        client (`AtroposVLLMClient`):
            Control plane of the server.
        transport (`WeightTransport`):
            Mover of the bytes.
        probe (`LogprobProbe`):
            The sequences that both sides score.
        dtype (`torch.dtype`):
            The server's dtype.
        probe_tolerance (`float`):
            Largest accepted mean absolute difference, as a multiple of what rounding to `dtype` alone makes.
    """

    def __init__(
        self,
        client: AtroposVLLMClient,
        transport: WeightTransport,
        probe: LogprobProbe,
        dtype: torch.dtype,
        probe_tolerance: float,
    ):
        self.client = client
        self.transport = transport
        self.probe = probe
        self.dtype = dtype
        self.probe_tolerance = probe_tolerance
        self._phase = "idle"
        self._phase_s: dict[str, float] = {}
        self._is_open = False

    def publish(self, model: nn.Module, policy_version: int) -> PublishReport:
        """Put the model's weights onto the server under a version, and prove it.

        Args:
            model (`nn.Module`):
                The unwrapped policy.
            policy_version (`int`):
                Number of this policy; the server reports it as `weight_version`.

        Raises:
            [`WeightSyncError`]: naming the phase that failed and the state of the server. Half a policy is never
                served: after a failure between `pause` and `verify` the server stays paused.
        """
        source = PolicyWeights(model, self.dtype)
        self._phase_s = {}
        try:
            if not self._is_open:
                self.transport.open(self.client, source.manifest())
                self._is_open = True
            with self._timed("stage"):
                self.transport.stage(source)
            # While this thread waits for the server, another one computes what the server must answer afterwards.
            with ThreadPoolExecutor(max_workers=1, thread_name_prefix="probe") as executor:
                trainer_logprobs = executor.submit(self.probe.trainer_logprobs, model)
                self._transfer(policy_version)
                with self._timed("verify"):
                    probe = self._verify(model, trainer_logprobs.result(), policy_version)
        except WeightSyncError as exc:
            raise type(exc)(
                f"Publishing policy version {policy_version} failed in phase `{self._phase}`: {exc.what}",
                f"{exc.why} {self._secure_server()}",
                exc.fix,
            ) from exc
        except BaseException:
            # Ctrl-C, or a defect: whoever is told nothing else must know in which state the server is.
            logger.error(
                f"Publishing version {policy_version} ended in phase `{self._phase}`. {self._secure_server()}"
            )
            raise
        self._phase = "idle"
        num_bytes = sum(spec.num_bytes for spec in source.manifest())
        return PublishReport(policy_version, num_bytes, dict(self._phase_s), probe)

    def _transfer(self, policy_version: int) -> None:
        with self._timed("pause"):
            self.client.pause()
        with self._timed("transfer"):
            self._start()
            self.transport.send()
        with self._timed("finish"):
            self.client.finish_weight_update(str(policy_version))
        with self._timed("resume"):
            self.client.resume()

    def close(self) -> None:
        """Release the transport."""
        self.transport.close()
        self._is_open = False

    def _secure_server(self) -> str:
        """After a failure: make sure that an unproven policy is not served, and say in which state the server is."""
        if self._phase == "verify":
            try:
                self.client.pause()
            except WeightSyncError as exc:
                return f"The server could not be paused ({exc.what}) and may serve a policy that is not proven."
        return SERVER_STATES[self._phase]

    def _start(self) -> None:
        try:
            self.client.start_weight_update()
        except WeightSyncError as exc:
            # A trainer that died between start and finish left its update open. Sending everything completes it.
            if "already active" not in exc.what:
                raise
            logger.warning("The server has an unfinished weight update of another trainer; it is completed with ours.")

    def _verify(self, model: nn.Module, trainer_logprobs: torch.Tensor, policy_version: int) -> ProbeResult:
        reported = self.client.get_weight_version()
        if reported != str(policy_version):
            raise WeightSyncError(
                f"The server reports weight version {reported!r} after version {policy_version} was published.",
                "Another trainer publishes to the same server.",
                "Give each trainer its own server (--vllm_server_base_url).",
            )
        result = self.probe.compare(trainer_logprobs, self.client)
        accepted = self.probe_tolerance * TYPICAL_NOISE_EPS * torch.finfo(self.dtype).eps
        # Written so that a NaN fails. The noise of this very model is only measured when the typical one is exceeded.
        if not result.mean_abs_diff <= accepted:
            accepted = self.probe_tolerance * self.probe.rounding_noise(model, trainer_logprobs, self.dtype)
        if not result.mean_abs_diff <= accepted:
            raise WeightSyncError(
                f"Trainer and server disagree after version {policy_version} was published: mean |logprob difference| "
                f"{result.mean_abs_diff:.4f}, largest {result.max_abs_diff:.4f} over {result.num_tokens} tokens; "
                f"{accepted:.4f} is accepted ({self.probe_tolerance} x what rounding to {self.dtype} explains).",
                "The server does not hold the trainer's policy: another base checkpoint, a weight that its loader "
                "dropped, or logits that it changes (soft-capping, quantisation).",
                "Compare the `Failed to load weights` lines of the server's log; if the difference is plain rounding, "
                "raise --logprob_probe_tolerance.",
            )
        return result

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        self._phase = phase
        start = time.perf_counter()
        try:
            yield
        finally:
            self._phase_s[phase] = time.perf_counter() - start
