"""What lets Atropos environments run unmodified with today's libraries: `trl-atropos env`.

Atropos is archived, so that no fix of its causes will come. Each shim changes one thing, in the environment's process
only, says so when it acts, and can be left out.
"""

from __future__ import annotations

from collections.abc import Collection

from ...errors import PreflightError, did_you_mean
from .groups import RolloutAdvantages, Score
from .packages import RelativeImport
from .servers import ServerType
from .settings import ApiKey, EnvConfigClass, OneServer, OpenaiConfig, ServerList, Wandb, WandbName
from .shim import Shim
from .tokenizers import ReturnDict, ServerTokenizer
from .versions import PolicyVersion


SHIMS: tuple[type[Shim], ...] = (
    ReturnDict,
    ServerList,
    OneServer,
    ApiKey,
    Wandb,
    WandbName,
    ServerTokenizer,
    ServerType,
    OpenaiConfig,
    EnvConfigClass,
    RelativeImport,
    Score,
    RolloutAdvantages,
    PolicyVersion,
)
"""All shims, in the order in which they are installed."""


def select_shims(without: Collection[str] = ()) -> list[Shim]:
    """Make all shims but those of these names, not yet installed.

    Raises:
        PreflightError: There is no shim of such a name.
    """
    names = [shim.name for shim in SHIMS]
    for name in without:
        if name not in names:
            raise PreflightError(
                f"There is no shim {name!r}.",
                f"The shims are: {', '.join(names)}.",
                f"{did_you_mean(name, names)} --list-shims says what each does.",
            )
    return [shim() for shim in SHIMS if shim.name not in without]
