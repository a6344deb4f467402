"""What every weight transport must do, as a class of tests.

To test a transport of your own, derive from it, name the vLLM engine on the other side, and give it a factory:

    class TestMyTransport(TransportContract):
        engine = "my_package.engine:MyEngine"

        @pytest.fixture
        def new_transport(self):
            return MyTransport

`new_transport(timeout_s=...)` must return an unopened transport and survive pickling. The engine runs in processes of
its own, with a stand-in model that keeps what it is given.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from trl_atropos.errors import VLLMServerError, VLLMServerUnreachable, WeightSyncError, WeightSyncTimeout
from trl_atropos.weight_sync.base import PolicyLayout, TensorSpec, WeightTransport


START_S = 120.0
DEADLINE_S = 60.0
"""Of a server's answer: far more than anything here takes."""

SHORT_S = 3.0
"""Timeout of a transport whose peer is not there."""

SLACK_S = 5.0
"""Two busy cores."""

SPECS = [
    TensorSpec("layers.0.weight", torch.bfloat16, (7, 5)),
    TensorSpec("layers.0.bias", torch.float32, (3,)),
    TensorSpec("layers.1.weight", torch.bfloat16, (64, 33)),
    TensorSpec("layers.1.scale", torch.float32, ()),
    TensorSpec("layers.2.weight", torch.float16, (2, 3, 4)),
]


