"""A trainer that publishes to a server and is killed at a given moment.

python killed_trainer.py URL MODEL_DIR MOMENT
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from publishing import Publishing, load


MOMENTS = ("before_init", "after_start", "in_transfer", "before_finish", "after_finish")


def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(client: Any, moment: str) -> None:
    """Replace the request of this moment by one that does not return."""
    start, update, finish = client.start_weight_update, client.update_weights, client.finish_weight_update

    def start_and_die() -> None:
        start()
        die()

    def update_and_die(info: dict[str, Any]) -> None:
        threading.Timer(0.002, die).start()
        update(info)
        # The server was faster than the timer.
        die()

    def finish_and_die(version: str | None) -> None:
        finish(version)
        die()

    name, replacement = {
        "before_init": ("init_weight_transfer_engine", die),
        "after_start": ("start_weight_update", start_and_die),
        "in_transfer": ("update_weights", update_and_die),
        "before_finish": ("finish_weight_update", die),
        "after_finish": ("finish_weight_update", finish_and_die),
    }[moment]
    setattr(client, name, replacement)


def main() -> None:
    url, model_dir, moment = sys.argv[1:]
    publishing = Publishing(url, Path(model_dir))
    arm(publishing.client, moment)
    publishing.publish(load(Path(model_dir)), policy_version=1)


if __name__ == "__main__":
    main()
