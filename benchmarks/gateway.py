"""What a gateway adds to generation: `trl-atropos gateway` in front of a stand-in server, and the stand-in alone.

    python benchmarks/gateway.py [--num_sessions 64] [--num_turns 4] [--history_tokens 32000] [--generation_s 15] [--num_streams 100]
        [--router "vllm-router --host 127.0.0.1 --worker-urls {server} --port {port} --prometheus-port {metrics_port}"]
        [--router "smg launch --host 127.0.0.1 --worker-urls {server} --port {port} --prometheus-port {metrics_port}"]

Prints one JSON line a case and one with what is held against `LIMITS`. Gateway, server and clients are processes of their own on the same
cores.

`passing`: an environment's `/v1/completions` with prompts of 512 tokens and answers of 128, straight and through the gateway: one client that
asks one request after another of a server that answers at once, and 64 that ask a server that samples for a second. Each `--router` is the
command line of another proxy, which is measured beside the gateway, in turn with it; the gateway's own figures are those without a name.

`streams`: one client that asks one chat request after another, with a message of 512 tokens, for a stream of an answer that is sampled in
parts, straight and through the gateway: seconds to the first text, and between one part and the next. Straight is what vLLM's own chat
completions would do: the same text from the same stand-in in one request.

`sessions`: agents that begin with a message of `--history_tokens` tokens and go on for `--num_turns` turns, all at once, each from another
moment of the first `--generation_s` seconds. The stand-in knows its answers by heart and sleeps so long in each generation; what a client
waited beyond that is what was added, the stand-in's own reading and writing with it. `bytes_per_token` is what the gateway's memory grew by,
over all tokens that it holds.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import multiprocessing
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import psutil
import uvicorn


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from token_server import TokenServer  # noqa: E402

from trl_atropos.gateway.servers import DERENDER_TEXT, DETOKENIZE, GENERATE, ROUTES  # noqa: E402
from trl_atropos.network import listening_socket  # noqa: E402


HOST = "127.0.0.1"
KEY = "benchmark"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
STREAM = b"stream"
LETTERS = "bcdfgjkmpqvwxyz"
"""That no merge of the stand-in's tokenizer joins."""

NUM_PROMPT_TOKENS = 512
NUM_ANSWER_TOKENS = 128
NUM_SEQUENTIAL = 300
NUM_CLIENTS = 64
NUM_OF_A_CLIENT = 8
NUM_PARTS = 8
PART_S = 0.01
SAMPLING_S = 1.0
ROUTER_START_S = 60.0
REPLY = LETTERS * 8
LIMITS = {
    "passing_added_p50_ms": 2.0,
    "passing_rate_share": 0.97,
    "first_text_added_p50_ms": 15.0,
    "turn_added_p50_ms": 15.0,
    "turn_added_p95_ms": 50.0,
    "bytes_per_token": 40.0,
}


