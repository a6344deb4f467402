"""Options of the data plane."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import PreflightError
from ..options import PositiveFloat, PositiveInt, check_declared
from ..wire.journal import DEFAULT_SEGMENT_BYTES
from .staleness import STALE_ROLLOUTS


@dataclass
class DataOptions:
    """The part of [`AtroposConfig`] that says where rollouts come from and which of them are trained."""

    atropos_api_url: str | None = field(
        default=None,
        metadata={
            "help": "Root URL of the API, `trl-atropos api` or `run-api`, such as http://localhost:8000. Or give `data_path`."
        },
    )
    data_path: str | None = field(
        default=None,
        metadata={
            "help": "Train recorded or hand-made rollouts instead of live ones, without any server: the `journal` directory of a "
            "run, a .jsonl or .jsonl.gz file with one ScoredData group per line, a directory of `Dataset.save_to_disk`, or a "
            "dataset's id on the Hub."
        },
    )
    atropos_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Number of rollouts of one optimizer step, registered with the API as `batch_size`. Defaults to "
            "per_device_train_batch_size x gradient_accumulation_steps x number of processes, and must equal it."
        },
    )
    max_length: PositiveInt = field(
        default=2048,
        metadata={
            "help": "Longest rollout in tokens, prompt included. Registered as `max_token_len` = max_length + 1."
        },
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={
            "help": "Form micro-batches by a token budget instead of a number of rollouts: `per_device_train_batch_size` "
            "rollouts per process make one optimizer step, in as many forward passes as this many tokens each allow."
        },
    )
    api_timeout_s: PositiveFloat = field(
        default=60.0, metadata={"help": "Seconds to wait at start for the Atropos API to answer."}
    )
    batch_timeout_s: PositiveFloat = field(
        default=600.0,
        metadata={"help": "Seconds to wait for a batch before stopping with a diagnosis; below a day."},
    )
    refresh_interval: PositiveFloat = field(
        default=5.0,
        metadata={"help": "Cap in seconds of the poll interval while no batch is ready; polling starts at 0.1 s."},
    )
    max_dropped_fraction: float = field(
        default=0.1,
        metadata={
            "help": "Mean share of groups, in [0, 1), over the last 20 batches that may fail validation. Those groups are written "
            "to output_dir/quarantine.jsonl and counted in `num_rollouts_dropped`; a larger share stops the run. 0: any stops it."
        },
    )
    max_staleness: int | None = field(
        default=None,
        metadata={
            "help": "Largest number of publishes between the policy that sampled a group and the one that is trained. 0: on "
            "policy, and nothing is prefetched. None: no limit."
        },
    )
    stale_rollouts: str = field(
        default="drop",
        metadata={
            "help": "What becomes of groups that are staler than `max_staleness`: `drop`, or `downweight`: their advantages count "
            "(max_staleness + 1) / (staleness + 1).",
            "choices": list(STALE_ROLLOUTS),
        },
    )
    num_prefetched_batches: int = field(
        default=1,
        metadata={
            "help": "1: the next batch is fetched and checked while the current one is trained, so that it is one publish older. "
            "0: it is fetched after the publish."
        },
    )
    journal_segment_bytes: PositiveInt = field(
        default=DEFAULT_SEGMENT_BYTES,
        metadata={"help": "Size in bytes at which output_dir/journal begins another file."},
    )
    journal_max_bytes: int | None = field(
        default=None,
        metadata={
            "help": "Largest size in bytes of output_dir/journal: the oldest files that the newest checkpoint does not need are "
            "deleted, and if that is not enough the run ends. None: no limit."
        },
    )
    env_names: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names for the metrics of environment 0, 1, ... in the order in which they registered with the API; "
            "`env_0`, ... if not given. The API tells nobody their names."
        },
    )
    log_completions: bool = field(
        default=False,
        metadata={
            "help": "Show prompts and completions of the step at every log, per environment: on the console, as parquet in "
            "output_dir/completions, and in wandb and trackio."
        },
    )
    num_completions_to_print: int | None = field(
        default=None, metadata={"help": "Of each environment, with `log_completions`; all if not given."}
    )
    eval_path: str | None = field(
        default=None,
        metadata={
            "help": "With `eval_strategy`: a .jsonl file of prompts that the served policy completes greedily. A line has `prompt` "
            "(text or messages) and optionally `answer` and `env`."
        },
    )
    eval_max_tokens: PositiveInt = field(
        default=256, metadata={"help": "Longest completion of a prompt of `eval_path`, in tokens."}
    )
    eval_log_dir: str | None = field(
        default=None,
        metadata={
            "help": "With `eval_strategy`: where environments log their own evaluations, `--env.data_dir_to_save_evals` of one, or "
            "the parent of several; what is new there is reported."
        },
    )

    @property
    def num_batches_ahead(self) -> int:
        """How many batches are fetched before they are trained, 0 or 1. On policy (`max_staleness` 0) there can be none."""
        return 0 if self.max_staleness == 0 else self.num_prefetched_batches

    def __post_init__(self) -> None:
        check_declared(self, DataOptions)
        if not 0.0 <= self.max_dropped_fraction < 1.0:
            raise ValueError(f"max_dropped_fraction is {self.max_dropped_fraction}, it must lie in [0, 1).")
        if self.atropos_api_url is not None and self.data_path is not None:
            raise ValueError(
                f"atropos_api_url is {self.atropos_api_url} and data_path is {self.data_path}. Rollouts come from one of them. Leave "
                "one out."
            )
        if self.num_completions_to_print is not None and self.num_completions_to_print < 1:
            raise ValueError(f"num_completions_to_print is {self.num_completions_to_print}, it must be 1 or more.")
        if self.eval_path is not None and self.data_path is not None:
            raise ValueError(
                f"eval_path is {self.eval_path} and data_path is {self.data_path}. Prompts are completed by the vLLM server, which a "
                "run on recorded data does not have. Leave --eval_path out."
            )
        if self.max_staleness is not None and self.max_staleness < 0:
            raise ValueError(f"max_staleness is {self.max_staleness}, it must be 0 or more. Set --max_staleness.")
        if self.stale_rollouts == "downweight" and self.max_staleness is None:
            raise ValueError(
                "stale_rollouts is downweight and max_staleness is not set. Without a limit nothing is stale. Set --max_staleness."
            )
        if self.num_prefetched_batches not in (0, 1):
            raise ValueError(
                f"num_prefetched_batches is {self.num_prefetched_batches}. Each batch ahead makes the data one publish older. Choose "
                "0 or 1."
            )
        if self.journal_max_bytes is not None and self.journal_max_bytes < 2 * self.journal_segment_bytes:
            raise ValueError(
                f"journal_max_bytes is {self.journal_max_bytes} and journal_segment_bytes {self.journal_segment_bytes}. Only whole "
                "files are deleted, never the newest: room for two is needed. Lower --journal_segment_bytes."
            )


def check_source(args: DataOptions) -> None:
    """Refuse a run without any rollouts. Not when the configuration is made: it may be completed afterwards.

    Raises:
        [`PreflightError`]: neither the API nor recorded data are named.
    """
    if args.atropos_api_url is None and args.data_path is None:
        raise PreflightError(
            "Neither atropos_api_url nor data_path is given.",
            "Rollouts come from a live Atropos API or from recorded data.",
            "Set --atropos_api_url to the URL of `run-api`, such as http://localhost:8000, or --data_path.",
        )
