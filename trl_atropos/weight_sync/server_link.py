"""One server and the way to it: the states of a publish.

    idle          the server serves version v
    building      start, move, load beside version v, which is served; where the workers can (`BuildsBeside`)
    paused        generation is frozen: requests in flight and new ones wait
    transferring  start, move, load: the server has no complete weights; where they were not built before
    finishing     put the weights in place and name them
    resuming      the server holds version v+1; the waiting requests run
    verified      version read back and logprobs compared; on disagreement the server is paused again

A link that failed stays where it was, so that its error can say what the server holds, until `reopen`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ..errors import DeviceLostError, PublishConflictError, WeightSyncError, WeightSyncTimeout
from .base import BuildsBeside, PolicyLayout, TensorSpec, TransferReport, WeightTransport
from .options import WeightSyncOptions
from .probe import ProbeReference, ProbeResult, check_probe


if TYPE_CHECKING:
    from .inference_server import InferenceServer


logger = logging.getLogger(__name__)

UNPUBLISHED = "default"
"""The name, with vLLM and SGLang, of the weights that a server loaded itself."""

SLEEP_LEVEL = 1
"""Weights go to host memory. Level 2 would drop them, and with them everything that a publish does not send."""

SERVER_STATES = {
    "idle": "The server serves the previous policy.",
    "building": "The server serves the previous policy.",
    "paused": "The server may be paused; it holds the previous policy.",
    "transferring": "The server is paused and holds no complete policy.",
    "finishing": "The server is paused and may hold no complete policy.",
    "resuming": "The server holds the new policy and may be paused.",
    "verified": "The server is paused and holds a policy that is not proven to be the trainer's.",
}


class ServerLink:
    """Brings staged policies onto one server, which serves in `dtype`.

    `state` is a key of `SERVER_STATES`, and `phase_s` holds the seconds of each phase of the last publish: build, pause,
    transfer, load (a part of build or transfer), finish, resume, verify. `memory`, uint8, is where the policy is staged, and
    None until `open`. `is_paused` says whether this link has frozen the server and not let it go on since. `version`
    is what this link published last, and None if the server does not hold a complete policy of this trainer.
    """

    def __init__(
        self,
        client: InferenceServer,
        transport: WeightTransport,
        dtype: torch.dtype,
        options: WeightSyncOptions | None = None,
    ):
        self.client = client
        self.transport = transport
        self.dtype = dtype
        self.options = options or WeightSyncOptions()
        self.state = "idle"
        self.phase_s: dict[str, float] = {}
        self.memory: torch.Tensor | None = None
        self.version: int | None = None
        self._has_checksums = True
        # Publishes since the last one whose logprobs were compared; None before the first.
        self._num_unprobed: int | None = None
        self.is_open = False
        self.is_paused = False

    # Connection

    def open(self, layout: PolicyLayout) -> None:
        """Connect the transport, and copy what was staged before into its memory."""
        staged = self.memory
        self.version = self._num_unprobed = None
        self.memory = self.transport.open(self.client, layout)
        if staged is not None:
            self.memory.copy_(staged)
        self.is_open = True

    def close(self) -> None:
        """Release the transport; the staged policy stays readable, and is sent whole the next time."""
        self.is_open = False
        self.version = self._num_unprobed = None
        self.transport.close()

    def reset(self) -> None:
        """Close the link after a failure, so that what is done next begins with a connection and a pause."""
        self.close()
        self.state = "idle"

    def forget(self) -> None:
        """Release the transport and the staged policy, because another policy follows."""
        self.close()
        self.memory = None

    def require_memory(self) -> torch.Tensor:
        """Return the memory in which the policy is staged; `open` must have been called."""
        assert self.memory is not None, "open() comes first"
        return self.memory

    def check_version(self) -> None:
        """Find out whether the server still holds what was published last, and close the link if it was restarted.

        Raises:
            [`WeightSyncError`]: if another trainer publishes to the same server.
        """
        if self.version is None:
            return
        reported = self.client.get_weight_version()
        if reported == UNPUBLISHED:
            logger.warning(
                f"The {self.client.kind} server at {self.client.base_url} was restarted: it serves its starting checkpoint instead of "
                f"version {self.version}. It is given everything again."
            )
            self.close()
        elif reported != str(self.version):
            raise self._other_trainer(reported, self.version)

    @property
    def needs_probe(self) -> bool:
        """Whether the next policy is to be proven by logprobs, too.

        Version, manifest and checksums show that the bytes have arrived. That the server makes the same model of them (names,
        tied weights, scales) does not change from one publish to the next, but the first one has to show it.
        """
        if self._num_unprobed is None or not self._has_checksums:
            return True
        return self._num_unprobed + 1 >= self.options.logprob_probe_interval

    # Phases, in this order

    def prepare(self, specs: Sequence[TensorSpec]) -> None:
        """Do what can be done for a transfer before the pause."""
        self.transport.prepare(specs)

    def pause(self) -> None:
        """Freeze generation."""
        with self._phase("pause", "paused"):
            if self.options.vllm_enable_sleep_mode:
                # Only the weights: what the publish replaces. vLLM resumes by itself once everything is awake; if the
                # cache was awake already, the pause below ends that.
                self.wake_up(["weights"])
            self.client.pause(clear_cache=not self.options.vllm_keep_kv_cache)
        self.is_paused = True

    @property
    def builds_beside(self) -> bool:
        """Whether the next policy is built while the server serves: not if it is paused already, or asleep."""
        is_served = not self.is_paused and not self.options.vllm_enable_sleep_mode
        is_wanted = self.options.weight_sync_beside and is_served
        return is_wanted and isinstance(self.transport, BuildsBeside) and self.transport.can_build

    def build(self, specs: Sequence[TensorSpec]) -> TransferReport:
        """Move and load tensors beside the policy that is served."""
        assert isinstance(self.transport, BuildsBeside)
        with self._phase("build", "building"):
            self.client.begin_weight_update()
            report = self.transport.build(specs)
        self._take(report)
        return report

    def transfer(self, specs: Sequence[TensorSpec]) -> TransferReport:
        """Move and load tensors."""
        with self._phase("transfer", "transferring"):
            # From here on the server does not hold the last version any more.
            self.version = None
            self.client.begin_weight_update()
            report = self.transport.send(specs)
        self._take(report)
        return report

    def _take(self, report: TransferReport) -> None:
        self._has_checksums = report.has_checksums
        self.phase_s["load"] = report.load_s

    def finish(self, version: int) -> None:
        """Put the weights in place under a version."""
        with self._phase("finish", "finishing"):
            self.version = None
            self.client.finish_weight_update(str(version))

    def resume(self) -> None:
        """Let the waiting requests run."""
        self.is_paused = False
        with self._phase("resume", "resuming"):
            if self.options.vllm_enable_sleep_mode:
                self.wake_up(["kv_cache"])
            self.client.resume()

    def verify(self, version: int, expected: ProbeReference | None) -> ProbeResult | None:
        """Read the version back and compare logprobs; pause the server again if either disagrees.

        `version` is what was published, and `expected` what the trainer's policy answers; without it, only the version
        is read.

        Raises:
            [`WeightSyncError`]: if they disagree.
        """
        with self._phase("verify", "verified"):
            reported = self.client.get_weight_version()
            if reported != str(version):
                raise self._other_trainer(reported, version)
            result = None
            if expected is not None:
                result = check_probe(expected, self.client, self.dtype, self.options.logprob_probe_tolerance)
                self._num_unprobed = 0
            elif self._num_unprobed is not None:
                self._num_unprobed += 1
        self.version = version
        self.state = "idle"
        return result

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Have the server take its device memory again: all, or what the tags name. The trainer holds none in reserve."""
        torch.cuda.empty_cache()
        self.client.wake_up(tags)

    def sleep(self) -> None:
        """Give the server's device memory back until the next publish. Requests in flight are kept."""
        self.client.sleep(SLEEP_LEVEL)

    @contextmanager
    def naming_the_state(self, version: int) -> Iterator[None]:
        """Within the context, an error of publishing this version names server and state, after making sure that no
        unproven policy is served.
        """
        try:
            yield
        except WeightSyncError as exc:
            kinds = (PublishConflictError, DeviceLostError, WeightSyncTimeout, WeightSyncError)
            kind = next(kind for kind in kinds if isinstance(exc, kind))
            raise kind(
                f"Publishing policy version {version} to {self.client.base_url} failed in state `{self.state}`: {exc.what}",
                f"{exc.why} {self._secure()}",
                exc.fix,
            ) from exc
        except BaseException:
            # Ctrl-C, or a defect: whoever is told nothing else must know in which state the server is.
            logger.error(f"Publishing version {version} to {self.client.base_url} was ended. {self._secure()}")
            raise

    def _secure(self) -> str:
        """Make sure, after a failure, that an unproven policy is not served, and say in which state the server is."""
        self.is_paused = False
        if self.state == "verified":
            try:
                self.client.pause()
            except WeightSyncError as exc:
                return f"The server could not be paused ({exc.what}) and may serve a policy that is not proven."
        return SERVER_STATES[self.state]

    def _other_trainer(self, reported: str, expected: int) -> PublishConflictError:
        return PublishConflictError(
            f"The server at {self.client.base_url} reports weight version {reported!r}, this trainer published {expected}.",
            "Another trainer publishes to the same server.",
            "Give each trainer its own server (--vllm_server_base_url).",
        )

    @contextmanager
    def _phase(self, phase: str, state: str) -> Iterator[None]:
        self.state = state
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phase_s[phase] = self.phase_s.get(phase, 0.0) + time.perf_counter() - start
