"""What a machine must have before training: packages, disk, ports, GPUs of their own for server and trainer."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from .finding import GIB, NOT_ASKED, Check, Unread, known


@dataclass(frozen=True)
class PackageVersion:
    """A package that this one is built on.

    `supported` is a version specifier, such as `">=1.16"`, `installed` a version, None if the package is missing.
    `is_required` is whether this run needs it on this machine.
    """

    name: str
    supported: str
    installed: str | None
    is_supported: bool
    is_required: bool


@dataclass(frozen=True)
class MachineFacts:
    """A look at this machine. Each field may be [`~checks.finding.Unread`].

    `versions` are those of requirements.txt. The trainer writes into `output_dir`, whose file system has
    `free_disk_bytes` left. `model_bytes` is the size of the trained weights; `checkpoint_bytes` an upper bound of that
    of the journal and of all checkpoints that are kept at a time, with the optimizer's state for every weight. `ports`
    are triples of option, port, and why it cannot be taken. `gpu_split` holds `CUDA_VISIBLE_DEVICES` of server and
    trainer, and is empty if the launch file does not tell; `num_gpus` can be seen here.
    """

    versions: tuple[PackageVersion, ...] | Unread = NOT_ASKED
    output_dir: str = "."
    free_disk_bytes: int | Unread = NOT_ASKED
    model_bytes: int | Unread = NOT_ASKED
    checkpoint_bytes: int | Unread = NOT_ASKED
    ports: tuple[tuple[str, int, str | None], ...] | Unread = NOT_ASKED
    num_gpus: int | Unread = NOT_ASKED
    gpu_split: dict[str, str] | Unread = NOT_ASKED


def _unsupported(facts: MachineFacts, is_required: bool) -> str | None:
    wrong = [
        f"{package.name} {package.installed or 'is missing'} (needed: {package.supported})"
        for package in known(facts.versions)
        if package.is_required == is_required
        and not package.is_supported
        and (is_required or package.installed is not None)
    ]
    return f"Unsupported versions: {', '.join(wrong)}." if wrong else None


def _describe_versions(facts: MachineFacts, is_required: bool) -> str:
    names = [
        f"{package.name} {package.installed}"
        for package in known(facts.versions)
        if package.is_required == is_required and package.installed is not None
    ]
    return f"{', '.join(names)}." if names else "None is installed."


def _full_disk(facts: MachineFacts) -> str | None:
    if known(facts.free_disk_bytes) >= known(facts.model_bytes):
        return None
    return f"{_free(facts)}, the trained model takes {known(facts.model_bytes) / GIB:.2f} GiB."


def _short_disk(facts: MachineFacts) -> str | None:
    if known(facts.free_disk_bytes) >= known(facts.checkpoint_bytes):
        return None
    return f"{_free(facts)}, checkpoints and journal may take {known(facts.checkpoint_bytes) / GIB:.2f} GiB."


def _free(facts: MachineFacts) -> str:
    return f"The file system of {facts.output_dir} has {known(facts.free_disk_bytes) / GIB:.2f} GiB left"


def _taken_ports(facts: MachineFacts) -> str | None:
    taken = [f"{option} {port} ({why})" for option, port, why in known(facts.ports) if why is not None]
    return f"Ports that cannot be taken: {', '.join(taken)}." if taken else None


def _describe_ports(facts: MachineFacts) -> str:
    told = [f"{option} {port}" for option, port, _ in known(facts.ports)]
    return f"Free: {', '.join(told)}." if told else "No port is told: servers and trainer take free ones."


def _shared_gpus(facts: MachineFacts) -> str | None:
    if not known(facts.num_gpus) or known(facts.gpu_split):
        return None
    return f"Server and trainer both see all {facts.num_gpus} GPUs."


def _describe_gpus(facts: MachineFacts) -> str:
    if not known(facts.num_gpus):
        return "No GPU can be seen here; server and trainer run on the CPU."
    return ", ".join(f"{name}: {devices}" for name, devices in known(facts.gpu_split).items()) + "."


MACHINE_CHECKS: tuple[Check[MachineFacts], ...] = (
    Check(
        "versions",
        "error",
        lambda facts: _unsupported(facts, is_required=True),
        "trl_atropos is written against these versions, and others may differ without an error.",
        "Install them: `pip install -U trl-atropos`, with the extras `vllm` and `atropos` where server and API run.",
        needs=("versions",),
        describe=lambda facts: _describe_versions(facts, is_required=True),
    ),
    Check(
        "optional_versions",
        "warning",
        lambda facts: _unsupported(facts, is_required=False),
        "This run may not need them; what does will not work as described.",
        "Install them: `pip install -U NAME`.",
        needs=("versions",),
        describe=lambda facts: _describe_versions(facts, is_required=False),
    ),
    Check(
        "ports",
        "error",
        _taken_ports,
        "Another program listens there.",
        "End that program, tell another port, or 0 for a free one.",
        needs=("ports",),
        describe=_describe_ports,
    ),
    Check(
        "gpu_separation",
        "warning",
        _shared_gpus,
        "vLLM takes most of the memory of a GPU, and the trainer finds none.",
        "Set `vllm_gpus` and `trainer_gpus` in the launch file, or CUDA_VISIBLE_DEVICES of each process.",
        needs=("num_gpus", "gpu_split"),
        describe=_describe_gpus,
    ),
    Check(
        "disk",
        "error",
        _full_disk,
        "The trained model could not be saved.",
        "Make room, or name another --output_dir.",
        needs=("free_disk_bytes", "model_bytes"),
        describe=lambda facts: f"{_free(facts)}.",
    ),
    Check(
        "checkpoint_disk",
        "warning",
        _short_disk,
        "A full disk ends the run at a checkpoint or at the journal.",
        "Set --save_total_limit, --save_strategy no or --journal_max_bytes, or name another --output_dir. --save_only_model helps, too, but a "
        "run that resumes from such a checkpoint starts the optimizer and the learning rate schedule anew.",
        needs=("free_disk_bytes", "checkpoint_bytes"),
        describe=lambda facts: (
            f"Checkpoints that are kept, and a limited journal, take up to {known(facts.checkpoint_bytes) / GIB:.2f} GiB."
        ),
    ),
)
"""What the machine must have."""


def port_obstacle(port: int) -> str | None:
    """Say why a server cannot have a port, 1..65535, of this machine's loopback address; None if it can."""
    with socket.socket() as probe:
        # As servers do: a connection that has just been closed does not keep its port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as exc:
            return str(exc.strerror)
    return None
