"""Options of `AtroposConfig` that control the inference servers and what is published to them."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..options import PositiveFloat, PositiveInt, check_declared


FAILURE_POLICIES = ("retry", "pause", "abort")
WEIGHT_SYNC_MODES = ("auto", "full", "merged", "adapter")


@dataclass
class WeightSyncOptions:
    """The part of [`AtroposConfig`] that concerns inference servers."""

    vllm_server_base_url: str = field(
        default="http://localhost:8001",
        metadata={
            "help": "Root URL of the vLLM or SGLang server that environments query. Several, separated by commas, are all kept "
            "on the newest policy."
        },
    )
    vllm_server_timeout: PositiveFloat = field(
        default=240.0,
        metadata={
            "help": "Seconds to wait for an inference server to be healthy, at start and after a failed publish."
        },
    )
    vllm_group_host: str | None = field(
        default=None,
        metadata={
            "help": "Address at which the trainer meets the workers, for `nccl` and `trl_atropos_gloo`. If not set: loopback "
            "for a server on loopback, else this machine's address on the way to the server."
        },
    )
    vllm_group_port: int = field(
        default=0,
        metadata={
            "help": "TCP port at which the trainer meets the workers. 0: a free one, so that runs share a host."
        },
    )
    vllm_api_key: str | None = field(
        default=None, metadata={"help": "API key of the vLLM server. Defaults to VLLM_API_KEY of the environment."}
    )
    vllm_keep_kv_cache: bool = field(
        default=False,
        metadata={
            "help": "Let requests in flight go on with the keys and values of the previous policy instead of computing them "
            "again. The pause gets shorter; new requests may then reuse cached prefixes of the previous policy, too."
        },
    )
    vllm_enable_sleep_mode: bool = field(
        default=False,
        metadata={
            "help": "For a server on the trainer's GPU, started with --enable-sleep-mode: it gives its memory back from the "
            "moment a batch is complete until the next publish."
        },
    )
    weight_sync_steps: PositiveInt = field(default=1, metadata={"help": "Publish the policy every X optimizer steps."})
    weight_sync_background: bool | None = field(
        default=None,
        metadata={
            "help": "Go on with the next step while the policy travels, is loaded and proven; the next publish waits for "
            "it. A failure ends the run a step later. If not set: true for a trainer on a GPU and for servers that are not "
            "on loopback, unless they receive over NCCL or sleep. Refused with these."
        },
    )
    weight_sync_beside: bool = field(
        default=True,
        metadata={
            "help": "Load a policy beside the served one where transport, model and memory of the server allow it, so that the "
            "pause only puts it in place. false: load it in the pause, which takes less time in all and no further memory."
        },
    )
    weight_sync_mode: str = field(
        default="auto",
        metadata={
            "help": "`full`: every tensor, every time. `merged`: everything once, then what training can change, with LoRA "
            "merged in. `adapter`: the LoRA adapter itself, for a server started with --enable-lora. `auto`: `adapter` "
            "where server and adapter allow it and it is measured to be faster, else `merged`.",
            "choices": list(WEIGHT_SYNC_MODES),
        },
    )
    weight_sync_full_interval: int | None = field(
        default=None,
        metadata={"help": "Send every tensor on every X-th publish, whatever the mode (but for `adapter`)."},
    )
    weight_sync_adapter_dir: str | None = field(
        default=None,
        metadata={
            "help": "Directory that trainer and server see under the same path; adapters travel through it. If not set: "
            "`adapters` in `output_dir`."
        },
    )
    weight_sync_timeout: PositiveFloat = field(
        default=300.0, metadata={"help": "Deadline in seconds of every single phase of a publish."}
    )
    weight_sync_warn_fraction: PositiveFloat = field(
        default=0.5, metadata={"help": "Warn if publishing takes more than this share of the time of a step."}
    )
    on_publish_failure: str = field(
        default="retry",
        metadata={
            "help": "`retry`: wait for the server, connect again, send everything, up to `max_publish_retries` times. "
            "`pause`: the same without a limit, so that the server can be mended while training waits. `abort`: stop. In "
            "any case a server that does not hold a complete policy stays paused.",
            "choices": list(FAILURE_POLICIES),
        },
    )
    max_publish_retries: int = field(default=3, metadata={"help": "For `--on_publish_failure retry`."})
    logprob_probe_interval: PositiveInt = field(
        default=10,
        metadata={
            "help": "Compare the logprobs of trainer and server on the first publish to a server, and then on every X-th. In "
            "between, a publish is proven by the version that the server reports and by checksums of what its workers loaded; "
            "where they report none (`nccl`, a transport of your own), logprobs are compared every time. 1: always."
        },
    )
    logprob_probe_tolerance: PositiveFloat = field(
        default=4.0,
        metadata={
            "help": "Largest accepted mean absolute difference between trainer and server logprobs of the probe after a "
            "publish, as a multiple of what rounding to the server's dtype explains. A larger one is a failed publish."
        },
    )

    @property
    def vllm_server_base_urls(self) -> list[str]:
        """The root URLs of the servers, one each."""
        return [url.strip() for url in self.vllm_server_base_url.split(",")]

    def __post_init__(self) -> None:
        check_declared(self, WeightSyncOptions)
        if self.weight_sync_full_interval is not None and self.weight_sync_full_interval < 1:
            raise ValueError(f"weight_sync_full_interval is {self.weight_sync_full_interval}, it must be 1 or more.")
        if not 0 <= self.vllm_group_port < 65536:
            raise ValueError(
                f"vllm_group_port is {self.vllm_group_port}. A port lies in 1..65535; 0 takes a free one."
            )
        if self.max_publish_retries < 0:
            raise ValueError(
                f"max_publish_retries is {self.max_publish_retries}. Set 0 or more, or --on_publish_failure abort."
            )
        urls = self.vllm_server_base_urls
        if len(set(urls)) != len(urls) or "" in urls:
            raise ValueError(f"vllm_server_base_url is {self.vllm_server_base_url!r}. Each server must be named once.")
        if self.vllm_enable_sleep_mode and self.weight_sync_steps != 1:
            raise ValueError(
                f"vllm_enable_sleep_mode is on and weight_sync_steps is {self.weight_sync_steps}. A publish wakes the server, "
                "which then sleeps through every step without one. Set --weight_sync_steps 1."
            )
        if self.vllm_enable_sleep_mode and self.weight_sync_background:
            raise ValueError(
                "vllm_enable_sleep_mode and weight_sync_background are on. The server would be put to sleep while a policy is on "
                "its way to it. Set --weight_sync_background false."
            )
        if self.vllm_enable_sleep_mode and len(urls) > 1:
            raise ValueError(
                f"vllm_enable_sleep_mode is on and there are {len(urls)} servers. It is for the one that shares the trainer's "
                "GPU. Leave it off, or name one server."
            )
