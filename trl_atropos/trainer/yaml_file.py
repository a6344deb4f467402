"""YAML files that a user wrote, read in one way by the training script and by `trl-atropos`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..errors import PreflightError


def read_yaml(path: Path, called: str, why: str, fix: str) -> Any:
    """Read a YAML file; None if it is empty.

    `called` begins the message if it cannot be read, such as `"The launch file a.yaml"`; `why` and `fix` are its other
    two parts, whole sentences.

    Raises:
        [`PreflightError`]: the file is not there, is no UTF-8, no YAML, or has a value that YAML takes for a date and that
            is none.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError) as exc:
        raise PreflightError(f"{called} cannot be read: {exc}.", why, fix) from exc
