"""What the API refuses, and why its database cannot be used."""

from __future__ import annotations

from ..errors import TrlAtroposError


class RequestRefused(TrlAtroposError, ValueError):
    """A request that is answered with an error. Its message goes to the person who wrote the client.

    Args:
        what (`str`):
            What happened, with values and position.
        why (`str`):
            Why it matters, or the usual cause.
        fix (`str`):
            What mends it.
        status_code (`int`, *optional*, defaults to `422`):
            HTTP status, 400 or more.
        field (`str`, *optional*, defaults to `""`):
            Name of the field of the body that is wrong; empty if it is none in particular.
        retry_after_s (`int`, *optional*):
            Seconds after which the same request can succeed; None if it never will.
    """

    def __init__(
        self,
        what: str,
        why: str,
        fix: str,
        status_code: int = 422,
        field: str = "",
        retry_after_s: int | None = None,
    ):
        super().__init__(what, why, fix)
        self.status_code = status_code
        self.field = field
        self.retry_after_s = retry_after_s


class ApiDatabaseError(TrlAtroposError, OSError):
    """The database of the API cannot be opened, read or written."""
