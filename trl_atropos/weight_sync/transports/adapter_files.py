"""How an adapter travels: through a directory that trainer and server see, under a new name every time.

save          the adapter as a directory, complete from the moment that it has its name
load          the server reads it, routes requests for the model to it, and calls itself by the version
discard_old   adapters that no request uses any more are forgotten by the server and removed

A new name, because vLLM keeps the prefix cache by name. Nothing pauses: a request ends with the adapter that it began with.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safetensors.torch import save_file

from ...errors import PreflightError, VLLMServerError, WeightSyncError
from ..weights.adapter import Adapter, AdapterNeeds
from .backends import MIDDLEWARE


if TYPE_CHECKING:
    from ..inference_server import InferenceServer


logger = logging.getLogger(__name__)

NAME_PREFIX = "trl_atropos-"
"""The names of all adapters that we load begin with it."""

WEIGHTS_FILE = "adapter_model.safetensors"

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for --max-lora-rank."""


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter that was written and can be loaded.

    `name` is that under which servers load it, `path` its directory, and `policy_version` the number of the policy
    that the model makes with it. `num_bytes` is the size of its files, and `write_s` the seconds that writing them
    took.
    """

    name: str
    path: Path
    policy_version: int
    num_bytes: int
    write_s: float


class VLLMSettings(Protocol):
    """What the check asks of a vLLM client, beside its routing."""

    base_url: str

    def get_server_info(self) -> dict[str, Any]:
        """Return the resolved `VllmConfig`."""
        ...

    def get_server_environment(self) -> dict[str, Any]:
        """Return the `VLLM_*` settings."""
        ...

    def get_adapter_route(self) -> Mapping[str, Any]:
        """Return what the middleware says of its routing."""
        ...


def check_server(client: VLLMSettings, needs: AdapterNeeds, *, keep: int = 2) -> None:
    """Refuse a server that cannot load adapters of this trainer.

    `needs` is what [`~weight_sync.weights.adapter.check_adapter`] found. `keep` is the number of adapters that serve
    at a time: that of the newest policy and those of the policies before it.

    Raises:
        [`PreflightError`]: naming the option of the server.
    """
    info = client.get_server_info()
    where = f"The vLLM server at {client.base_url}"
    for what, why in _obstacles(info, client.get_server_environment(), needs, keep):
        modules = " ".join(sorted(needs.modules))
        raise PreflightError(
            f"{where} {what}.",
            why,
            f"Start it with --enable-lora --max-lora-rank {_lora_rank(needs.rank)} --max-loras {keep} --lora-target-modules "
            f"{modules} and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment, or set --weight_sync_mode merged.",
        )
    try:
        routed_adapter(client)
    except VLLMServerError as exc:
        if exc.status_code != 404:
            raise
        raise PreflightError(
            f"{where} cannot route requests to an adapter.",
            "Environments name the model, and would be answered by the starting checkpoint for ever.",
            f"Start it with --middleware {MIDDLEWARE}.",
        ) from exc


def _obstacles(
    info: dict[str, Any], environment: dict[str, Any], needs: AdapterNeeds, keep: int
) -> Iterator[tuple[str, str]]:
    lora = info["lora_config"]
    if lora is None:
        yield "runs without LoRA", "It cannot load an adapter."
        return
    if lora["max_lora_rank"] < needs.rank:
        yield (
            f"takes LoRA ranks up to {lora['max_lora_rank']}, the adapter has {needs.rank}",
            "vLLM refuses a larger one.",
        )
    if lora["max_loras"] < keep:
        why = "New requests would wait for the end of all that began before a publish."
        yield f"runs up to {lora['max_loras']} adapters at a time", why
    targets = lora.get("target_modules")
    if (targets is None or "lm_head" in targets) and info["device_config"]["device_type"] == "cpu":
        # vLLM 0.32's LogitsProcessorWithLoRA takes one adapter per request, and prompt logprobs have a row per token.
        # Other backends add an adapter to the wrong rows, and none of ours changes the head.
        yield "runs LoRA on the output head, too", "On a CPU its engine ends of the first request for prompt logprobs."
    if targets is not None and not needs.modules <= set(targets):
        left_out = ", ".join(sorted(needs.modules - set(targets)))
        yield f"runs no LoRA on {left_out}", "It would leave that part of the adapter out without a word."
    if not environment.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        yield "does not load adapters while it runs", "Each policy is an adapter of its own."
    parallel = info["parallel_config"]
    num_replicas, num_frontends = parallel["data_parallel_size"], parallel.get("_api_process_count", 1)
    if num_replicas > 1 or num_frontends > 1:
        yield (
            f"has {num_replicas} data-parallel replicas and {num_frontends} API processes",
            "An adapter reaches only the one that answers.",
        )


def _lora_rank(rank: int) -> int:
    return next((allowed for allowed in LORA_RANKS if allowed >= rank), rank)


@dataclass(frozen=True)
class RoutedAdapter:
    """What our middleware answers about its routing.

    `name` is the adapter that answers for the model, None for the model itself. `policy_version` is the version of
    that, None if nothing was routed yet. `num_in_flight` counts the requests that use each adapter now.
    """

    name: str | None
    policy_version: int | None
    num_in_flight: dict[str, int]


def routed_adapter(client: InferenceServer | VLLMSettings) -> RoutedAdapter:
    """Ask a server which adapter answers for the model, and which ones are in use."""
    answer = client.get_adapter_route()
    counts = answer["num_in_flight"]
    return RoutedAdapter(answer.get("lora_name"), answer.get("policy_version"), counts)


class AdapterTransfer:
    """Brings adapters onto servers. Methods of different servers may run in threads beside each other.

    `clients` are all servers that read from `directory`, which belongs to this run alone and is made if it does not
    exist. Every server must see it under the same path and run as the trainer's user: adapters are not readable for
    others. `keep` is the number of adapters that stay loaded: that of the newest policy and those of the policies
    before it.
    """

    def __init__(self, clients: Sequence[InferenceServer], directory: Path, *, keep: int = 2):
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._run = secrets.token_hex(4)
        self._saved: list[str] = []
        # What each server named the last two times that it was asked, by URL.
        self._named: dict[str, list[set[str]]] = {client.base_url: [] for client in clients}
        self._lock = threading.Lock()

    def save(self, adapter: Adapter, policy_version: int) -> SavedAdapter:
        """Write the adapter of a policy as a directory of its own."""
        start = time.perf_counter()
        name = f"{NAME_PREFIX}{self._run}-{policy_version}-{len(self._saved)}"
        self._saved.append(name)
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Private to the user; renamed when it is complete.
        unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=self.directory))
        try:
            save_file(adapter.tensors, unfinished / WEIGHTS_FILE)
            adapter.config.save_pretrained(str(unfinished))
            for file in unfinished.iterdir():
                file.chmod(0o600)
            num_bytes = sum(file.stat().st_size for file in unfinished.iterdir())
            path = self.directory / name
            os.rename(unfinished, path)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        return SavedAdapter(name, path, policy_version, num_bytes, time.perf_counter() - start)

    def load(self, client: InferenceServer, saved: SavedAdapter) -> dict[str, float]:
        """Have a server serve an adapter that was saved. May be called again after a failure.

        Returns the seconds of `"load"` (the server reads the adapter) and `"finish"` (it routes requests to it and
        takes the version's name).

        Raises:
            [`WeightSyncError`]: if the server cannot read it, or refuses it.
        """
        start = time.perf_counter()
        if saved.name not in client.list_models():
            try:
                client.load_lora_adapter(saved.name, str(saved.path))
            except VLLMServerError as exc:
                raise _load_error(client, saved, exc) from exc
        loaded = time.perf_counter()
        client.route_adapter(saved.name, saved.policy_version)
        client.set_weight_version(str(saved.policy_version))
        return {"load": loaded - start, "finish": time.perf_counter() - loaded}

    def discard_old(self, client: InferenceServer) -> list[str]:
        """Have a server forget our adapters but the newest, and remove what no server reads any more.

        An adapter that a request still uses stays until a later call, and its files until the one after that. What an
        earlier run left behind is old, too. Returns the names that the server forgot.
        """
        forgotten = []
        state = routed_adapter(client)
        in_use = {*self._saved[-self.keep :], *state.num_in_flight, state.name}
        for name in client.list_models():
            if name.startswith(NAME_PREFIX) and name not in in_use:
                client.unload_lora_adapter(name)
                forgotten.append(name)
        # Asked after the server forgot them: from then on no request can begin with one.
        named = {*client.list_models(), *routed_adapter(client).num_in_flight}
        with self._lock:
            self._named[client.base_url] = [*self._named[client.base_url][-1:], named]
            self._remove_unused()
        return forgotten

    def _remove_unused(self) -> None:
        # Twice, because an engine may run a request whose client is gone for another step, and ends if it has to read an
        # adapter that is not there.
        if any(len(named) < 2 for named in self._named.values()):
            return
        in_use = set(self._saved[-self.keep :]).union(*(names for named in self._named.values() for names in named))
        for path in self.directory.iterdir():
            if path.name.lstrip(".").startswith(NAME_PREFIX) and path.name not in in_use:
                shutil.rmtree(path)


def _load_error(client: InferenceServer, saved: SavedAdapter, exc: VLLMServerError) -> WeightSyncError:
    if exc.status_code == 404 and saved.name in exc.detail:
        return WeightSyncError(
            f"The vLLM server at {client.base_url} does not find the adapter in {saved.path}.",
            "It serves the previous policy.",
            "Set --weight_sync_adapter_dir to a directory that it sees under the same path as the trainer, and run both as "
            "the same user.",
        )
    return exc
