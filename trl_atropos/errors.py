"""The exceptions of trl_atropos, and what their messages share.

    TrlAtroposError
    +-- AtroposConnectionError    (ConnectionError)   the Atropos API does not answer
    |   +-- AtroposAnswerLost     (ConnectionError)   a request left, its answer did not arrive
    +-- AtroposProtocolError      (ValueError)        an answer or a group that breaks the wire format
    |   +-- AtroposBatchLost      (ValueError)        the API took a batch from its queue and could not write it
    |   +-- AtroposBatchGivenAway (ValueError)        the API gave a batch to others before its receipt came
    +-- AtroposRegistrationError  (RuntimeError)      the API did not take this registration
    +-- AtroposDataTimeout        (TimeoutError)      no batch was formed in time
    +-- JournalError              (OSError)           the journal of fetched groups cannot be written or read
    +-- PreflightError            (RuntimeError)      a server or an option that cannot work together with this run
    +-- NonFiniteGradientError    (ArithmeticError)   a gradient is NaN or infinite; the optimizer step was not taken
    +-- EpisodeError              (RuntimeError)      an episode of an environment cannot become a rollout
    +-- HubUploadError            (OSError)           the Hub did not take an upload; training goes on
    +-- ProcessFailedError        (ChildProcessError) a process of `trl-atropos launch` ended (cli/launch/processes.py)
    +-- WeightSyncError           (RuntimeError)      a publish failed; says in which state the server is
        +-- WeightSyncTimeout     (TimeoutError)      a phase of a publish exceeded its deadline
        +-- PublishConflictError  (RuntimeError)      another trainer publishes to the same server
        +-- DeviceLostError       (RuntimeError)      the trainer's GPU can no longer be used
        +-- VLLMServerError       (RuntimeError)      the vLLM server answered a request with an HTTP error
        +-- VLLMServerUnreachable (ConnectionError)   the vLLM server is not there, or broke the connection

Every exception also inherits from the standard exception that it specialises, so that `except ConnectionError` keeps
its meaning.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class TrlAtroposError(Exception):
    """Base of all errors that trl_atropos raises on purpose. The message has three parts, each a full sentence.

    Args:
        what (`str`):
            What happened, with values and position.
        why (`str`):
            Why it matters, or the usual cause.
        fix (`str`):
            The option or the command that mends it.
    """

    def __init__(self, what: str, why: str, fix: str):
        # Not super(): OSError, the base of ConnectionError and TimeoutError, would read three arguments as
        # (errno, strerror, filename) and keep two of them.
        Exception.__init__(self, what, why, fix)
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what} {self.why} {self.fix}"

    def __reduce__(self) -> tuple[type[TrlAtroposError], tuple[str, str, str], dict[str, Any]]:
        # With the attributes of the subclasses: errors travel between ranks.
        return type(self), (self.what, self.why, self.fix), self.__dict__


class AtroposConnectionError(TrlAtroposError, ConnectionError):
    """The Atropos API could not be reached, or closed the connection in the middle of an answer."""


class AtroposAnswerLost(AtroposConnectionError):
    """A request was sent and its answer did not arrive whole: it may have had its effect."""


class AtroposProtocolError(TrlAtroposError, ValueError):
    """The Atropos API, or an environment through it, sent something that is not what the wire format promises."""


class AtroposBatchLost(AtroposProtocolError):
    """The API took a batch out of its queue and could not write it as JSON. The next one may be fine."""


class AtroposBatchGivenAway(AtroposProtocolError):
    """The trajectory API gave a batch to other trainers, because its receipt did not come for too long."""


class AtroposRegistrationError(TrlAtroposError, RuntimeError):
    """The API did not take this trainer's registration."""


class AtroposDataTimeout(TrlAtroposError, TimeoutError):
    """No batch was formed within `batch_timeout_s`."""


class JournalError(TrlAtroposError, OSError):
    """The journal of fetched groups, or an offline data file, cannot be written or read."""


class PreflightError(TrlAtroposError, RuntimeError):
    """A server, a model or an option that cannot work with the rest of the run; found before training starts."""


class EpisodeError(TrlAtroposError, RuntimeError):
    """An episode of an environment cannot become a rollout of its group."""


class HubUploadError(TrlAtroposError, OSError):
    """The Hub did not take an upload, or a repository could not be made.

    Args:
        what (`str`):
            What happened, with values and position.
        why (`str`):
            Why it matters, or the usual cause.
        fix (`str`):
            The option or the command that mends it.
        is_lasting (`bool`, *optional*, defaults to `False`):
            Whether the same would happen again: a token without rights, and not a broken connection.
    """

    def __init__(self, what: str, why: str, fix: str, is_lasting: bool = False):
        super().__init__(what, why, fix)
        self.is_lasting = is_lasting


class NonFiniteGradientError(TrlAtroposError, ArithmeticError):
    """A gradient is NaN or infinite. The optimizer step was not taken."""


class WeightSyncError(TrlAtroposError, RuntimeError):
    """A publish failed. The message names the state in which the server was left.

    `is_final` says that trying again is of no use.
    """

    is_final = False


class WeightSyncTimeout(WeightSyncError, TimeoutError):
    """A phase of a publish exceeded its deadline."""


class PublishConflictError(WeightSyncError):
    """Another trainer publishes to the same server. Sending again would fight with it, so it is never tried again."""

    is_final = True


class DeviceLostError(WeightSyncError):
    """The GPU of the trainer's process can no longer be used: every further operation on it fails."""

    is_final = True


class VLLMServerError(WeightSyncError):
    """The vLLM server answered a request with an HTTP error.

    Args:
        what (`str`):
            What happened, with values and position.
        why (`str`):
            Why it matters, or the usual cause.
        fix (`str`):
            The option or the command that mends it.
        status_code (`int`, *optional*, defaults to `500`):
            HTTP status, 400 or more.
        detail (`str`, *optional*, defaults to `""`):
            What the server said, on one line.
    """

    def __init__(self, what: str, why: str, fix: str, status_code: int = 500, detail: str = ""):
        super().__init__(what, why, fix)
        self.status_code = status_code
        self.detail = detail


class VLLMServerUnreachable(WeightSyncError, ConnectionError):
    """The vLLM server refused, closed or reset the connection. A request that was sent may have taken effect."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the question with which a refusal of `name` begins its third part: the nearest of `known`, however far."""
    # n=1 and cutoff=0.0: always one.
    (nearest,) = get_close_matches(name, known, n=1, cutoff=0.0)
    return f"Did you mean `{nearest}`?"
