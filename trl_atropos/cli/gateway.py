"""`trl-atropos gateway`: agents in any language, trained as they are."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import logging
import os
import secrets
import signal
from collections.abc import Sequence
from pathlib import Path

from ..gateway.options import GROUP, NONE, GatewayOptions, describe
from .api import read_key, size


FLUSH_TIMEOUT_S = 10.0
"""So long the end of the gateway waits for groups that the API has not taken yet."""

DEFAULT_GROUP_SIZE = 8

SIZES = frozenset({"max_body_bytes", "max_rollout_tokens", "max_session_tokens"})


def add_arguments(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser(
        "gateway",
        help="record what agents sample, token by token, and post it as groups",
        usage="%(prog)s --servers URL,URL --api_url URL [options]",
        description="Stand between agents and inference servers. An agent gets a session's URL as the base URL of its OpenAI client "
        "and is trained on what it sampled. docs/agents.md explains it.",
        epilog="Sizes take K, M, G and T. The key of the servers comes from VLLM_API_KEY. Exit code: 0 when ended by a signal, "
        "1 after an error.",
    )
    parser.add_argument(
        "--servers", type=_urls, required=True, metavar="URL,URL", help="servers of one model, vLLM or SGLang"
    )
    parser.add_argument("--api_url", required=True, metavar="URL", help="the trajectory API that groups are posted to")
    parser.add_argument(
        "--group_size", type=int, default=DEFAULT_GROUP_SIZE, help="sessions of one task (default: %(default)s)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8010, help="port; 0 is any free one (default: %(default)s)")
    parser.add_argument(
        "--key_file",
        type=Path,
        help="file with the key of the control routes; without it a key is made and printed once",
    )
    parser.add_argument(
        "--environment_key_file",
        type=Path,
        help="file with the key of environments that generate through the gateway and record for themselves; without it "
        "nobody does",
    )
    parser.add_argument(
        "--scale_rewards",
        choices=[GROUP, NONE],
        default=GROUP,
        help="how rewards become advantages where a session branched or turns have rewards; the trainer's (default: %(default)s)",
    )
    for field in dataclasses.fields(GatewayOptions):
        metadata = describe(field.name)
        parser.add_argument(
            f"--{field.name}",
            type=size if field.name in SIZES else type(field.default),
            choices=metadata.get("choices"),
            default=field.default,
            help=f"{metadata['help']} (default: %(default)s)",
        )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, _rest: Sequence[str]) -> int:
    """Serve until a signal comes."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    try:
        options = GatewayOptions(
            **{field.name: getattr(args, field.name) for field in dataclasses.fields(GatewayOptions)}
        )
    except ValueError as exc:
        raise argparse.ArgumentError(None, f"gateway: {exc}") from exc
    if args.group_size < 2:
        raise argparse.ArgumentError(None, "gateway: --group_size is 2 or more, because rewards are compared")
    key = secrets.token_urlsafe(24) if args.key_file is None else read_key(args.key_file)
    asyncio.run(_serve(args, options, key))
    return 0


async def _serve(args: argparse.Namespace, options: GatewayOptions, key: str) -> None:
    # They load an HTTP server and client, which `--help` does not need.
    from ..gateway.control import ControlApp
    from ..gateway.gateway import Gateway
    from ..gateway.groups import GroupMaker
    from ..gateway.posting import GroupPoster

    environment_key = None if args.environment_key_file is None else read_key(args.environment_key_file)
    gateway = Gateway(args.servers, options, os.environ.get("VLLM_API_KEY"), args.host, args.port, environment_key)
    poster = GroupPoster(args.api_url, gateway.counts)
    maker = GroupMaker(args.group_size, options.temperature, args.scale_rewards == GROUP)
    gateway.served = ControlApp(gateway, poster, maker, key)
    posting = asyncio.create_task(poster.run())
    stopping = asyncio.create_task(_signal())
    async with gateway:
        print(f"Gateway on {gateway.address} for {len(gateway.servers.servers)} servers", flush=True)
        if args.key_file is None:
            print(f"Key of its control routes: {key}", flush=True)
        await asyncio.wait({posting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if posting.done():
        # It ends by an error alone, which must not stay unseen.
        posting.result()
    await asyncio.wait({asyncio.create_task(poster.join())}, timeout=FLUSH_TIMEOUT_S)
    if poster.num_waiting_groups:
        print(f"{poster.num_waiting_groups} groups were not posted: the API does not take them.", flush=True)
    posting.cancel()


async def _signal() -> None:
    """Wait for a signal that ends the process."""
    came = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, came.set)
    await came.wait()


def _urls(text: str) -> list[str]:
    urls = [url.strip() for url in text.split(",") if url.strip()]
    wrong = [url for url in urls if not url.startswith(("http://", "https://"))]
    if wrong or not urls:
        raise argparse.ArgumentTypeError(f"{(wrong or [text])[0]!r} is no URL such as http://127.0.0.1:9001")
    return urls