class StandInModel(nn.Module):
    """Keeps the bytes of what is loaded, and can end or stop its process at the first tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.received: dict[str, bytes] = {}
        self.signal: int | None = None

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
        names = set()
        for name, tensor in weights:
            if self.signal is not None:
                os.kill(os.getpid(), self.signal)
            self.received[name] = to_bytes(tensor.clone())
            names.add(name)
        return names


class Worker:
    """One worker process: an engine and the commands it obeys."""

    def __init__(self, engine: str, rank: int, world_size: int):
        module, name = engine.split(":")
        # vLLM's own, which has every field that an engine may read of it.
        from vllm.config import ParallelConfig

        parallel = ParallelConfig(tensor_parallel_size=world_size, rank=rank, distributed_executor_backend="mp")
        config = SimpleNamespace(parallel_config=parallel, model_config=SimpleNamespace(dtype=torch.bfloat16))
        self.model = StandInModel()
        self.engine = getattr(importlib.import_module(module), name)(None, config, torch.device("cpu"), self.model)

    def init(self, info: dict[str, Any]) -> None:
        self.engine.init_transfer_engine(self.engine.parse_init_info(info))

    def start(self) -> None:
        self.engine.start_weight_update()

    def update(self, info: dict[str, Any]) -> None:
        self.engine.receive_weights(self.engine.parse_update_info(info))

    def finish(self) -> None:
        self.engine.finish_weight_update()

    def shutdown(self) -> None:
        self.engine.shutdown()

    def take_received(self) -> dict[str, bytes]:
        received, self.model.received = self.model.received, {}
        return received

    def signal_in_update(self, number: int) -> None:
        self.model.signal = number

    def misreport(self, changes: dict[str, Any] | None) -> None:
        """Have the reports say something else; None: say nothing."""
        from trl_atropos.weight_sync.transports.reports import WorkerReport

        def to_json(report: WorkerReport) -> bytes:
            return b"" if changes is None else json.dumps(asdict(report) | changes).encode()

        WorkerReport.to_json = to_json


def run_worker(connection: Connection, engine: str, rank: int, world_size: int) -> None:
    """Obey commands until the other side is gone."""
    torch.set_num_threads(1)
    worker = Worker(engine, rank, world_size)
    while True:
        try:
            command, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, getattr(worker, command)(*arguments))
        except Exception as exc:
            answer = (False, f"{type(exc).__name__}: {exc}")
        connection.send(answer)


context = multiprocessing.get_context("forkserver")
# Importing vLLM takes seconds, forking a process that has done so does not.
context.set_forkserver_preload(
    [
        "transport_contract",
        "trl_atropos.weight_sync.transports.gloo_engine",
        "trl_atropos.weight_sync.transports.shm_engine",
    ]
)


class Server:
    """The client's side of worker processes.

    Args:
        connections (`list[Connection]`):
            To the workers.

    Attributes:
        refusal (`Exception`, *optional*):
            Raised in the place of the next update, which no worker hears of.
        init_info (`str`):
            What the trainer told the workers last.
    """

    base_url = "http://127.0.0.1:1"

    def __init__(self, connections: list[Connection]):
        self.connections = connections
        self.processes: list[Any] = []
        self.refusal: Exception | None = None
        self.init_info = ""
        self.timeout_s = DEADLINE_S

    @classmethod
    def start(cls, engine: str, num_workers: int) -> Server:
        """Start worker processes with an engine, `"module:Class"`."""
        server = cls([])
        for rank in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=run_worker, args=(theirs, engine, rank, num_workers), daemon=True)
            process.start()
            theirs.close()
            server.connections.append(ours)
            server.processes.append(process)
        return server

    # The client's side

    def get_world_size(self) -> int:
        return len(self.connections)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.init_info = json.dumps(init_info)
        self.call("init", json.loads(self.init_info))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.call("update", json.loads(json.dumps(update_info)))

    def shutdown_weight_transfer_engine(self) -> None:
        self.call("shutdown")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.call("finish")

    def get_weight_version(self) -> str:
        """Whether it is there."""
        for worker, process in enumerate(self.processes):
            if not process.is_alive():
                raise VLLMServerUnreachable(f"Worker {worker} is gone.", "It ended.", "Restart it.")
        return "0"

    # The workers' side

    def call(self, command: str, *arguments: Any) -> list[Any]:
        """Have every worker obey, as vLLM's collective RPC does."""
        return self._ask(range(len(self.connections)), command, *arguments)

    def tell(self, worker: int, command: str, *arguments: Any) -> Any:
        """Have one worker obey."""
        return self._ask([worker], command, *arguments)[0]

    def received(self) -> list[dict[str, bytes]]:
        """What each worker has loaded since the last call."""
        return self.call("take_received")

    def _ask(self, workers: Sequence[int], command: str, *arguments: Any) -> list[Any]:
        for worker in workers:
            try:
                self.connections[worker].send((command, arguments))
            except BrokenPipeError as exc:
                raise VLLMServerUnreachable(f"Worker {worker} is gone.", "It ended.", "Restart it.") from exc
        deadline = time.monotonic() + self.timeout_s
        answers: dict[int, Any] = {}
        while len(answers) < len(workers):
            pending = [self.connections[worker] for worker in workers if worker not in answers]
            ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise WeightSyncTimeout("The workers do not answer.", "They are stopped.", "Restart them.")
            for connection in ready:
                worker = self.connections.index(connection)
                try:
                    is_done, value = connection.recv()
                except (EOFError, ConnectionResetError) as exc:
                    raise VLLMServerUnreachable(f"Worker {worker} ended.", "It was killed.", "Restart it.") from exc
                if not is_done:
                    raise VLLMServerError("The server answers 500.", value, "Look at its log.", 500, value)
                answers[worker] = value
        return [answers[worker] for worker in workers]

    def end(self) -> None:
        """Leave no process."""
        for process in self.processes:
            process.kill()
            process.join()
        for connection in self.connections:
            connection.close()


def to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def fill(memory: torch.Tensor, layout: PolicyLayout, seed: int) -> dict[str, bytes]:
    """Stage random bytes, NaNs included, and return them by name."""
    generator = torch.Generator().manual_seed(seed)
    for spec in layout.specs:
        start = layout.offsets[spec.name]
        memory[start : start + spec.num_bytes] = torch.randint(
            0, 256, (spec.num_bytes,), dtype=torch.uint8, generator=generator
        )
    return staged(memory, layout, layout.specs)


def staged(memory: torch.Tensor, layout: PolicyLayout, specs: Sequence[TensorSpec]) -> dict[str, bytes]:
    return {spec.name: to_bytes(layout.view(memory, spec)) for spec in specs}


def shared_memory_of(server: Server) -> list[str]:
    """Files in shared memory that a trainer has told a server of."""
    return [path.name for path in Path("/dev/shm").iterdir() if path.name in server.init_info]


