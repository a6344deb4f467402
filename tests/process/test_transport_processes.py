"""Our transports against the contract, and what only one of them can do."""

from __future__ import annotations

import inspect
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import vllm.distributed.device_communicators.pynccl_wrapper as pynccl_wrapper
from hypothesis import given
from hypothesis import strategies as st
from nccl_stand_in import GlooCommunicator, StandInTransport
from shared_segments import left_since, segments
from transport_contract import (
    DEADLINE_S,
    SHORT_S,
    SLACK_S,
    SPECS,
    ReportingTransportContract,
    TransportContract,
    fill,
    listening_ports,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo

from trl_atropos.errors import PreflightError, VLLMServerError, WeightSyncError, WeightSyncTimeout
from trl_atropos.serving import plugin
from trl_atropos.weight_sync.base import PolicyLayout, TensorSpec
from trl_atropos.weight_sync.transports.backends import BACKENDS
from trl_atropos.weight_sync.transports.choose import make_transport
from trl_atropos.weight_sync.transports.collective import SAY_S, Cancelled, Collective
from trl_atropos.weight_sync.transports.gloo import GlooTransport, cut_chunks
from trl_atropos.weight_sync.transports.group import numbered
from trl_atropos.weight_sync.transports.nccl import NcclTransport, in_packed_order
from trl_atropos.weight_sync.transports.rendezvous import bind, local_address_towards, server_host
from trl_atropos.weight_sync.transports.reports import WorkerReport, checksum, view_tensor
from trl_atropos.weight_sync.transports.shm import SharedMemoryTransport


def new_chunked_transport(timeout_s: float) -> GlooTransport:
    return GlooTransport(timeout_s, chunk_bytes=100)


class TestSharedMemory(ReportingTransportContract):
    engine = "trl_atropos.weight_sync.transports.shm_engine:SharedMemoryEngine"

    @pytest.fixture
    def new_transport(self):
        return SharedMemoryTransport

    def test_bytes_that_change_on_the_way_are_not_loaded(self, transport, new_server, layout):
        server = new_server(1)
        memory = transport.open(server, layout)
        fill(memory, layout, seed=1)
        server.call("start")
        send = server.update_weights

        def change_and_send(update_info: dict[str, Any]) -> None:
            memory[0] += 1
            send(update_info)

        server.update_weights = change_and_send
        with pytest.raises(VLLMServerError, match="checksum"):
            transport.send(layout.specs)
        assert server.received() == [{}]

    def test_a_worker_may_map_after_the_server_has_answered(self, transport, new_server, layout):
        # As vLLM's executor answers after a request that failed on both.
        server = new_server(2)

        def init_early(init_info: dict[str, Any]) -> None:
            server.tell(0, "init", init_info)
            threading.Timer(0.3, server.tell, (1, "init", init_info)).start()

        server.init_weight_transfer_engine = init_early
        expected = fill(transport.open(server, layout), layout, seed=2)
        server.call("start")
        transport.send(layout.specs)
        server.call("finish")
        assert server.received() == [expected] * 2

    def test_a_worker_that_maps_nothing_is_named_and_no_name_is_left(self, new_transport, new_server, layout):
        server = new_server(2)
        server.init_weight_transfer_engine = lambda init_info: server.tell(0, "init", init_info)
        before = segments()
        with pytest.raises(WeightSyncError, match=r"^Worker 1 of the server at .* has not mapped"):
            new_transport(timeout_s=SHORT_S).open(server, layout)
        assert left_since(before) == set()


class TestGloo(ReportingTransportContract):
    engine = "trl_atropos.weight_sync.transports.gloo_engine:GlooEngine"

    @pytest.fixture
    def new_transport(self):
        return GlooTransport

    def test_it_listens_on_the_address_that_faces_the_server_only(self, transport, new_server, layout):
        server = new_server(1)
        transport.open(server, layout)
        init_info = json.loads(server.init_info)
        assert init_info["master_address"] == "127.0.0.1"
        assert init_info["master_port"] in listening_ports()
        # 127.0.0.2 is loopback, too: a socket on every address would answer there.
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", init_info["master_port"]), timeout=5)

    def test_a_port_that_is_taken_is_named_with_the_option(self, new_server, layout):
        with bind("127.0.0.1", 0) as taken:
            port = taken.getsockname()[1]
            transport = GlooTransport(SHORT_S, port=port)
            with pytest.raises(WeightSyncError) as caught:
                transport.open(new_server(1), layout)
        assert f"127.0.0.1 port {port}" in caught.value.what
        assert "--vllm_group_port" in caught.value.fix

    def test_a_failure_frees_the_port_while_its_error_is_kept(self, new_server, layout):
        with bind("127.0.0.1", 0) as probe:
            port = probe.getsockname()[1]
        transport = GlooTransport(DEADLINE_S, port=port)
        gone = new_server(2)
        gone.processes[0].kill()
        with pytest.raises(WeightSyncError) as caught:
            transport.open(gone, layout)
        # The worker that was left alone may come only now, to the same port: it is not taken for one of these.
        server = new_server(2)
        expected = fill(transport.open(server, layout), layout, seed=2)
        server.call("start")
        transport.send(layout.specs)
        assert server.received() == [expected] * 2
        assert caught.tb is not None
        transport.close()

    def test_a_server_that_never_answers_ends_the_rendezvous_in_time(self, new_server, layout):
        server = new_server(1)
        server.call = lambda command, *arguments: time.sleep(0.1)
        start = time.monotonic()
        with pytest.raises(WeightSyncTimeout, match=r"Workers \[0\] of 1 did not come"):
            GlooTransport(1.0).open(server, layout)
        assert time.monotonic() - start < 1.0 + SLACK_S

    def test_damage_of_one_chunk_on_the_way_to_one_worker_frees_everybody_at_once(self, new_server, layout):
        server = new_server(2)
        transport = GlooTransport(30.0, chunk_bytes=100)
        expected = fill(transport.open(server, layout), layout, seed=3)
        server.call("start")

        def damage(update_info: dict[str, Any]) -> None:
            # Every tensor is a chunk: none fits with its neighbour into 100 bytes.
            checksums = list(update_info["checksums"])
            checksums[1] += 1
            server.connections[0].send(("update", [update_info]))
            server.connections[1].send(("update", [{**update_info, "checksums": checksums}]))
            answers = [connection.recv() for connection in server.connections]
            assert [is_done for is_done, _ in answers] == [False, False]
            raise VLLMServerError("The server answers 500.", answers[1][1], "Look at its log.", 500, answers[1][1])

        server.update_weights = damage
        start = time.monotonic()
        with pytest.raises(VLLMServerError, match="checksum of chunk 1"):
            transport.send(layout.specs)
        assert time.monotonic() - start < SLACK_S
        # What came before the damage was loaded, nothing after it.
        assert server.received()[1] == {SPECS[0].name: expected[SPECS[0].name]}
        transport.close()


class TestGlooInManyChunks(ReportingTransportContract):
    engine = "trl_atropos.weight_sync.transports.gloo_engine:GlooEngine"

    @pytest.fixture
    def new_transport(self):
        return new_chunked_transport


class TestChunks:
    @given(st.lists(st.tuples(st.integers(0, 400), st.booleans()), max_size=12), st.integers(1, 1000))
    def test_every_tensor_once_in_order_and_adjacent(self, tensors, chunk_bytes):
        layout = PolicyLayout([TensorSpec(str(i), torch.uint8, (size,)) for i, (size, _) in enumerate(tensors)])
        specs = [spec for spec, (_, is_sent) in zip(layout.specs, tensors, strict=True) if is_sent]
        chunks = list(cut_chunks(layout, specs, chunk_bytes))
        assert [spec for chunk in chunks for spec in chunk.specs] == specs
        for chunk in chunks:
            offsets = [layout.offsets[spec.name] for spec in chunk.specs]
            ends = [offset + -(-spec.num_bytes // 64) * 64 for offset, spec in zip(offsets, chunk.specs, strict=True)]
            assert offsets[1:] == ends[:-1]
            assert (chunk.start, chunk.start + chunk.num_bytes) == (offsets[0], ends[-1])
            assert chunk.num_bytes <= chunk_bytes or len(chunk.specs) == 1

    def test_neighbours_share_a_chunk_up_to_its_size(self):
        # 128 bytes each
        layout = PolicyLayout([TensorSpec(name, torch.float32, (32,)) for name in "abcde"])
        sizes = [[spec.name for spec in chunk.specs] for chunk in cut_chunks(layout, layout.specs, 256)]
        assert sizes == [["a", "b"], ["c", "d"], ["e"]]


class TestWire:
    def test_checksum_adds_words_modulo_two_to_the_64(self):
        # -1 is 2**64 - 1 as a word; 3 + 2**64 - 1 = 2 (mod 2**64)
        assert checksum([torch.tensor([3, -1])]) == 2
        # The last bytes are padded: 0x0201 little-endian
        assert checksum([torch.tensor([1, 2], dtype=torch.uint8)]) == 0x0201
        assert checksum([torch.tensor(1.0), torch.zeros(0)]) == 0x3F800000

    @given(st.binary(min_size=1, max_size=40), st.data())
    def test_checksum_notices_every_single_bit(self, data, draw):
        bit = draw.draw(st.integers(0, 8 * len(data) - 1))
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        left, right = (checksum([torch.tensor(list(values), dtype=torch.uint8)]) for values in (data, flipped))
        assert left != right

    @pytest.mark.parametrize("payload", [b"", b"{", b"[]", b"{}", b'{"sequence": 1}', b"\xff\xfe"])
    def test_what_is_not_a_report_is_none(self, payload):
        assert WorkerReport.from_json(payload) is None

    def test_a_report_survives_its_way(self):
        report = WorkerReport(3, 2, 10, 2**64 - 1, 0.5)
        assert WorkerReport.from_json(report.to_json()) == report

    @pytest.mark.parametrize("offset", [-8, 8, 100])
    def test_a_tensor_outside_of_its_buffer_is_refused(self, offset):
        with pytest.raises(ValueError, match="does not lie in a buffer of 64 bytes"):
            view_tensor(torch.zeros(64, dtype=torch.uint8), offset, "float32", [4, 4])

    @pytest.mark.parametrize("name", ["nn", "float33", "__name__"])
    def test_what_is_not_a_dtype_is_refused(self, name):
        with pytest.raises(ValueError, match="is not a dtype"):
            view_tensor(torch.zeros(64, dtype=torch.uint8), 0, name, [1])


class TestRendezvous:
    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
    def test_loopback_faces_loopback(self, host):
        assert local_address_towards(host) in {"127.0.0.1", "::1"}

    def test_a_name_with_both_kinds_of_address_is_met_at_the_older(self, monkeypatch):
        found = socket.getaddrinfo
        rows = [*found("::1", 9, type=socket.SOCK_DGRAM), *found("127.0.0.1", 9, type=socket.SOCK_DGRAM)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: rows)
        assert local_address_towards("localhost") == "127.0.0.1"

    def test_an_unknown_host_is_named(self):
        with pytest.raises(WeightSyncError, match=r"no route to no-such-host\.invalid"):
            local_address_towards("no-such-host.invalid")

    def test_an_address_of_another_machine_cannot_be_bound(self):
        # TEST-NET-1, which no machine has.
        with pytest.raises(WeightSyncError) as caught:
            bind("192.0.2.1", 0)
        assert "--vllm_group_host" in caught.value.fix

    @pytest.mark.parametrize(
        ("url", "host"), [("http://a.example:8000/v1", "a.example"), ("https://[::1]:8000", "::1")]
    )
    def test_host_of_a_url(self, url, host):
        assert server_host(url) == host


class TestCollective:
    def run(self, function: Callable[[threading.Event], Any], request: Callable[[], None], **options: Any) -> Any:
        settings = {"timeout_s": 0.3, **options}
        return Collective("test broadcast", function, **settings).run_beside(request)

    def test_the_value_of_the_collective_is_returned(self):
        threads: list[threading.Thread] = []
        value = self.run(
            lambda _: threads.append(threading.current_thread()) or 3,
            lambda: threads.append(threading.current_thread()),
        )
        assert value == 3
        assert len(threads) == 2
        # The calling thread waits for both, open to Ctrl-C.
        assert all(thread.daemon for thread in threads)

    def test_the_error_of_the_request_wins(self):
        def request() -> None:
            raise VLLMServerError("The server answers 500.", "Why.", "Fix.")

        def collective(is_cancelled: threading.Event) -> None:
            raise RuntimeError("connection closed by peer")

        with pytest.raises(VLLMServerError, match="answers 500"):
            self.run(collective, request)

    def test_a_failed_request_cancels_the_collective(self):
        ended = threading.Event()

        def collective(is_cancelled: threading.Event) -> None:
            assert is_cancelled.wait(10)
            ended.set()
            raise Cancelled

        def request() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.run(collective, request, timeout_s=10.0)
        assert ended.is_set()

    def test_a_failed_request_ends_the_collective_from_outside(self):
        release = threading.Event()

        def request() -> None:
            raise VLLMServerError("The server answers 500.", "Why.", "Fix.")

        start = time.monotonic()
        with pytest.raises(VLLMServerError):
            self.run(lambda _: release.wait(30), request, timeout_s=20.0, end=release.set)
        assert time.monotonic() - start < SLACK_S

    def test_a_failed_request_does_not_wait_for_what_cannot_be_ended(self):
        release = threading.Event()

        def request() -> None:
            raise VLLMServerError("The server answers 500.", "Why.", "Fix.")

        start = time.monotonic()
        with pytest.raises(VLLMServerError):
            self.run(lambda _: release.wait(30), request, timeout_s=20.0, end_s=0.0)
        assert time.monotonic() - start < SLACK_S
        release.set()

    def test_a_collective_that_fails_does_not_wait_for_the_request(self):
        release = threading.Event()

        def collective(is_cancelled: threading.Event) -> None:
            raise ImportError("No module named 'vllm'")

        start = time.monotonic()
        with pytest.raises(WeightSyncError, match="test broadcast failed: ImportError: No module named 'vllm'"):
            self.run(collective, lambda: release.wait(30) and None, timeout_s=20.0)
        assert time.monotonic() - start < SAY_S + SLACK_S
        release.set()

    def test_the_request_may_say_why_the_collective_failed(self, caplog):
        def collective(is_cancelled: threading.Event) -> None:
            raise RuntimeError("connection closed by peer")

        def request() -> None:
            time.sleep(0.1)
            raise VLLMServerError("The server answers 500.", "Why.", "Fix.")

        with pytest.raises(VLLMServerError, match="answers 500"):
            self.run(collective, request)
        assert "ended with RuntimeError: connection closed by peer" in caplog.text

    def test_the_error_of_the_collective_has_three_sentences(self):
        def collective(is_cancelled: threading.Event) -> None:
            raise RuntimeError("connection closed by peer")

        with pytest.raises(WeightSyncError) as caught:
            self.run(collective, lambda: None)
        assert "RuntimeError: connection closed by peer" in caught.value.what
        assert isinstance(caught.value.__cause__, RuntimeError)

    def test_a_collective_that_goes_on_is_a_timeout(self):
        release = threading.Event()
        with pytest.raises(WeightSyncTimeout, match="still runs 0 s after every worker has answered"):
            self.run(lambda _: release.wait(30), lambda: None)
        release.set()


class FakeGroup:
    """A communicator, as far as closing it goes."""

    def __init__(self) -> None:
        self.group = self
        self.store: object | None = object()
        self.socket: object | None = object()
        self.is_destroyed = False

    def destroy(self) -> None:
        self.is_destroyed = True


class OffDevice(StandInTransport):
    """Without anybody on the other side."""

    def __init__(self, error: Exception | None = None, **options: Any):
        super().__init__(5.0, **options)
        self.error = error
        self.joined: dict[str, Any] = {}
        self.sent: list[str] = []

    def _join(self, init_info: dict[str, Any], listener: socket.socket) -> FakeGroup:
        listener.close()
        self.joined = init_info
        return FakeGroup()

    def _broadcast(self, specs: Any) -> None:
        if self.error is not None:
            raise self.error
        self.sent = [name for name, _ in self.tensors_on_device(specs)]


class StockServer:
    """What a stock server hears."""

    base_url = "http://127.0.0.1:1"

    def __init__(self, is_updating: bool = False):
        self.is_updating = is_updating
        self.calls: list[Any] = []

    def get_world_size(self) -> int:
        return 4

    def shutdown_weight_transfer_engine(self) -> None:
        self.calls.append("shutdown")
        if self.is_updating:
            raise VLLMServerError("The server answers 500.", "Why.", "Fix.", 500, "during a weight update")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append("finish")
        self.is_updating = False

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.calls.append("init")
        self.init_info = init_info

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.calls.append("update")
        self.update_info = update_info


class TestNcclOverGloo(TransportContract):
    """vLLM's own engine and ours, with gloo in the place of libnccl (nccl_stand_in.py)."""

    engine = "nccl_stand_in:StandInEngine"

    @pytest.fixture
    def new_transport(self):
        return StandInTransport


class TestNccl:
    """Everything but CUDA."""

    def test_a_cpu_is_refused_before_the_server_hears_of_it(self):
        server = StockServer()
        with pytest.raises(WeightSyncError) as caught:
            NcclTransport(torch.device("cpu")).open(server, PolicyLayout(SPECS))
        assert "trl_atropos_shm" in caught.value.fix
        assert server.calls == []

    def test_both_sides_join_with_what_vllm_asks_for(self):
        server, transport = StockServer(), OffDevice()
        transport.open(server, PolicyLayout(SPECS))
        assert server.init_info == transport.joined
        fields = set(inspect.signature(NCCLWeightTransferInitInfo).parameters)
        # The one that is left out is the other way to meet.
        assert fields - server.init_info.keys() == {"nccl_unique_id_b64"}
        info = NCCLWeightTransferInitInfo(**server.init_info)
        # Four workers behind rank 0
        assert (info.rank_offset, info.world_size, info.master_address) == (1, 5, "127.0.0.1")
        assert 0 < info.master_port < 2**16

    def test_a_given_port_and_address_are_used(self):
        with bind("127.0.0.2", 0) as probe:
            port = probe.getsockname()[1]
        server = StockServer()
        OffDevice(host="127.0.0.2", port=port).open(server, PolicyLayout(SPECS))
        assert (server.init_info["master_address"], server.init_info["master_port"]) == ("127.0.0.2", port)

    def test_the_trainer_before_is_disconnected_first(self):
        server = StockServer()
        OffDevice().open(server, PolicyLayout(SPECS))
        assert server.calls == ["shutdown", "init"]

    def test_an_update_that_was_left_open_is_ended_first(self):
        server = StockServer(is_updating=True)
        OffDevice().open(server, PolicyLayout(SPECS))
        assert server.calls == ["shutdown", "finish", "shutdown", "init"]

    def test_what_is_announced_is_what_is_sent(self):
        server, transport, layout = StockServer(), OffDevice(), PolicyLayout(SPECS)
        transport.open(server, layout)
        report = transport.send(layout.specs[1:])
        NCCLWeightTransferUpdateInfo(**server.update_info)
        assert server.update_info["names"] == transport.sent == [spec.name for spec in SPECS[1:]]
        assert report.num_bytes == sum(spec.num_bytes for spec in SPECS[1:])

    def test_larger_elements_come_first_where_the_own_order_would_cut_one(self):
        # 70 bytes of bfloat16, then float32: vLLM cannot view the second.
        assert [spec.dtype.itemsize for spec in SPECS] == [2, 4, 2, 4, 2]
        assert [spec.name for spec in in_packed_order(SPECS)] == [
            *("layers.0.bias", "layers.1.scale"),
            *("layers.0.weight", "layers.1.weight", "layers.2.weight"),
        ]
        assert in_packed_order(SPECS[1:]) == SPECS[1:]

    def test_an_error_of_the_broadcast_is_read(self):
        server, layout = StockServer(), PolicyLayout(SPECS)
        transport = OffDevice(error=RuntimeError("unhandled cuda error"))
        transport.open(server, layout)
        with pytest.raises(WeightSyncError, match="NCCL broadcast failed: RuntimeError: unhandled cuda error"):
            transport.send(layout.specs)

    @pytest.mark.parametrize("is_lost", [False, True])
    def test_a_gpu_that_is_lost_with_a_worker_is_named(self, monkeypatch, is_lost):
        class Stream:
            def query(self) -> bool:
                if is_lost:
                    raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore of it")
                return True

        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
        server, layout = StockServer(), PolicyLayout(SPECS)
        transport = OffDevice(error=RuntimeError("the communicator was aborted"))
        transport.open(server, layout)
        with pytest.raises(WeightSyncError, match="the communicator was aborted") as caught:
            transport.send(layout.specs)
        assert caught.value.is_final == is_lost
        if is_lost:
            assert (
                "cuda:0 was lost with it (CUDA error: an illegal memory access was encountered)" in caught.value.what
            )
            assert "--resume_from_checkpoint" in caught.value.fix

    def test_a_gpu_without_a_number_is_the_one_of_the_thread_that_asks(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        assert numbered(torch.device("cuda")) == torch.device("cuda:3")
        assert numbered(torch.device("cuda:1")) == torch.device("cuda:1")

    def test_closing_ends_the_communicator_and_lets_go_of_the_port(self):
        transport = OffDevice()
        transport.open(StockServer(), PolicyLayout(SPECS))
        group = transport._group
        transport.close()
        transport.close()
        assert group.is_destroyed
        assert (group.store, group.socket) == (None, None)

    def test_a_missing_library_is_named_before_the_server_hears_of_it(self, monkeypatch):
        def is_missing() -> None:
            raise OSError("libnccl.so.2: cannot open shared object file")

        server, transport = StockServer(), OffDevice()
        monkeypatch.setattr(pynccl_wrapper, "NCCLLibrary", is_missing)
        with pytest.raises(WeightSyncError, match=r"cannot use NCCL: OSError: libnccl\.so\.2") as caught:
            transport.open(server, PolicyLayout(SPECS))
        assert "VLLM_NCCL_SO_PATH" in caught.value.fix
        assert server.calls == []

    def test_a_communicator_that_has_switched_itself_off_is_an_error(self, monkeypatch):
        monkeypatch.setattr(GlooCommunicator, "disabled", True, raising=False)
        monkeypatch.setattr(
            GlooCommunicator, "__init__", lambda self, group, device: setattr(self, "available", False)
        )
        server = StockServer()
        server.get_world_size = lambda: 0
        with pytest.raises(WeightSyncError, match="communicator has switched itself off"):
            StandInTransport(5.0).open(server, PolicyLayout(SPECS))


class TestChoice:
    @pytest.mark.parametrize(
        ("backend", "device", "expected"),
        [
            ("trl_atropos_shm", "cpu", SharedMemoryTransport),
            ("trl_atropos_shm", "cuda", SharedMemoryTransport),
            ("trl_atropos_gloo", "cpu", GlooTransport),
            ("trl_atropos_gloo", "cuda", GlooTransport),
            ("nccl", "cuda", NcclTransport),
        ],
    )
    def test_backend_and_device_decide(self, backend, device, expected):
        assert type(make_transport(backend, StockServer(), torch.device(device), timeout_s=1.0)) is expected

    @pytest.mark.parametrize(("backend", "device"), [("nccl", "cpu"), ("ipc", "cuda"), (None, "cpu")])
    def test_a_backend_that_this_trainer_cannot_feed_names_those_that_it_can(self, backend, device):
        with pytest.raises(PreflightError) as caught:
            make_transport(backend, StockServer(), torch.device(device), timeout_s=1.0)
        assert f"over {backend!r}, the trainer runs on {device}" in caught.value.what
        assert all(name in caught.value.why for name in ("trl_atropos_shm", "trl_atropos_gloo", "nccl"))
        assert all(f"{row.name!r} ({row.reach})" in caught.value.why for row in BACKENDS)

    def test_address_port_and_deadline_are_passed_on(self):
        transport = make_transport(
            "trl_atropos_gloo", StockServer(), torch.device("cpu"), timeout_s=7.0, group_host="h", group_port=9
        )
        assert (transport.timeout_s, transport.host, transport.port) == (7.0, "h", 9)

    def test_vllm_finds_our_backends_and_a_second_registration_changes_nothing(self):
        for _ in range(2):
            plugin.register()
        engines = {backend.name: backend.engine for backend in BACKENDS if backend.engine is not None}
        assert engines.keys() == {"trl_atropos_shm", "trl_atropos_gloo"}
        for backend, (module, name) in engines.items():
            engine = WeightTransferEngineFactory._registry[backend]()
            assert (engine.__module__, engine.__name__) == (module, name)

    def test_the_plugin_of_vllm_loads_no_transport(self):
        code = (
            "import sys, trl_atropos.serving.plugin\n"
            "print(sorted({'torch', 'requests', 'vllm', 'transformers'} & set(sys.modules)))"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr
