"""The shared-memory transport: layout, names, life of the segment, and the workers' reports."""

from __future__ import annotations

import json
import mmap
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_atropos.errors import WeightSyncError
from trl_atropos.weight_sync.base import TensorSpec
from trl_atropos.weight_sync.shm import SharedMemoryTransport, _create_segment, _layout
from trl_atropos.weight_sync.shm_segment import ALIGNMENT_BYTES, REPORT_BYTES, SEGMENT_DIR, align, segment_path


GOOD_NAME = "trl_atropos-" + "0123456789abcdef" * 2


def segments() -> set[str]:
    return {path.name for path in Path(SEGMENT_DIR).glob("trl_atropos-*")}


class Tensors:
    """A weight source of given tensors, announced in a dtype."""

    def __init__(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.bfloat16):
        self.tensors = tensors
        self.dtype = dtype

    def manifest(self) -> list[TensorSpec]:
        return [TensorSpec(name, self.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def __iter__(self):
        return iter(self.tensors.items())


class Workers:
    """Plays the wire and the workers behind it: maps the segment by name, reads it and leaves reports."""

    base_url = "http://127.0.0.1:1"

    def __init__(self, num_workers: int = 1, init_error: Exception | None = None):
        self.num_workers = num_workers
        self.init_error = init_error
        self.calls: list[str] = []
        self.reports: list[dict[str, Any] | None] | None = None
        self.mode = 0

    def get_world_size(self) -> int:
        self.calls.append("get_world_size")
        return self.num_workers

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.calls.append("init")
        self.init_info = init_info
        if self.init_error is not None:
            raise self.init_error
        path = segment_path(init_info["segment"])
        self.mode = stat.S_IMODE(os.stat(path).st_mode)
        with open(path, "r+b") as file:
            self.mapping = mmap.mmap(file.fileno(), 0)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.calls.append("update")
        self.received = {
            name: torch.frombuffer(
                bytearray(self.mapping[offset : offset + 2 * torch.Size(shape).numel()]), dtype=torch.bfloat16
            ).view(shape)
            for name, shape, offset in zip(
                update_info["names"], update_info["shapes"], update_info["offsets"], strict=True
            )
        }
        whole = {
            "sequence": update_info["sequence"],
            "num_tensors": len(self.received),
            "num_bytes": sum(2 * tensor.numel() for tensor in self.received.values()),
            "load_s": 0.25,
        }
        reports = [whole] * self.num_workers if self.reports is None else self.reports
        for worker, changes in enumerate(reports):
            if changes is not None:
                self.leave_report(worker, {**whole, **changes})

    def leave_report(self, worker: int, report: dict[str, Any]) -> None:
        offset = self.init_info["data_bytes"] + worker * REPORT_BYTES
        self.mapping[offset : offset + REPORT_BYTES] = json.dumps(report).encode().ljust(REPORT_BYTES, b"\0")


@pytest.fixture
def source() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    # 3, 32 and 66 numbers: neither is a multiple of a cache line.
    return Tensors({name: torch.randn(shape, generator=generator) for name, shape in
                    {"a": (3,), "b.weight": (4, 8), "c": (2, 3, 11)}.items()})  # fmt: skip


@pytest.fixture
def workers() -> Workers:
    return Workers()


@pytest.fixture
def transport():
    transport = SharedMemoryTransport()
    before = segments()
    yield transport
    transport.close()
    assert segments() == before


class TestLayout:
    @given(st.integers(0, 1 << 50))
    def test_align_is_the_next_multiple(self, offset):
        aligned = align(offset)
        assert aligned % ALIGNMENT_BYTES == 0
        assert offset <= aligned < offset + ALIGNMENT_BYTES

    @given(st.lists(st.lists(st.integers(0, 7), max_size=3), max_size=8))
    def test_tensors_are_aligned_in_order_and_do_not_overlap(self, shapes):
        manifest = [TensorSpec(str(i), torch.bfloat16, tuple(shape)) for i, shape in enumerate(shapes)]
        offsets, data_bytes = _layout(manifest)
        ends = [offset + spec.num_bytes for offset, spec in zip(offsets, manifest, strict=True)]
        assert all(offset % ALIGNMENT_BYTES == 0 for offset in offsets)
        assert all(end <= start for end, start in zip(ends, offsets[1:], strict=False))
        assert data_bytes % ALIGNMENT_BYTES == 0
        assert data_bytes >= max(ends, default=0)

    def test_a_scalar_has_the_size_of_one_number(self):
        assert TensorSpec("scale", torch.float32, ()).num_bytes == 4


class TestNames:
    def test_a_segment_lies_in_shared_memory(self):
        assert segment_path(GOOD_NAME) == f"/dev/shm/{GOOD_NAME}"

    @pytest.mark.parametrize(
        "name",
        [
            "../x",
            "/etc/passwd",
            "",
            "trl_atropos-",
            GOOD_NAME + "0",
            GOOD_NAME + "\n",
            GOOD_NAME.upper(),
            "../shm/" + GOOD_NAME,
            "sem." + GOOD_NAME,
            GOOD_NAME.replace("0", "/"),
        ],
    )
    def test_a_name_that_could_point_elsewhere_is_refused(self, name):
        with pytest.raises(ValueError, match="is not the name of a weight segment"):
            segment_path(name)


class TestCreateSegment:
    def test_private_to_the_user_and_of_the_size_asked(self):
        path = segment_path(GOOD_NAME)
        try:
            mapping = _create_segment(path, 5000)
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
            assert len(mapping) == 5000
            # Reserved, not sparse: a full file system is found now and not by a signal in the middle of a publish.
            assert os.stat(path).st_blocks * 512 >= 5000
            mapping.close()
        finally:
            os.unlink(path)

    def test_an_existing_file_is_not_taken_over(self):
        path = segment_path(GOOD_NAME)
        _create_segment(path, 100).close()
        try:
            with pytest.raises(WeightSyncError, match="cannot be created"):
                _create_segment(path, 100)
            assert os.stat(path).st_size == 100
        finally:
            os.unlink(path)

    def test_too_large_says_how_much_is_free_and_how_to_enlarge_it(self):
        system = os.statvfs(SEGMENT_DIR)
        total_bytes = system.f_blocks * system.f_frsize
        assert total_bytes > 0, "a shared-memory file system without a limit"
        with pytest.raises(WeightSyncError) as caught:
            _create_segment(segment_path(GOOD_NAME), total_bytes + 4096)
        assert f"{(total_bytes + 4096) / 2**20:.0f} MiB does not fit" in caught.value.what
        assert f"are free in {SEGMENT_DIR}" in caught.value.what
        assert "one copy of the policy" in caught.value.why
        assert "--shm-size" in caught.value.fix
        assert not os.path.exists(segment_path(GOOD_NAME))


class TestTransport:
    def test_workers_receive_the_cast_tensors_bit_for_bit(self, transport, workers, source):
        transport.open(workers, source.manifest())
        transport.stage(source)
        transport.send()
        assert workers.received.keys() == source.tensors.keys()
        assert all(torch.equal(workers.received[n], t.to(torch.bfloat16)) for n, t in source.tensors.items())
        assert transport.load_s == 0.25

    def test_a_second_publish_reuses_the_mapping(self, transport, workers, source):
        transport.open(workers, source.manifest())
        for scale in (1.0, 3.0):
            scaled = Tensors({name: scale * tensor for name, tensor in source.tensors.items()})
            transport.stage(scaled)
            transport.send()
            assert torch.equal(workers.received["c"], scaled.tensors["c"].to(torch.bfloat16))
        assert workers.calls == ["get_world_size", "init", "update", "update"]

    def test_staging_does_not_talk_to_the_server(self, transport, workers, source):
        transport.open(workers, source.manifest())
        transport.stage(source)
        assert workers.calls == ["get_world_size", "init"]

    def test_tensors_that_are_not_contiguous_arrive_in_their_own_order(self, transport, workers):
        source = Tensors({"t": torch.arange(12.0).view(3, 4).T})
        transport.open(workers, source.manifest())
        transport.stage(source)
        transport.send()
        # Exact in bfloat16: integers up to 256.
        assert workers.received["t"].tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]

    def test_the_segment_is_private_and_has_no_name_once_it_is_open(self, transport, workers, source):
        before = segments()
        transport.open(workers, source.manifest())
        assert workers.mode == 0o600
        assert segments() == before

    def test_the_name_is_gone_when_the_server_refuses(self, transport, source):
        before = segments()
        with pytest.raises(WeightSyncError, match="no engine"):
            transport.open(Workers(init_error=WeightSyncError("no engine.", "", "")), source.manifest())
        assert segments() == before

    def test_opening_again_serves_a_new_server(self, transport, workers, source):
        transport.open(workers, source.manifest())
        restarted = Workers()
        transport.open(restarted, source.manifest())
        transport.stage(source)
        transport.send()
        assert restarted.init_info["segment"] != workers.init_info["segment"]
        assert torch.equal(restarted.received["a"], source.tensors["a"].to(torch.bfloat16))

    def test_every_worker_has_a_slot(self, transport, source):
        workers = Workers(num_workers=3)
        workers.reports = [{"load_s": 0.1}, {"load_s": 0.7}, {"load_s": 0.2}]
        transport.open(workers, source.manifest())
        transport.stage(source)
        transport.send()
        # The slowest worker decides.
        assert transport.load_s == 0.7

    @pytest.mark.parametrize(
        "report",
        [None, {"sequence": 0}, {"num_tensors": 2}, {"num_bytes": 1}],
        ids=["missing", "of_another_transfer", "a_tensor_short", "bytes_short"],
    )
    def test_a_worker_that_did_not_load_everything_is_named(self, transport, source, report):
        workers = Workers(num_workers=2)
        workers.reports = [{}, report]
        transport.open(workers, source.manifest())
        transport.stage(source)
        # (3 + 32 + 66) numbers of 2 bytes
        with pytest.raises(WeightSyncError, match=r"^Worker 1 reports .* the trainer staged \(1, 3, 202\)") as caught:
            transport.send()
        assert "--resume_from_checkpoint" in caught.value.fix

    def test_the_report_of_the_last_transfer_does_not_pass_for_the_next(self, transport, workers, source):
        transport.open(workers, source.manifest())
        transport.stage(source)
        transport.send()
        transport.stage(source)
        workers.reports = [None]
        with pytest.raises(
            WeightSyncError, match=r"Worker 0 reports .*\(1, 3, 202\), the trainer staged \(2, 3, 202\)"
        ):
            transport.send()

    @pytest.mark.parametrize("change", ["renamed", "reshaped", "shorter", "longer"])
    def test_a_source_that_leaves_the_manifest_is_refused_before_the_server_hears_of_it(
        self, transport, workers, source, change
    ):
        tensors = dict(source.tensors)
        last = tensors.pop("c")
        tensors.update({"renamed": {"d": last}, "reshaped": {"c": last.view(6, 11)}, "shorter": {},
                        "longer": {"c": last, "d": last}}[change])  # fmt: skip
        transport.open(workers, source.manifest())
        with pytest.raises(ValueError):
            transport.stage(Tensors(tensors))
        assert "update" not in workers.calls

    def test_closing_twice_and_before_opening_is_fine(self, source, workers):
        transport = SharedMemoryTransport()
        transport.close()
        transport.open(workers, source.manifest())
        transport.close()
        transport.close()
        with pytest.raises(RuntimeError, match="not open"):
            transport.send()

    def test_closing_after_an_interrupted_stage_is_fine(self, source, workers):
        class Interrupted(Tensors):
            def __iter__(self):
                yield from list(self.tensors.items())[:1]
                raise MemoryError("while merging")

        transport = SharedMemoryTransport()
        transport.open(workers, source.manifest())
        with pytest.raises(MemoryError) as caught:
            transport.stage(Interrupted(source.tensors))
        # The traceback holds a view of the segment.
        assert caught.tb is not None
        transport.close()


def test_a_killed_trainer_leaves_nothing_behind():
    code = """
import os, signal, sys
sys.path[:0] = sys.argv[1:]
from test_shm_segment import Tensors, Workers
import torch
from trl_atropos.weight_sync.shm import SharedMemoryTransport
source = Tensors({"a": torch.ones(1000)})
transport = SharedMemoryTransport()
transport.open(Workers(), source.manifest())
transport.stage(source)
print("open", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    before = segments()
    here = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", code, str(here), str(here.parents[1])], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout) == (-signal.SIGKILL, "open\n"), result.stderr
    assert segments() == before
