"""Options of `AtroposConfig` that control what a run shows of itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec


LOCAL_TRACKER = "trackio"


@dataclass
class WatchConfig:
    """The part of [`AtroposConfig`] that concerns watching a run."""

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


def choose_tracker(args: WatchConfig) -> bool:
    """Replace `auto` by what is installed.

    Args:
        args (`WatchConfig`):
            Changed.

    Returns:
        `bool`: whether the choice was ours, so that nothing may leave the machine.
    """
    if args.report_to not in ("auto", ["auto"]):
        return False
    args.report_to = LOCAL_TRACKER if find_spec(LOCAL_TRACKER) else "none"
    return True


def check_watching(args: WatchConfig) -> None:
    """Refuse options of watching that cannot work."""
    if args.prometheus_path is not None and not args.prometheus_path.endswith(".prom"):
        raise ValueError(
            f"prometheus_path is {args.prometheus_path}. node_exporter reads files that end in .prom only. Give it that ending."
        )
    if args.prometheus_port is not None and not 0 <= args.prometheus_port < 65536:
        raise ValueError(f"prometheus_port is {args.prometheus_port}, a TCP port lies between 0 and 65535.")
