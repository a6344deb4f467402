"""What a vLLM server answers on its control routes, and the state behind them: the calm half of `scripted_server`."""

from __future__ import annotations

import copy
import mmap
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from trl_atropos.weight_sync.transports.reports import WorkerReport, checksum
from trl_atropos.weight_sync.transports.shm_segment import REPORT_BYTES, segment_path


MAX_WAIT_S = 60.0
"""No handler outlives its test by more."""

GENERATION_ROUTES = {"POST /v1/completions", "POST /v1/chat/completions", "POST /generate"}


class Request(NamedTuple):
    """What arrived."""

    route: str
    query: dict[str, list[str]]
    body: Any
    headers: dict[str, str]


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class WorkerError(Refusal):
    """A worker of the engine refuses."""

    def __init__(self, message: str):
        super().__init__(
            500,
            f"Call to collective_rpc method failed: Worker failed with error '{message}', please check the stack trace "
            "above for the root cause",
        )


UNKNOWN_ROUTE = b'{"detail":"Not Found"}'


class Segment:
    """Receives a policy through shared memory, as the worker of `trl_atropos_shm` does."""

    def __init__(self, init_info: dict[str, Any], why_not_beside: str):
        self.data_bytes = init_info["data_bytes"]
        with open(segment_path(init_info["segment"]), "r+b") as file:
            self.mapping = mmap.mmap(file.fileno(), 0)
        self.report(WorkerReport(0, num_tensors=0, num_bytes=0, checksum=0, why_not_beside=why_not_beside))

    def load(self, update: dict[str, Any], model: torch.nn.Module) -> None:
        """Copy what the update names into the model, and report it."""
        parameters = dict(model.named_parameters())
        received = []
        fields = (update[key] for key in ("names", "dtype_names", "shapes", "offsets"))
        for name, dtype_name, shape, offset in zip(*fields, strict=True):
            dtype = getattr(torch, dtype_name)
            size = torch.Size(shape).numel() * dtype.itemsize
            received.append(torch.frombuffer(bytearray(self.mapping[offset : offset + size]), dtype=dtype).view(shape))
            parameters[name].data.copy_(received[-1])
        num_bytes = sum(tensor.nbytes for tensor in received)
        self.report(WorkerReport(update["sequence"], len(received), num_bytes, checksum(received)))

    def report(self, report: WorkerReport) -> None:
        """Leave a report in the slot of the only worker."""
        self.mapping[self.data_bytes : self.data_bytes + REPORT_BYTES] = report.to_json().ljust(REPORT_BYTES, b"\0")


@dataclass
class State:
    """What a process of the server knows, and forgets when it dies."""

    weight_version: str = "default"
    is_paused: bool = False
    is_updating: bool = False
    is_torn: bool = False
    is_initialised: bool = False
    asleep: set[str] = field(default_factory=set)
    adapters: dict[str, str] = field(default_factory=dict)
    routed_adapter: str | None = None
    segment: Segment | None = None
    unsent: set[str] = field(default_factory=set)
    next_model: torch.nn.Module | None = None


