"""Stand-in for the CPU build of sgl-kernel, which no package index has: plain torch, and only what a dense model needs.

SGLang imports the names at its start and calls one of them; any other says which one it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch


__version__ = "0.4.10"


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write the places of new tokens in the KV cache into the table of each request, which has `pool_len` columns."""
    taken = 0
    rows = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, start, end in rows:
        req_to_token[row, start:end] = out_cache_loc[taken : taken + end - start]
        taken += end - start


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"The stand-in of sgl_kernel has no {name}.")

    missing.__name__ = name
    return missing