def listening_ports() -> set[int]:
    """Ports on which this process listens."""
    inodes = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            inodes.add(os.readlink(descriptor))
        except FileNotFoundError:
            # The one that lists the directory.
            continue
    ports = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            is_listening = fields[3] == "0A"
            if is_listening and f"socket:[{fields[9]}]" in inodes:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def publish_and_die(
    report: Connection, connections: list[Connection], new_transport: Callable[..., WeightTransport]
) -> None:
    """A trainer that is killed after a transfer, with the update open."""
    server = Server(connections)
    layout = PolicyLayout(SPECS)
    transport = new_transport(timeout_s=DEADLINE_S)
    fill(transport.open(server, layout), layout, 0)
    server.call("start")
    transport.send(layout.specs)
    report.send((listening_ports(), server.init_info))
    os.kill(os.getpid(), signal.SIGKILL)


class TransportContract:
    """See the module."""

    engine: str
    """Module and class of the vLLM engine, `"module:Class"`."""

    @pytest.fixture
    def new_transport(self) -> Callable[..., WeightTransport]:
        """Makes an unopened transport: `new_transport(timeout_s=...)`."""
        raise NotImplementedError

    @pytest.fixture
    def new_server(self) -> Iterator[Callable[[int], Server]]:
        servers: list[Server] = []

        def new(num_workers: int) -> Server:
            servers.append(Server.start(self.engine, num_workers))
            return servers[-1]

        yield new
        assert [name for server in servers for name in shared_memory_of(server)] == []
        for server in servers:
            server.end()

    @pytest.fixture(autouse=True)
    def leaves_no_thread(self) -> Iterator[None]:
        before = set(threading.enumerate())
        yield
        assert set(threading.enumerate()) <= before

    @pytest.fixture
    def layout(self) -> PolicyLayout:
        return PolicyLayout(SPECS)

    @pytest.fixture
    def transport(self, new_transport) -> Iterator[WeightTransport]:
        transport = new_transport(timeout_s=DEADLINE_S)
        yield transport
        transport.close()

    @pytest.mark.parametrize("num_workers", [1, 2])
    def test_every_worker_receives_every_tensor_bit_for_bit(self, transport, new_server, layout, num_workers):
        server = new_server(num_workers)
        memory = transport.open(server, layout)
        expected = fill(memory, layout, seed=1)
        server.call("start")
        report = transport.send(layout.specs)
        server.call("finish")
        assert server.received() == [expected] * num_workers
        # 7*5*2 + 3*4 + 64*33*2 + 4 + 2*3*4*2
        assert report.num_bytes == 70 + 12 + 4224 + 4 + 48
        assert 0.0 <= report.load_s < DEADLINE_S

    def test_memory_is_flat_host_memory_of_the_layout(self, transport, new_server, layout):
        memory = transport.open(new_server(1), layout)
        assert (memory.dtype, memory.device.type, memory.shape) == (torch.uint8, "cpu", (layout.num_bytes,))

    def test_content_is_kept_between_sends(self, transport, new_server, layout):
        server = new_server(1)
        memory = transport.open(server, layout)
        expected = fill(memory, layout, seed=2)
        for _ in range(2):
            server.call("start")
            transport.send(layout.specs)
            server.call("finish")
            assert server.received() == [expected]
        assert staged(memory, layout, layout.specs) == expected

    @pytest.mark.parametrize("indices", [(0, 1), (2, 3), (0, 1, 4)], ids=["first", "middle", "with_a_gap"])
    def test_a_partial_send_moves_only_its_tensors(self, transport, new_server, layout, indices):
        server = new_server(2)
        memory = transport.open(server, layout)
        fill(memory, layout, seed=3)
        server.call("start")
        transport.send(layout.specs)
        server.call("finish")
        server.received()
        fill(memory, layout, seed=4)
        specs = [layout.specs[index] for index in indices]
        server.call("start")
        report = transport.send(specs)
        server.call("finish")
        assert server.received() == [staged(memory, layout, specs)] * 2
        assert report.num_bytes == sum(spec.num_bytes for spec in specs)

    def test_an_error_of_the_server_ends_the_send(self, transport, new_server, layout):
        server = new_server(2)
        fill(transport.open(server, layout), layout, seed=7)
        server.call("start")
        server.refusal = VLLMServerError("The server answers 500.", "A test.", "None.", 500, "a test")
        start = time.monotonic()
        with pytest.raises(VLLMServerError, match="answers 500"):
            transport.send(layout.specs)
        # No thread is left: see the fixture.
        assert time.monotonic() - start < SLACK_S

    def test_opening_again_after_a_failure_serves_the_same_server(self, transport, new_server, layout):
        server = new_server(2)
        fill(transport.open(server, layout), layout, seed=8)
        server.call("start")
        server.refusal = VLLMServerError("The server answers 500.", "A test.", "None.", 500, "a test")
        with pytest.raises(VLLMServerError):
            transport.send(layout.specs)
        server.refusal = None
        expected = fill(transport.open(server, layout), layout, seed=9)
        server.call("start")
        transport.send(layout.specs)
        server.call("finish")
        assert server.received() == [expected] * 2

    def test_opening_again_serves_a_server_that_was_restarted(self, transport, new_server, layout):
        fill(transport.open(new_server(1), layout), layout, seed=10)
        restarted = new_server(2)
        expected = fill(transport.open(restarted, layout), layout, seed=11)
        restarted.call("start")
        transport.send(layout.specs)
        assert restarted.received() == [expected] * 2

    def test_a_server_that_is_gone_leaves_a_transport_for_the_next(self, transport, new_server, layout):
        server = new_server(1)
        gone = new_server(1)
        gone.processes[0].kill()
        with pytest.raises(WeightSyncError):
            transport.open(gone, layout)
        expected = fill(transport.open(server, layout), layout, seed=12)
        server.call("start")
        transport.send(layout.specs)
        assert server.received() == [expected]

    def test_closing_twice_and_before_opening_is_fine(self, transport, new_server, layout):
        transport.close()
        transport.open(new_server(1), layout)
        transport.close()
        transport.close()
        with pytest.raises(RuntimeError, match="not open"):
            transport.send(layout.specs)

    def test_sending_before_opening_is_refused(self, transport, layout):
        with pytest.raises(RuntimeError, match="not open"):
            transport.send(layout.specs)

    def test_what_was_staged_is_readable_after_closing(self, transport, new_server, layout):
        memory = transport.open(new_server(1), layout)
        expected = fill(memory, layout, seed=13)
        transport.close()
        gc.collect()
        assert staged(memory, layout, layout.specs) == expected

    def test_an_open_transport_has_no_name_and_a_closed_one_no_port(self, transport, new_server, layout):
        before = listening_ports()
        server = new_server(1)
        transport.open(server, layout)
        assert server.init_info
        assert shared_memory_of(server) == []
        transport.close()
        assert listening_ports() == before

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
    @pytest.mark.parametrize("num_workers", [1, 2])
    def test_a_worker_that_ends_in_the_transfer_ends_the_send(
        self, new_transport, new_server, layout, number, num_workers
    ):
        transport = new_transport(timeout_s=SHORT_S)
        server = new_server(num_workers)
        fill(transport.open(server, layout), layout, seed=14)
        server.call("start")
        server.tell(num_workers - 1, "signal_in_update", number)
        server.timeout_s = SHORT_S
        start = time.monotonic()
        with pytest.raises(WeightSyncError):
            transport.send(layout.specs)
        assert time.monotonic() - start < 2 * SHORT_S + SLACK_S
        transport.close()

    def test_a_killed_trainer_leaves_no_name_and_no_port_and_another_takes_over(
        self, transport, new_transport, new_server, layout
    ):
        server = new_server(2)
        ours, theirs = context.Pipe()
        trainer = context.Process(target=publish_and_die, args=(theirs, server.connections, new_transport))
        trainer.start()
        # It imports everything first, beside other test processes.
        assert ours.poll(START_S)
        ports, server.init_info = ours.recv()
        trainer.join(DEADLINE_S)
        assert trainer.exitcode == -signal.SIGKILL
        assert shared_memory_of(server) == []
        for port in ports:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
        server.received()
        expected = fill(transport.open(server, layout), layout, seed=17)
        transport.send(layout.specs)
        server.call("finish")
        assert server.received() == [expected] * 2

    def test_two_transports_at_once_do_not_mix(self, new_transport, new_server, layout):
        pairs = [(new_transport(timeout_s=DEADLINE_S), new_server(1)) for _ in range(2)]
        expected = [
            fill(transport.open(server, layout), layout, seed=15 + index)
            for index, (transport, server) in enumerate(pairs)
        ]
        assert expected[0] != expected[1]
        for transport, server in pairs:
            server.call("start")
            transport.send(layout.specs)
        assert [server.received()[0] for _, server in pairs] == expected
        for transport, _ in pairs:
            transport.close()


