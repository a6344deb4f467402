"""The shared-memory segment: its name, its size, its privacy. What travels through it is tested with the transports."""

from __future__ import annotations

import os
import secrets
import stat

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_atropos.errors import WeightSyncError
from trl_atropos.weight_sync.base import ALIGNMENT_BYTES, PolicyLayout, TensorSpec, align
from trl_atropos.weight_sync.transports.shm import _create_segment, _remove_abandoned_segments
from trl_atropos.weight_sync.transports.shm_segment import SEGMENT_DIR, segment_path


GOOD_NAME = "trl_atropos-" + secrets.token_hex(16)


class TestLayout:
    @given(st.integers(0, 1 << 50))
    def test_align_is_the_next_multiple(self, offset):
        aligned = align(offset)
        assert aligned % ALIGNMENT_BYTES == 0
        assert offset <= aligned < offset + ALIGNMENT_BYTES

    @given(st.lists(st.lists(st.integers(0, 7), max_size=3), max_size=8))
    def test_tensors_are_aligned_in_order_and_do_not_overlap(self, shapes):
        layout = PolicyLayout([TensorSpec(str(i), torch.bfloat16, tuple(shape)) for i, shape in enumerate(shapes)])
        offsets = list(layout.offsets.values())
        ends = [offset + spec.num_bytes for offset, spec in zip(offsets, layout.specs, strict=True)]
        assert all(offset % ALIGNMENT_BYTES == 0 for offset in offsets)
        assert all(end <= start for end, start in zip(ends, offsets[1:], strict=False))
        assert layout.num_bytes % ALIGNMENT_BYTES == 0
        assert layout.num_bytes >= max(ends, default=0)

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
            GOOD_NAME[:-1] + "/",
        ],
        # The names are other ones in every process, and several processes must agree on the tests.
        ids=range(10),
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


class TestAbandoned:
    def test_a_segment_is_removed_when_its_trainer_is_gone_and_not_before(self):
        path = segment_path("trl_atropos-" + secrets.token_hex(16))
        mapping = _create_segment(path, 100)
        _remove_abandoned_segments()
        assert os.path.exists(path)
        # What the kernel does for a killed process.
        mapping.close()
        _remove_abandoned_segments()
        assert not os.path.exists(path)