def _event(values: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(values) + b"\n\n"


class Server:
    """The stand-in as an ASGI application. Equal requests have equal answers, which are made once."""

    def __init__(self, generation_s: float, max_model_len: int):
        self.tokens = TokenServer(max_model_len=max_model_len)
        self.generation_s = generation_s
        self.sampling_s = 0.0
        tokens = [f"token_id:{number % 500}" for number in range(NUM_ANSWER_TOKENS)]
        logprobs = {"tokens": tokens, "token_logprobs": [-1.25] * NUM_ANSWER_TOKENS}
        choice = {"index": 0, "text": REPLY, "logprobs": logprobs, "finish_reason": "stop"}
        self.passed = json.dumps({"object": "text_completion", "model": "policy", "choices": [choice]}).encode()
        model = {"id": "policy", "max_model_len": max_model_len, "parent": None, "owned_by": "vllm"}
        self.models = json.dumps({"data": [model]}).encode()
        self.known: dict[bytes, bytes] = {}
        self.tokens.replies = [lambda: [LETTERS] * NUM_PARTS]
        self.parts = [_event(part) for part in self.tokens.parts({})]
        self.chunks = [_event({"choices": [{"index": 0, "delta": {"content": LETTERS}}]})] * NUM_PARTS

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer."""
        parts, has_more = [], True
        while has_more:
            message = await receive()
            parts.append(message.get("body", b""))
            has_more = message.get("more_body", False)
        answer = await self._answer(scope["path"], b"".join(parts))
        if answer == STREAM:
            await self._stream(scope["path"], send)
            return
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200 if answer else 404, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    async def _answer(self, path: str, body: bytes) -> bytes:
        if path == "/v1/models":
            return self.models
        if path == "/health":
            return b"{}"
        if path == COMPLETIONS:
            await asyncio.sleep(self.sampling_s)
            return self.passed
        if path == "/sampling":
            self.sampling_s = float(body)
            return b"{}"
        if path == CHAT or (path == GENERATE and msgspec.json.decode(body)["stream"]):
            return STREAM
        if path not in (*ROUTES, DERENDER_TEXT, DETOKENIZE):
            return b""
        key = path.encode() + hashlib.blake2b(body).digest()
        if key not in self.known:
            self.tokens.replies = [REPLY]
            self.known[key] = msgspec.json.encode(self.tokens.answer(path, msgspec.json.decode(body)))
        if path == GENERATE:
            await asyncio.sleep(self.generation_s)
        return self.known[key]

    async def _stream(self, path: str, send: Any) -> None:
        """Send the answer in parts, of which each takes `PART_S`."""
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
        )
        for part in self.chunks if path == CHAT else self.parts:
            await asyncio.sleep(PART_S)
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def serve(generation_s: float, max_model_len: int, ports: Connection) -> None:
    """Run the stand-in until the process is ended, and tell its port."""
    listener = listening_socket(HOST, 0, backlog=1024)
    ports.send(listener.getsockname()[1])
    config = uvicorn.Config(Server(generation_s, max_model_len), log_config=None, access_log=False, lifespan="off")
    uvicorn.Server(config).run(sockets=[listener])


@contextmanager
def running_server(generation_s: float, max_model_len: int) -> Iterator[str]:
    """The URL of a stand-in."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(generation_s, max_model_len, theirs), daemon=True)
    process.start()
    try:
        yield f"http://{HOST}:{ours.recv()}"
    finally:
        process.kill()
        process.join()


@contextmanager
def running_gateway(server_url: str, directory: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The URL of a gateway, and its process."""
    key_file = directory / "key"
    key_file.write_text(KEY)
    command = [
        *(sys.executable, "-m", "trl_atropos.cli.main", "gateway", "--servers", server_url, "--api_url", server_url),
        *("--port", "0", "--key_file", str(key_file), "--environment_key_file", str(key_file)),
        *("--group_size", "4096"),
    ]
    with (directory / "gateway.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError((directory / "gateway.log").read_text())
        yield line.split()[2], psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


@contextmanager
def running_router(command: str, server_url: str, directory: Path) -> Iterator[tuple[str, str]]:
    """Name and URL of another proxy, once a request goes through it."""
    with listening_socket(HOST, 0, backlog=1) as first, listening_socket(HOST, 0, backlog=1) as second:
        port, metrics_port = (listener.getsockname()[1] for listener in (first, second))
    arguments = shlex.split(command.format(server=server_url, port=port, metrics_port=metrics_port))
    name, url = Path(arguments[0]).name.replace("-", "_"), f"http://{HOST}:{port}"

    async def is_ready() -> bool:
        async with aiohttp.ClientSession() as http:
            try:
                await passed(http, url, [1])
            except (aiohttp.ClientError, RuntimeError):
                return False
            return True

    log_file = directory / f"{name}.log"
    with log_file.open("w") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + ROUTER_START_S
        while not asyncio.run(is_ready()):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command} does not pass requests on: {log_file.read_text()[-2000:]}")
            time.sleep(0.2)
        yield name, url
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def percentile_ms(values: Sequence[float], share: float) -> float:
    """A percentile of seconds, in milliseconds."""
    return round(1000 * sorted(values)[min(int(share * len(values)), len(values) - 1)], 2)


async def passed(http: aiohttp.ClientSession, url: str, prompt: list[int]) -> float:
    """Seconds of one request of an environment."""
    # As text: smg takes no token ids.
    body = {"model": "policy", "prompt": " ".join(map(str, prompt)), "max_tokens": NUM_ANSWER_TOKENS, "logprobs": 1}
    start = time.perf_counter()
    async with http.post(f"{url}{COMPLETIONS}", json=body, headers={"Authorization": f"Bearer {KEY}"}) as response:
        content = await response.read()
    if response.status != 200:
        raise RuntimeError(f"{COMPLETIONS} of {url} answered {response.status}: {content[:300]!r}")
    return time.perf_counter() - start


async def measure_passing(server_url: str, proxies: dict[str, str]) -> dict[str, float]:
    """Straight and through each proxy, in turn; `proxies` are URLs by what goes before their figures."""
    rng = random.Random(0)
    one_by_one: dict[str, list[float]] = {url: [] for url in (server_url, *proxies.values())}
    seconds: dict[str, float] = {}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        for _ in range(NUM_SEQUENTIAL):
            prompt = [rng.randrange(150_000) for _ in range(NUM_PROMPT_TOKENS)]
            for url, times in one_by_one.items():
                times.append(await passed(http, url, prompt))
        await (await http.post(f"{server_url}/sampling", data=str(SAMPLING_S))).read()

        async def client(url: str) -> None:
            for _ in range(NUM_OF_A_CLIENT):
                await passed(http, url, [rng.randrange(150_000) for _ in range(NUM_PROMPT_TOKENS)])

        for url in one_by_one:
            start = time.perf_counter()
            await asyncio.gather(*(client(url) for _ in range(NUM_CLIENTS)))
            seconds[url] = time.perf_counter() - start
    p50_ms = {url: percentile_ms(times, 0.5) for url, times in one_by_one.items()}
    values = {"straight_p50_ms": p50_ms[server_url]}
    for name, url in proxies.items():
        values |= {
            f"{name}through_p50_ms": p50_ms[url],
            f"{name}passing_added_p50_ms": round(p50_ms[url] - p50_ms[server_url], 2),
            f"{name}passing_rate_share": round(seconds[server_url] / seconds[url], 3),
        }
    return values


async def streamed(http: aiohttp.ClientSession, url: str, message: str) -> tuple[float, float]:
    """Seconds of one streamed answer to its first text, and from there to the last, for each part."""
    body = {"messages": [{"role": "user", "content": message}], "stream": True, "model": "policy"}
    start = time.perf_counter()
    came = []
    async with http.post(f"{url}/chat/completions", json=body) as response:
        async for line in response.content:
            if LETTERS[-1].encode() in line.partition(b'"content":')[2]:
                came.append(time.perf_counter())
    if len(came) < 2:
        raise RuntimeError(f"A stream was answered {response.status} with {len(came)} parts")
    return came[0] - start, (came[-1] - came[0]) / (len(came) - 1)


async def measure_streams(server_url: str, gateway_url: str, num_streams: int) -> dict[str, float]:
    """Straight and through the gateway, in turn."""
    rng = random.Random(0)
    first: dict[str, list[float]] = {"straight": [], "through": []}
    between: dict[str, list[float]] = {"straight": [], "through": []}
    async with aiohttp.ClientSession() as http:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with http.post(f"{gateway_url}/session", json={"group": "streams"}, headers=headers) as response:
            urls = {"straight": f"{server_url}/v1", "through": (await response.json())["base_url"]}
        # Both learn what they ask for once.
        for url in urls.values():
            await streamed(http, url, "first")
        for _ in range(num_streams):
            message = "".join(rng.choices(LETTERS, k=NUM_PROMPT_TOKENS))
            for name, url in urls.items():
                to_first, to_next = await streamed(http, url, message)
                first[name].append(to_first)
                between[name].append(to_next)
    p50_ms = {name: percentile_ms(times, 0.5) for name, times in first.items()}
    return {
        **{f"{name}_first_text_p50_ms": value for name, value in p50_ms.items()},
        "first_text_added_p50_ms": round(p50_ms["through"] - p50_ms["straight"], 2),
        "first_text_ratio": round(p50_ms["through"] / p50_ms["straight"], 3),
        **{f"{name}_between_parts_p50_ms": percentile_ms(times, 0.5) for name, times in between.items()},
    }


async def measure_sessions(gateway_url: str, process: psutil.Process, args: argparse.Namespace) -> dict[str, float]:
    """Agents that talk at once."""
    first = "".join(random.Random(0).choices(LETTERS, k=args.history_tokens))
    waited: list[float] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:

        async def agent(group: str, delay_s: float) -> None:
            headers = {"Authorization": f"Bearer {KEY}"}
            async with http.post(f"{gateway_url}/session", json={"group": group}, headers=headers) as response:
                base_url = (await response.json())["base_url"]
            await asyncio.sleep(delay_s)
            messages = [{"role": "user", "content": first}]
            for _ in range(args.num_turns):
                start = time.perf_counter()
                async with http.post(f"{base_url}/chat/completions", json={"messages": messages}) as response:
                    answer = await response.json()
                    if response.status != 200:
                        raise RuntimeError(f"An agent was answered {response.status}: {answer}")
                waited.append(time.perf_counter() - start - args.generation_s)
                messages += [answer["choices"][0]["message"], {"role": "user", "content": "go on"}]

        # The stand-in learns its answers.
        await agent("first", 0.0)
        waited.clear()
        rss = process.memory_info().rss
        steps = [number * args.generation_s / args.num_sessions for number in range(args.num_sessions)]
        await asyncio.gather(*(agent("measured", step) for step in steps))
        grown = process.memory_info().rss - rss
        async with http.get(f"{gateway_url}/status", headers={"Authorization": f"Bearer {KEY}"}) as response:
            status = await response.json()
    num_tokens = args.num_sessions * (args.history_tokens + args.num_turns * len(REPLY))
    return {
        "num_sessions": args.num_sessions,
        "num_turns": status["num_turns"],
        "spliced_share": status["spliced_share"],
        "turn_added_p50_ms": percentile_ms(waited, 0.5),
        "turn_added_p95_ms": percentile_ms(waited, 0.95),
        "bytes_per_token": round(grown / num_tokens, 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_sessions", type=int, default=64)
    parser.add_argument("--num_turns", type=int, default=4)
    parser.add_argument("--num_streams", type=int, default=100)
    parser.add_argument("--history_tokens", type=int, default=32_000)
    parser.add_argument("--generation_s", type=float, default=15.0)
    parser.add_argument(
        "--router",
        action="append",
        default=[],
        metavar="COMMAND",
        help="another proxy, with {server}, {port} and {metrics_port}",
    )
    args = parser.parse_args()
    measured: dict[str, float] = {}
    max_model_len = 2 * args.history_tokens + 4096
    with (
        tempfile.TemporaryDirectory() as name,
        running_server(args.generation_s, max_model_len) as server_url,
        running_gateway(server_url, Path(name)) as (gateway_url, process),
        ExitStack() as stack,
    ):
        proxies = {"": gateway_url}
        for command in args.router:
            router, url = stack.enter_context(running_router(command, server_url, Path(name)))
            proxies[f"{router}_"] = url
        cases = (
            measure_passing(server_url, proxies),
            measure_sessions(gateway_url, process, args),
            measure_streams(server_url, gateway_url, args.num_streams),
        )
        for case in cases:
            values = asyncio.run(case)
            print(json.dumps(values), flush=True)
            measured |= values
    held = {name: {"measured": measured[name], "limit": limit} for name, limit in LIMITS.items()}
    print(json.dumps({"num_cpus": os.cpu_count(), **held}))


if __name__ == "__main__":
    main()
