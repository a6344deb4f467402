"""The command line of vLLM, in a process that forks the engine and the workers of a server.

On a CPU vLLM spawns them: each imports everything once more. A server that is told to be eager is so altogether; vLLM compiles
its sampler even then, with the first request, which takes longer than all else that a test asks of a server. Servers that
`trl-atropos launch` starts in tests spawn and compile as always.
"""

import multiprocessing
import sys
from multiprocessing.context import BaseContext

import torch._dynamo
from vllm.entrypoints.cli.main import main


_get_context = multiprocessing.get_context


def get_context(method: str | None = None) -> BaseContext:
    return _get_context("fork" if method == "spawn" else method)


if __name__ == "__main__":
    multiprocessing.get_context = get_context
    torch._dynamo.config.disable = "--enforce-eager" in sys.argv
    sys.exit(main())
