"""What several end-to-end tests need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest


if TYPE_CHECKING:
    from live_api import PublishTarget


@pytest.fixture(scope="session")
def publish_target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PublishTarget]:
    """Takes the policies of all trainers of resume_run.py, and saw no request that a real server would not survive."""
    # Not above: the process that deals tests to others reads this file, too, and runs none.
    from live_api import PublishTarget

    with PublishTarget(tmp_path_factory.mktemp("served")) as target:
        yield target
        assert target.offences == []
