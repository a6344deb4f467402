"""A fake SGLang server for the ways things fail: `ScriptedServer` with SGLang's routes, and a worker's end of the group.

The worker joins the trainer over gloo as SGLang's does, and its connections end with the process. As SGLang it answers 200 to
tensors of unknown names.
"""

from __future__ import annotations

from typing import Any

import torch
from scripted_routes import UNKNOWN_ROUTE, Refusal, Request
from scripted_server import ScriptedServer

from trl_atropos.weight_sync.http import SGLANG_ROUTES
from trl_atropos.weight_sync.transports.gloo import connect_store, join_group, start_broadcast
from trl_atropos.weight_sync.transports.sglang_group import in_group


JOIN_S = 20.0
ROUTES = {
    *("GET /health", "GET /model_info", "GET /server_info", "GET /openapi.json", "GET /v1/models"),
    *("POST /pause_generation", "POST /continue_generation", "POST /generate"),
    *("POST /init_weights_update_group", "POST /destroy_weights_update_group", "POST /update_weight_version"),
    *("POST /begin_weight_update", "POST /update_weights_from_distributed", "POST /end_weight_update"),
}
DONE = {"success": True, "message": "Succeeded."}


class Worker:
    """A worker's end of the group."""

    def __init__(self, init_info: dict[str, Any]):
        host, name = init_info["master_address"], init_info["group_name"]
        assert init_info["backend"] == "gloo"
        store = connect_store(host, init_info["master_port"], name, JOIN_S)
        self.group = join_group(in_group(store), init_info["rank_offset"], init_info["world_size"], host, JOIN_S)

    def receive(self, update: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors of one bucket."""
        named = zip(update["names"], update["dtypes"], update["shapes"], strict=True)
        tensors = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, dtype, shape in named}
        for work in [start_broadcast(self.group, tensor) for tensor in tensors.values()]:
            work.wait()
        return tensors


class ScriptedSGLang(ScriptedServer):
    """See the module; arguments, attributes and actions are those of [`~scripted_server.ScriptedServer`].

    Attributes:
        worker ([`Worker`], *optional*):
            Of the trainer that was met last.
        info (`dict[str, Any]`):
            What `/server_info` answers.
    """

    def __init__(self, model: torch.nn.Module | None = None):
        super().__init__(model)
        self.worker: Worker | None = None
        self.info: dict[str, Any] = {
            "version": "0.5.23",
            **{"tp_size": 1, "dp_size": 1, "pp_size": 1},
            **{"dtype": "bfloat16", "device": "cpu", "context_length": 256},
        }

    def stop(self) -> None:
        super().stop()
        # The connections of its workers end with it.
        self.worker = None

    def answer(self, request: Request) -> Any:
        if request.route not in ROUTES:
            return UNKNOWN_ROUTE
        if request.route == "GET /openapi.json":
            return {"paths": {route: {} for route in SGLANG_ROUTES}}
        return super().answer(request)

    def get_model_info(self, request: Request) -> Any:
        return {"model_path": "policy", "served_model_name": "policy", "weight_version": self.state.weight_version}

    def get_server_info(self, request: Request) -> Any:
        return self.info

    def get_v1_models(self, request: Request) -> Any:
        return {"data": [{"id": "policy", "max_model_len": 256}]}

    def post_pause_generation(self, request: Request) -> Any:
        self.state.is_paused = True
        return {"status": "ok"}

    def post_continue_generation(self, request: Request) -> Any:
        return self.post_resume(request)

    def post_init_weights_update_group(self, request: Request) -> Any:
        self.worker = Worker(request.body)
        return DONE

    def post_destroy_weights_update_group(self, request: Request) -> Any:
        if self.worker is None:
            raise Refusal(400, "The group to be destroyed does not exist.")
        self.worker = None
        return DONE

    def post_begin_weight_update(self, request: Request) -> Any:
        if self.state.is_updating:
            raise Refusal(400, "A weight update is already open.")
        if not self.state.is_paused:
            self.offences.append(f"{request.route} while requests are answered")
        self.state.is_updating = True
        return DONE

    def post_update_weights_from_distributed(self, request: Request) -> Any:
        if self.worker is None:
            raise Refusal(400, "The group does not exist.")
        received = self.worker.receive(request.body)
        if not self.state.is_updating:
            self.offences.append(f"{request.route} outside of an update")
        if self.model is not None:
            known = dict(self.model.named_parameters())
            for name in received.keys() & known.keys():
                known[name].data.copy_(received[name])
        return DONE

    def post_end_weight_update(self, request: Request) -> Any:
        if not self.state.is_updating:
            raise Refusal(400, "No weight update is open.")
        self.state.is_updating = False
        return DONE

    def post_update_weight_version(self, request: Request) -> Any:
        if request.body["abort_all_requests"] is not False:
            self.offences.append(f"{request.route} aborts the requests in flight")
        return super().post_update_weight_version(request)

    def post_generate(self, request: Request) -> Any:
        return [{"meta_info": {"input_token_logprobs": self.rows(ids)}} for ids in request.body["input_ids"]]

    @torch.no_grad()
    def rows(self, ids: list[int]) -> list[Any]:
        """SGLang's `input_token_logprobs` of one sequence."""
        assert self.model is not None
        logprobs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return [[None, ids[0], None], *([logprobs[t - 1, ids[t]].item(), ids[t], None] for t in range(1, len(ids)))]
