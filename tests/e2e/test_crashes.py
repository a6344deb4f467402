"""Two environments of Atropos, `trl-atropos api` and a trainer: whichever of them is killed, and when."""

from __future__ import annotations

from pathlib import Path

from crashes import PARTS, crash
from live_api import PublishTarget


SEED = 17
# Of each part, those of the API most: it is the one that environments must not notice.
KILLS = ("api", "trainer", "api", "environment", "api", "trainer", "api", "environment", "api", "trainer")


def test_every_acknowledged_group_is_trained_once_and_environments_go_on(
    publish_target: PublishTarget, tmp_path: Path
) -> None:
    happened = crash(tmp_path, publish_target, KILLS, SEED)
    assert happened["num_kills"] == {part: KILLS.count(part) for part in PARTS}
    assert happened["num_groups_trained"] > len(KILLS)
