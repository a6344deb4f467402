"""`trl-atropos doctor`: why no data comes, asked of a live API and inference server without disturbing them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def add_arguments(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser(
        "doctor",
        help="find out why no data comes",
        usage="%(prog)s --api-url URL [--vllm-url URL] [--gateway-url URL] [options]",
        description="Look at a live Atropos API, at the inference server that its environments ask, and at a gateway of agents, "
        "for the traps that end in silence: nobody registered, no environment, groups that never make a batch, a frozen server. Each finding has "
        "a name, which docs/troubleshooting.md explains.",
        epilog="Disturbs nothing, also during training: it asks for no batch, registers nothing, posts nothing. The one "
        "trace it leaves is an IndexError in the log of run-api. A key of the inference server is read from VLLM_API_KEY. "
        "Exit code: 1 if there is an error, 0 otherwise, also with warnings.",
    )
    parser.add_argument("--api-url", required=True, help="root of run-api, for example http://localhost:8000")
    parser.add_argument("--vllm-url", help="root of the vLLM or SGLang server, for example http://localhost:8001")
    parser.add_argument("--gateway-url", help="root of trl-atropos gateway, for example http://localhost:8010")
    parser.add_argument(
        "--gateway-key-file",
        type=Path,
        help="file with the key of the gateway's control routes, without which only that it answers is seen",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        help="rollouts of one optimizer step, over all ranks, to compare with the registration",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        help="--max_length of the trainer in tokens, to compare with the registration and the server",
    )
    parser.add_argument(
        "--watch-s",
        type=_seconds,
        default=3.0,
        help="seconds to watch whether something moves (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, _rest: Sequence[str]) -> int:
    """Look at the servers; 1 if there is an error."""
    from .api import read_key
    from .doctor_run import run_doctor
    from .findings import exit_code

    return exit_code(
        run_doctor(
            args.api_url,
            vllm_url=args.vllm_url,
            gateway_url=args.gateway_url,
            gateway_key=None if args.gateway_key_file is None else read_key(args.gateway_key_file),
            batch_size=args.batch_size,
            max_length=args.max_length,
            watch_s=args.watch_s,
        )
    )


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return value
