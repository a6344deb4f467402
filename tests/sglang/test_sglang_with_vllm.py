"""A server of each kind, kept on one policy by one publisher."""

from __future__ import annotations

from pathlib import Path

import torch
from inference_server_contract import REQUEST_TIMEOUT_S, Served
from servers import serve

from trl_atropos.weight_sync.options import WeightSyncOptions
from trl_atropos.weight_sync.probe import LogprobProbe
from trl_atropos.weight_sync.publisher import PolicyPublisher
from trl_atropos.weight_sync.server_group import ServerGroup
from trl_atropos.weight_sync.server_link import ServerLink
from trl_atropos.weight_sync.transports.choose import make_transport


IDS = [7, 11, 13, 17, 19, 23, 29, 31, 37, 41]


def test_a_publish_reaches_both_kinds(served: Served, tmp_path: Path) -> None:
    options = WeightSyncOptions(on_publish_failure="abort", logprob_probe_interval=1)
    with serve(served.model_dir, "--enforce-eager", log_path=tmp_path / "vllm.log") as url:
        both = [served, Served("vLLM", url, served.model_dir)]
        clients = [one.connect() for one in both]
        backends = [client.describe().backend for client in clients]
        assert backends == ["sglang_gloo", "trl_atropos_shm"]
        cpu = torch.device("cpu")
        links = [
            ServerLink(
                client, make_transport(backend, client, cpu, timeout_s=REQUEST_TIMEOUT_S), torch.bfloat16, options
            )
            for client, backend in zip(clients, backends, strict=True)
        ]
        probe = LogprobProbe(served.tokenizer, served.policy(0).config.vocab_size)
        publisher = PolicyPublisher(
            options, torch.bfloat16, ServerGroup(links, options), make_probe=lambda model: probe
        )
        for seed in (40, 41):
            served.version += 1
            report = publisher.publish(served.policy(seed), served.version)
            assert report.probe is not None and report.probe.mean_abs_diff < 0.1
            assert [client.get_weight_version() for client in clients] == [str(served.version)] * 2
            of_sglang, of_vllm = (torch.tensor(client.get_prompt_logprobs([IDS])[0]) for client in clients)
            # Both round to bfloat16, in another order; another policy is farther off by tens.
            assert (of_sglang - of_vllm).abs().mean() < 0.1
        publisher.close()
