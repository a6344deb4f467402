"""What every shim has, and what it says."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import ClassVar


logger = logging.getLogger(__name__)


class Shim(ABC):
    """One difference between what an Atropos environment was written for and what is installed today.

    `name` is what `--no-shim` takes. `why` says in one sentence what goes wrong without it. `upstream` is where the
    cause is: file and name in Atropos 0.4.0 or in another library.
    """

    name: ClassVar[str]
    why: ClassVar[str]
    upstream: ClassVar[str]

    def __init__(self) -> None:
        self._has_acted = False

    @abstractmethod
    def install(self) -> None:
        """Replace what upstream does, for the rest of this process."""

    def acts(self, what: str) -> None:
        """Log what the shim does, the change with its values, at its first time only."""
        if not self._has_acted:
            self._has_acted = True
            logger.info("shim %s: %s", self.name, what)
