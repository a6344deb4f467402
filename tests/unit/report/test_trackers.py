"""`report_to`: what the trackers' own readers find is what the trainer logged."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from watched_runs import NUM_STEPS, trained

from trl_atropos import AtroposConfig, AtroposTrainer
from trl_atropos.report import options


GROUPED = {"train/reward", "train/staleness/num_dropped", "train/perf/batch_wait_s", "train/env/capitals/reward"}


def logged(trainer: AtroposTrainer) -> list[dict[str, float]]:
    """What each step logged, under the names of the trackers."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{f"train/{name}": value for name, value in entry.items() if name != "step"} for entry in entries]


def same(read: list[dict[str, Any]], trainer: AtroposTrainer) -> bool:
    expected = logged(trainer)
    assert len(expected) == NUM_STEPS and expected[0].keys() >= GROUPED
    return [
        {name: pytest.approx(value, rel=1e-6, nan_ok=True) for name, value in entry.items()} for entry in expected
    ] == [{name: entry.get(name) for name in of_step} for entry, of_step in zip(read, expected, strict=True)]


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trained(tmp_path, report_to="tensorboard")
    (directory,) = {path.parent for path in (tmp_path / "out").rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(directory)).Reload()
    read: list[dict[str, Any]] = [{} for _ in range(NUM_STEPS)]
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            read[event.step - 1].setdefault(name, event.value)
    assert same(read, trainer)


def test_trackio(tmp_path, monkeypatch):
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    trainer = trained(tmp_path, report_to="trackio", project="of-a-test")
    rows = [row for row in SQLiteStorage.get_logs("of-a-test", "a run") if "train/loss" in row]
    assert same(rows, trainer)


def test_wandb(tmp_path, monkeypatch):
    import wandb
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    # It reads its environment once.
    wandb.teardown()
    trainer = trained(tmp_path, report_to="wandb")
    wandb.finish()
    # `finish` does not wait for the process that writes the file; this does.
    wandb.teardown()
    (path,) = tmp_path.rglob("run-*.wandb")
    rows = []
    for data in leveldb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    assert same([row for row in rows if "train/loss" in row], trainer)


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """The records of a W&B file, for which the package has no reader in Python: LevelDB's log format after 7 bytes."""
    block_size, header_size, end, whole, last = 32768, 7, 0, 1, 4
    position, record = header_size, b""
    while position + header_size <= len(content):
        if block_size - position % block_size < header_size:
            position += block_size - position % block_size
            continue
        _, size, kind = struct.unpack("<IHB", content[position : position + header_size])
        if kind == end:
            return
        record += content[position + header_size : position + header_size + size]
        position += header_size + size
        if kind in (whole, last):
            yield record
            record = b""


class TestAuto:
    def config(self, **options: Any) -> AtroposConfig:
        return AtroposConfig(output_dir="out", use_cpu=True, **options)

    def test_it_is_trackio_on_this_machine_if_it_is_installed(self, monkeypatch):
        monkeypatch.setattr(options, "find_spec", lambda name: object())
        args = self.config()
        assert args.report_to == ["trackio"]
        # None lets transformers upload what was logged when the model is pushed.
        assert (args.trackio_space_id, args.trackio_static_space_id) == (None, False)

    def test_it_is_nothing_otherwise(self, monkeypatch):
        monkeypatch.setattr(options, "find_spec", lambda name: None)
        assert self.config().report_to == []

    @pytest.mark.parametrize(("chosen", "expected"), [("none", []), ("wandb", ["wandb"]), (["trackio"], ["trackio"])])
    def test_what_is_chosen_stays(self, chosen, expected):
        args = self.config(report_to=chosen)
        assert args.report_to == expected
        assert args.trackio_static_space_id is None


def test_trackers_do_not_get_secrets():
    args = AtroposConfig(output_dir="out", use_cpu=True, hub_token="hf_secret", vllm_api_key="sk-secret")
    assert "secret" not in str(args) + repr(args) + json.dumps(args.to_dict(), default=str)