class ScriptedRoutes:
    """The routes. See [`~scripted_server.ScriptedServer`]."""

    def __init__(self, model: torch.nn.Module | None = None):
        self.model = model
        # Of its worker; empty: it loads a policy beside the served one.
        self.why_not_beside = "it holds its weights as a script does"
        self.offences: list[str] = []
        self.segment_names: set[str] = set()
        self.state = State()
        self.config: dict[str, Any] = {
            "model_config": {
                "dtype": "torch.bfloat16",
                "model": "policy",
                "max_model_len": 256,
                "logprobs_mode": "processed_logprobs",
            },
            "weight_transfer_config": {"backend": "trl_atropos_shm"},
            "lora_config": None,
            "parallel_config": {"data_parallel_size": 1, "tensor_parallel_size": 1},
        }
        self.environment: dict[str, Any] = {"VLLM_SERVER_DEV_MODE": True, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": False}
        self.load: Callable[[dict[str, Any]], None] = self._load
        self.ended = threading.Event()
        self._checkpoint = copy.deepcopy(model.state_dict()) if model is not None else {}
        self._changed = threading.Condition(threading.RLock())

    def answer(self, request: Request) -> Any:
        """What vLLM answers: JSON, or a line of text.

        Raises:
            [`Refusal`]: where it answers with an error.
        """
        method, _, path = request.route.partition(" ")
        handler = getattr(self, f"{method.lower()}_{path.strip('/').replace('/', '_')}", None)
        if handler is None:
            return UNKNOWN_ROUTE
        if request.route in GENERATION_ROUTES:
            self._wait_for_weights(request.route)
        with self._changed:
            try:
                return handler(request)
            except KeyError as exc:
                raise Refusal(400, f"Field required: {exc}") from exc
            finally:
                self._changed.notify_all()

    def _wait_for_weights(self, route: str) -> None:
        with self._changed:
            if self.state.is_torn and not self.state.is_paused:
                self.offences.append(f"{route} while the model has no weights")
                raise Refusal(500, "EngineCore encountered an issue. See stack trace (above) for the root cause.")
            self._changed.wait_for(lambda: not self.state.is_paused or self.ended.is_set(), MAX_WAIT_S)

    def get_health(self, request: Request) -> Any:
        return {}

    def get_version(self, request: Request) -> Any:
        return {"version": "0.32.0"}

    def get_v1_models(self, request: Request) -> Any:
        return {"data": [{"id": name} for name in ("policy", *self.state.adapters)]}

    def get_get_world_size(self, request: Request) -> Any:
        return {"world_size": 1}

    def get_server_info(self, request: Request) -> Any:
        return {"vllm_config": self.config, "vllm_env": self.environment, "system_env": {}}

    def post_pause(self, request: Request) -> Any:
        self.state.is_paused = True
        return {"status": "paused"}

    def post_resume(self, request: Request) -> Any:
        if self.state.asleep:
            self.offences.append("POST /resume while asleep")
        self.state.is_paused = False
        if self.state.is_torn:
            self.offences.append("POST /resume while the model has no weights")
        return {"status": "resumed"}

    def get_is_paused(self, request: Request) -> Any:
        return {"is_paused": self.state.is_paused}

    def post_reset_prefix_cache(self, request: Request) -> Any:
        return {"success": True}

    def post_sleep(self, request: Request) -> Any:
        self.state.is_paused = True
        if int(request.query["level"][0]) > 0:
            self.state.asleep = {"weights", "kv_cache"}
        return {"status": "sleeping"}

    def post_wake_up(self, request: Request) -> Any:
        self.state.asleep -= set(request.query.get("tags") or self.state.asleep)
        # So does vLLM: what is awake, runs.
        if not self.state.asleep:
            self.state.is_paused = False
        return {"status": "sleeping" if self.state.asleep else "awake"}

    def get_is_sleeping(self, request: Request) -> Any:
        return {"is_sleeping": bool(self.state.asleep) or self.state.is_paused}

    def post_init_weight_transfer_engine(self, request: Request) -> Any:
        init_info = request.body["init_info"]
        self.segment_names.add(init_info.get("segment", ""))
        self.state.segment = Segment(init_info, self.why_not_beside) if "segment" in init_info else None
        self.state.is_initialised = True
        self.state.next_model = None
        return {"message": "Weight transfer initialized"}

    def post_shutdown_weight_transfer_engine(self, request: Request) -> Any:
        if self.state.is_updating:
            raise WorkerError("Cannot release a trainer connection during a weight update")
        self.state.segment = None
        self.state.is_initialised = False
        return {"message": "Weight transfer shut down"}

    def post_start_weight_update(self, request: Request) -> Any:
        if self.state.is_updating:
            raise WorkerError(
                "start_weight_update called while a weight update is already active. Call finish_weight_update first."
            )
        if not self.state.is_paused and self.why_not_beside:
            self.offences.append("POST /start_weight_update while requests are answered")
        if "weights" in self.state.asleep:
            self.offences.append("POST /start_weight_update while the weights sleep")
        self.state.is_updating = True
        self.state.is_torn = bool(self.why_not_beside)
        self.state.next_model = None
        self.state.unsent = set()
        return {"message": "Weight update started"}

    def post_update_weights(self, request: Request) -> Any:
        update = request.body["update_info"]
        if not self.state.is_updating:
            raise WorkerError("start_weight_update must be called before update_weights.")
        if not self.state.is_initialised:
            self.state.is_updating = False
            raise WorkerError("Call /init_weight_transfer_engine first.")
        if update.get("is_beside"):
            self.state.next_model = copy.deepcopy(self.model)
        else:
            self.state.is_torn = True
        self.load(update)
        return {"message": "Weights updated"}

    def post_finish_weight_update(self, request: Request) -> Any:
        if not self.state.is_updating:
            raise WorkerError("finish_weight_update called without a matching start_weight_update.")
        if self.state.unsent:
            raise WorkerError(f"{len(self.state.unsent)} parameters of the served model were not sent.")
        if self.state.next_model is None and not self.state.is_torn and not self.why_not_beside:
            raise WorkerError("No parameter of the served model was sent.")
        if not self.state.is_paused:
            self.offences.append("POST /finish_weight_update while requests are answered")
        if self.state.next_model is not None and self.model is not None:
            self.model.load_state_dict(self.state.next_model.state_dict())
        self.state.is_updating = self.state.is_torn = False
        self.state.next_model = None
        if request.body and request.body.get("weight_version") is not None:
            self.state.weight_version = request.body["weight_version"]
        return {"message": "Weight update finished"}

    def get_weight_info(self, request: Request) -> Any:
        return {"weight_version": self.state.weight_version}

    def post_update_weight_version(self, request: Request) -> Any:
        self.state.weight_version = request.body["new_version"]
        return {"success": True, "new_version": self.state.weight_version}

    def post_v1_load_lora_adapter(self, request: Request) -> str:
        name = request.body["lora_name"]
        if name in self.state.adapters:
            raise Refusal(400, f"The lora adapter '{name}' has already been loaded.")
        self.state.adapters[name] = request.body["lora_path"]
        return f"Success: LoRA adapter '{name}' added successfully."

    def post_v1_unload_lora_adapter(self, request: Request) -> str:
        name = request.body["lora_name"]
        if self.state.adapters.pop(name, None) is None:
            raise Refusal(404, f"The lora adapter '{name}' cannot be found.")
        return f"Success: LoRA adapter '{name}' removed successfully."

    def post_atropos_adapter(self, request: Request) -> Any:
        self.state.routed_adapter = request.body["lora_name"]
        return {"lora_name": request.body["lora_name"], "policy_version": request.body["policy_version"]}

    def post_atropos_policy_versions(self, request: Request) -> Any:
        unknown = [None] * len(request.body["rollout_keys"])
        return {"policy_versions": unknown, "sampling_parameters": unknown}

    def post_v1_completions(self, request: Request) -> Any:
        prompts = request.body["prompt"]
        choices = [{"index": i, "text": "", "prompt_logprobs": self.score(ids)} for i, ids in enumerate(prompts)]
        return {"choices": choices}

    @torch.no_grad()
    def score(self, ids: list[int]) -> list[Any]:
        """vLLM's `prompt_logprobs` of one sequence."""
        if self.model is None:
            return [None, *({str(token): {"logprob": -1.0, "rank": 1}} for token in ids[1:])]
        logprobs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        scored = [{str(ids[t]): {"logprob": logprobs[t - 1, ids[t]].item(), "rank": 1}} for t in range(1, len(ids))]
        return [None, *scored]

    def _load(self, update: dict[str, Any]) -> None:
        if self.state.segment is None or self.model is None:
            return
        self.state.segment.load(update, self.state.next_model or self.model)
        if update.get("is_complete", True):
            self.state.unsent = {name for name, _ in self.model.named_parameters()} - set(update["names"])
