"""A trainer connects once, whatever it does first."""

from __future__ import annotations

from pathlib import Path

from live_api import LiveRun, PublishTarget
from resume_run import OPTIONS
from tiny_models import tiny_gpt2

from trl_atropos import AtroposConfig, AtroposTrainer


# What connecting asks; the facts of a server are looked at before and after its first health check.
ONCE = ("POST /init_weight_transfer_engine", "GET /server_info", "GET /v1/models")


def test_training_after_a_publish_does_not_connect_twice(publish_target: PublishTarget, tmp_path: Path) -> None:
    with LiveRun(tmp_path, publish_target) as run:
        options = {**OPTIONS, **run.options, "max_steps": 1, "save_strategy": "no"}
        trainer = AtroposTrainer(tiny_gpt2(), AtroposConfig(output_dir=str(run.output_dir), **options))
        publish_target.requests.clear()

        trainer.publish_policy()
        assert publish_target.state.weight_version == "0"
        asked = [publish_target.routes.count(route) for route in ONCE]
        run.feed(range(2))
        trainer.train()

    assert [publish_target.routes.count(route) for route in ONCE] == asked
    assert asked[0] == 1
    assert (publish_target.state.weight_version, trainer.policy_version) == ("1", 1)
