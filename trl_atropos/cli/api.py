"""`trl-atropos api`: the trajectory API, in place of `run-api`; `trl-atropos api inspect` shows what a database holds."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import PreflightError


UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def add_arguments(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser(
        "api",
        help="run the trajectory API, which keeps every group on the disk",
        usage="%(prog)s --db PATH [options]\n       %(prog)s inspect DB",
        description="Run the API between environments and trainers, in place of Atropos' run-api: the same routes for the same "
        "clients, but a group is on the disk before its post is answered, the oldest is handed out first, and a restart loses "
        "nothing. docs/trajectory_api.md explains it.",
        epilog="Sizes take K, M, G and T. `inspect DB` prints what a database holds, also while an API uses it. Exit code: 0 "
        "when ended by a signal, 1 after an error.",
    )
    parser.add_argument("action", nargs="?", choices=["inspect"], help="show a database instead of serving one")
    parser.add_argument("database", nargs="?", type=Path, metavar="DB", help="the database to show")
    parser.add_argument("--db", type=Path, help="the database file; one that does not exist is made")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 is any free one (default: %(default)s)")
    parser.add_argument(
        "--max_queue_bytes", type=size, default="8G", help="bytes of all stored groups (default: %(default)s)"
    )
    parser.add_argument(
        "--max_env_queue_bytes", type=size, help="bytes of the groups of one environment (default: all)"
    )
    parser.add_argument(
        "--max_queue_groups", type=size, default="250000", help="number of all stored groups (default: %(default)s)"
    )
    parser.add_argument(
        "--max_body_bytes", type=size, default="64M", help="bytes of one request, as it comes (default: %(default)s)"
    )
    parser.add_argument(
        "--max_unpacked_bytes",
        type=size,
        default="256M",
        help="bytes of one request, unpacked (default: %(default)s)",
    )
    parser.add_argument(
        "--hold_s",
        type=_seconds,
        default="60",
        help="seconds for which a post waits for room in a full queue before it is answered with 503 (default: %(default)s)",
    )
    parser.add_argument(
        "--lease_timeout_s",
        type=_seconds,
        default="3600",
        help="seconds of silence after which a batch that its trainer did not acknowledge goes to others (default: %(default)s)",
    )
    parser.add_argument(
        "--retry_window_s",
        type=_seconds,
        default="600",
        help="seconds within which a post whose answer was lost is recognised when it comes again (default: %(default)s)",
    )
    parser.add_argument(
        "--api_key_file",
        type=Path,
        help="file with the key that every request must show; without it none is asked for",
    )
    parser.add_argument(
        "--if_damaged",
        choices=["stop", "set_aside"],
        default="stop",
        help="what to do with a damaged database: end with an error, or rename it and begin a new one (default: %(default)s)",
    )
    parser.add_argument("--log_format", choices=["text", "json"], default="text", help="(default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, _rest: Sequence[str]) -> int:
    """Serve, or show a database."""
    if args.action == "inspect":
        if args.database is None:
            raise argparse.ArgumentError(None, "api inspect: DB is missing")
        from ..api.inspect import describe_database

        print(json.dumps(describe_database(args.database), indent=2))
        return 0
    if args.db is None:
        raise argparse.ArgumentError(None, "api: --db is missing")
    from ..api.options import ApiOptions
    from ..api.serve import configure_logging, listen, supervise

    options = ApiOptions(
        db=args.db,
        host=args.host,
        port=args.port,
        max_queue_bytes=args.max_queue_bytes,
        max_env_queue_bytes=args.max_env_queue_bytes,
        max_queue_groups=args.max_queue_groups,
        max_body_bytes=args.max_body_bytes,
        max_unpacked_bytes=args.max_unpacked_bytes,
        hold_s=args.hold_s,
        lease_timeout_s=args.lease_timeout_s,
        retry_window_s=args.retry_window_s,
        api_key=None if args.api_key_file is None else read_key(args.api_key_file),
    )
    configure_logging(args.log_format == "json")
    check_database(options.db, sets_aside=args.if_damaged == "set_aside")
    with listen(options) as listener:
        host, port = listener.getsockname()[:2]
        print(f"Trajectory API on http://{host}:{port}, database {options.db}", flush=True)
        return supervise(options, listener)


def check_database(path: Path, *, sets_aside: bool) -> None:
    """Open and close the database once, so that one that cannot be used ends the command; or rename a damaged one.

    Raises:
        ApiDatabaseError: It cannot be used.
    """
    import sqlite3

    from ..api.refusals import ApiDatabaseError
    from ..api.store import Store, set_aside

    try:
        Store(path).close()
    except ApiDatabaseError as exc:
        is_damaged = isinstance(exc.__cause__, sqlite3.DatabaseError)
        is_damaged &= not isinstance(exc.__cause__, sqlite3.OperationalError)
        if not (is_damaged and sets_aside):
            raise
        kept = set_aside(path, f"{path.name}.damaged-{{}}")
        print(f"{exc.what} It is kept as {kept}; a new one is begun.", flush=True)


def read_key(path: Path) -> str:
    """Read the key of `--api_key_file`.

    Raises:
        PreflightError: The file cannot be read or is empty.
    """
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise PreflightError(
            f"The key file {path} cannot be read: {exc}.",
            "Without its key the API would answer everybody.",
            "Give a text file with the key alone.",
        ) from exc
    if not key:
        raise PreflightError(
            f"The key file {path} is empty.",
            "Without its key the API would answer everybody.",
            "Write a key into it: head -c 32 /dev/urandom | base64.",
        )
    return key


def size(text: str) -> int:
    """Read a number of bytes or things, which may end with K, M, G or T.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    match = re.fullmatch(r"(\d{1,15})([KMGT]?)(?:i?B)?", text)
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no number of 1 or more, such as 500M or 8G")
    return int(match[1]) * UNITS[match[2]]


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return value
