"""Options of `AtroposConfig` that control what a run shows of itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec

from ..options import check_declared


LOCAL_TRACKER = "trackio"


@dataclass
class ReportOptions:
    """The part of [`AtroposConfig`] that concerns watching a run and showing it to others."""

    # HfArgumentParser fails at this type with None at its end.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="auto",
        metadata={
            "help": "Trackers that get the metrics: `trackio`, `tensorboard`, `wandb` and the others of transformers, `all` or "
            "`none`. `auto`: trackio if it is installed, on this machine only."
        },
    )
    report_html: bool = field(
        default=True, metadata={"help": "Write report.html into `output_dir` when training ends."}
    )
    prometheus_path: str | None = field(
        default=None,
        metadata={
            "help": "Text file that always holds the newest metrics, for the textfile collector of Prometheus' node_exporter. "
            "Its name ends in .prom."
        },
    )
    prometheus_port: int | None = field(
        default=None,
        metadata={"help": "TCP port on loopback at which Prometheus can scrape the newest metrics. 0: a free one."},
    )

    push_merged: bool = field(
        default=False,
        metadata={
            "help": "With `push_to_hub` and LoRA: at the end upload the policy merged into one model as well, to "
            "`<hub_model_id>-merged`."
        },
    )

    def __post_init__(self) -> None:
        check_declared(self, ReportOptions)
        if self.prometheus_path is not None and not self.prometheus_path.endswith(".prom"):
            raise ValueError(
                f"prometheus_path is {self.prometheus_path}. node_exporter reads files that end in .prom only. Give it that ending."
            )
        if self.prometheus_port is not None and not 0 <= self.prometheus_port < 65536:
            raise ValueError(f"prometheus_port is {self.prometheus_port}, a TCP port lies between 0 and 65535.")


def choose_tracker(args: ReportOptions) -> bool:
    """Replace `auto` in `args.report_to` by what is installed.

    Returns whether the choice was ours, so that nothing may leave the machine.
    """
    if args.report_to not in ("auto", ["auto"]):
        return False
    args.report_to = LOCAL_TRACKER if find_spec(LOCAL_TRACKER) else "none"
    return True
