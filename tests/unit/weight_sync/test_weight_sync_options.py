"""Options of publishing: what contradicts each other is refused with both sides named."""

from __future__ import annotations

from pathlib import Path

import pytest

from trl_atropos.trainer.atropos_config import AtroposConfig


def config(tmp_path: Path, **options: object) -> AtroposConfig:
    return AtroposConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True, **options)


def test_defaults_recover_from_a_restarted_server_and_pick_the_cheapest_mode(tmp_path):
    args = config(tmp_path)
    assert (args.weight_sync_mode, args.on_publish_failure, args.max_publish_retries) == ("auto", "retry", 3)
    assert (args.vllm_group_port, args.vllm_group_host) == (0, None)


def test_servers_are_separated_by_commas(tmp_path):
    args = config(tmp_path, vllm_server_base_url="http://a:8000, http://b:8000")
    assert args.vllm_server_base_urls == ["http://a:8000", "http://b:8000"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"weight_sync_mode": "delta"}, r"weight_sync_mode is 'delta'.*auto, full, merged, adapter"),
        ({"on_publish_failure": "ignore"}, r"on_publish_failure is 'ignore'.*retry, pause, abort"),
        ({"weight_sync_steps": 0}, r"weight_sync_steps is 0"),
        ({"weight_sync_warn_fraction": float("nan")}, r"weight_sync_warn_fraction is nan"),
        ({"logprob_probe_interval": 0}, r"logprob_probe_interval is 0"),
        ({"weight_sync_full_interval": 0}, r"weight_sync_full_interval is 0"),
        ({"vllm_group_port": 70000}, r"vllm_group_port is 70000"),
        ({"max_publish_retries": -1}, r"max_publish_retries is -1.*abort"),
        ({"vllm_server_base_url": "http://a:1,http://a:1"}, r"named once"),
        ({"vllm_server_base_url": "http://a:1,"}, r"named once"),
        ({"vllm_enable_sleep_mode": True, "weight_sync_steps": 2}, r"vllm_enable_sleep_mode.*--weight_sync_steps 1"),
        (
            {"vllm_enable_sleep_mode": True, "vllm_server_base_url": "http://a:1,http://b:1"},
            r"vllm_enable_sleep_mode.*2 servers",
        ),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, options, expected):
    with pytest.raises(ValueError, match=expected):
        config(tmp_path, **options)