class ReportingTransportContract(TransportContract):
    """Of transports whose workers report what they have loaded."""

    def test_a_report_has_checksums(self, transport, new_server, layout):
        server = new_server(1)
        fill(transport.open(server, layout), layout, seed=18)
        server.call("start")
        assert transport.send(layout.specs).has_checksums

    @pytest.mark.parametrize("num_workers", [1, 2])
    def test_a_policy_is_built_beside_the_one_that_is_served(self, transport, new_server, layout, num_workers):
        server = new_server(num_workers)
        memory = transport.open(server, layout)
        assert transport.can_build
        for seed in (23, 24):
            expected = fill(memory, layout, seed)
            server.call("start")
            report = transport.build(layout.specs)
            assert report.has_checksums
            assert report.num_bytes == sum(spec.num_bytes for spec in layout.specs)
            server.call("finish")
            assert server.received() == [expected] * num_workers

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
    def test_a_worker_that_ends_while_it_builds_ends_the_build(self, new_transport, new_server, layout, number):
        transport = new_transport(timeout_s=SHORT_S)
        server = new_server(2)
        fill(transport.open(server, layout), layout, seed=25)
        server.call("start")
        server.tell(1, "signal_in_update", number)
        server.timeout_s = SHORT_S
        start = time.monotonic()
        with pytest.raises(WeightSyncError):
            transport.build(layout.specs)
        assert time.monotonic() - start < 2 * SHORT_S + SLACK_S
        transport.close()

    def test_a_build_that_fails_is_told_and_the_next_is_taken(self, transport, new_server, layout):
        server = new_server(1)
        memory = transport.open(server, layout)
        fill(memory, layout, seed=26)
        transport.prepare(layout.specs)
        expected = fill(memory, layout, seed=27)
        server.call("start")
        with pytest.raises(WeightSyncError, match=r"^Worker 0 could not load the policy: RuntimeError: The checksum"):
            transport.build(layout.specs)
        with pytest.raises(VLLMServerError, match="could not be built beside the served one"):
            server.call("finish")
        server.received()
        fill(transport.open(server, layout), layout, seed=27)
        server.call("start")
        transport.build(layout.specs)
        server.call("finish")
        assert server.received() == [expected]

    def test_what_was_prepared_holds_for_one_transfer(self, transport, new_server, layout):
        server = new_server(1)
        memory = transport.open(server, layout)
        for seed in (21, 22):
            # What is staged after it has another checksum.
            expected = fill(memory, layout, seed)
            if seed == 21:
                transport.prepare(layout.specs)
            server.call("start")
            assert transport.send(layout.specs).has_checksums
            server.call("finish")
            assert server.received() == [expected]

    @pytest.mark.parametrize(
        "changes",
        [None, {"sequence": 7}, {"num_tensors": 4}, {"num_bytes": 1}, {"checksum": 0}],
        ids=["nothing", "another_transfer", "a_tensor_short", "bytes_short", "other_bytes"],
    )
    def test_a_worker_that_reports_anything_else_is_named(self, new_transport, new_server, layout, changes):
        server = new_server(2)
        transport = new_transport(timeout_s=SHORT_S)
        fill(transport.open(server, layout), layout, seed=5)
        server.tell(1, "misreport", changes)
        server.call("start")
        with pytest.raises(WeightSyncError, match=r"^Worker 1 reports"):
            transport.send(layout.specs)
        transport.close()

    def test_the_report_of_the_last_transfer_does_not_pass_for_the_next(self, new_transport, new_server, layout):
        server = new_server(1)
        transport = new_transport(timeout_s=SHORT_S)
        fill(transport.open(server, layout), layout, seed=6)
        server.call("start")
        transport.send(layout.specs)
        server.tell(0, "misreport", {"sequence": 1})
        server.call("start")
        with pytest.raises(WeightSyncError, match="Worker 0 reports"):
            transport.send(layout.specs)
        transport.close()
