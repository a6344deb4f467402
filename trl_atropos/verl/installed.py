"""Which verl this package is written for."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from ..errors import PreflightError


VERL_VERSION = "0.9.1"
"""The methods of `SFTTrainer` that are overridden here are no interface that verl promises to keep."""

INSTALL = "Make an environment with `make test-verl`, or with `pip install -r requirements/verl.txt` (docs/verl.md)."


def check_verl() -> None:
    """Check that verl can be imported, and is the version that this package is written for.

    Raises:
        PreflightError: it is missing or another version, or TRL lies beside it.
    """
    try:
        installed = version("verl")
    except PackageNotFoundError as exc:
        raise PreflightError(
            "verl is not installed in this Python.", f"`trl_atropos.verl` is a part of verl {VERL_VERSION}.", INSTALL
        ) from exc
    if installed != VERL_VERSION:
        raise PreflightError(
            f"verl {installed} is installed.",
            f"`trl_atropos.verl` overrides methods of the SFTTrainer of verl {VERL_VERSION}, which other versions call in another "
            "way.",
            f"Install that one: pip install verl=={VERL_VERSION}.",
        )
    if find_spec("trl") is not None:
        raise PreflightError(
            f"TRL {version('trl')} is installed beside verl.",
            f"verl {VERL_VERSION} imports a class that TRL has moved, as soon as it finds TRL, and its engines do not load.",
            f"Nothing here needs TRL. {INSTALL}",
        )
