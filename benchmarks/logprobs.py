"""Logprobs of trained tokens from their hidden states: `score_hidden_states` against the plain full log-softmax.

    python benchmarks/logprobs.py [--vocab_sizes 49152 151936] [--hidden_size 576] [--num_tokens 2048] [--repeats 3]

Both project random hidden states with the same random head in float32, take the logprob of a random token and the entropy
at each position, and run the backward of the sum of the logprobs into hidden states and head. The full side is
`logits.log_softmax(-1)`, `gather`, and the entropy from the same tensor. Each side runs in a process of its own, in turns.
One JSON line per vocabulary, times are medians over the repeats after one pass to warm up:

    ours_s, full_s           forward and backward
    speedup                  full_s / ours_s
    ours_cpu_s, full_cpu_s   processor time of the same passes, which other processes of the machine disturb less
    ours_peak_rss_bytes, full_peak_rss_bytes
                             largest growth of resident memory over the hidden states and the head, gradients included
    rss_ratio                ours / full
    max_abs_logprob_diff, max_abs_entropy_diff
                             largest difference of the logprob of a token, and of the entropy at its position, in nats
    grad_rel_diff            norm of the difference of both gradients / norm of those of the full side
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from resident_memory import watch_peak
from torch import Tensor
from torch.nn.functional import linear

from trl_atropos.policy.logprobs import score_hidden_states


Score = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def score_in_pieces(hidden_states: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    scores = score_hidden_states(lambda rows: linear(rows, head), hidden_states, targets, vocab_size=head.shape[0])
    return scores.logprobs, scores.entropy


def score_in_full(hidden_states: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_softmax = linear(hidden_states, head).log_softmax(-1)
    logprobs = log_softmax.gather(-1, targets[:, None]).squeeze(-1)
    # No loss uses it, as in most runs: a graph of it would only add to what this side holds.
    with torch.no_grad():
        entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    return logprobs, entropy


SIDES: dict[str, Score] = {"ours": score_in_pieces, "full": score_in_full}


def measure(score: Score, vocab_size: int, hidden_size: int, num_tokens: int, repeats: int) -> dict[str, Any]:
    """Run forward and backward once to warm up and `repeats` times; gradients are freed in between."""
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(num_tokens, hidden_size, generator=generator).requires_grad_()
    # Logits of variance 1, as those of an untrained model.
    head = (torch.randn(vocab_size, hidden_size, generator=generator) / hidden_size**0.5).requires_grad_()
    targets = torch.randint(vocab_size, (num_tokens,), generator=generator)
    peak_growth = watch_peak()
    times, cpu_times = [], []
    for _ in range(1 + repeats):
        hidden_states.grad = head.grad = None
        start, cpu_start = time.perf_counter(), time.process_time()
        logprobs, entropy = score(hidden_states, head, targets)
        logprobs.sum().backward()
        times.append(time.perf_counter() - start)
        cpu_times.append(time.process_time() - cpu_start)
    return {
        "times": times[1:],
        "cpu_times": cpu_times[1:],
        "peak_rss_bytes": peak_growth(),
        "logprobs": logprobs.detach(),
        "entropy": entropy.detach(),
        "gradient": torch.cat([hidden_states.grad.flatten(), head.grad.flatten()]),
    }


def run_side(side: str, vocab_size: int, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".pt") as result:
        command = [sys.executable, __file__, "--side", side, "--result", result.name, "--vocab_sizes", str(vocab_size)]
        command += ["--hidden_size", str(args.hidden_size), "--num_tokens", str(args.num_tokens)]
        subprocess.run([*command, "--repeats", str(args.repeats)], check=True, stdout=sys.stderr)
        return torch.load(result.name, weights_only=True)


def compare(vocab_size: int, args: argparse.Namespace) -> dict[str, Any]:
    ours, full = run_side("ours", vocab_size, args), run_side("full", vocab_size, args)
    ours_s, full_s = (statistics.median(side["times"]) for side in (ours, full))
    ours_cpu_s, full_cpu_s = (statistics.median(side["cpu_times"]) for side in (ours, full))
    difference = (ours["gradient"] - full["gradient"]).norm() / full["gradient"].norm()
    return {
        "vocab_size": vocab_size,
        "num_tokens": args.num_tokens,
        "ours_s": round(ours_s, 3),
        "full_s": round(full_s, 3),
        "speedup": round(full_s / ours_s, 2),
        "ours_cpu_s": round(ours_cpu_s, 3),
        "full_cpu_s": round(full_cpu_s, 3),
        "ours_peak_rss_bytes": ours["peak_rss_bytes"],
        "full_peak_rss_bytes": full["peak_rss_bytes"],
        "rss_ratio": round(ours["peak_rss_bytes"] / full["peak_rss_bytes"], 3),
        "max_abs_logprob_diff": float((ours["logprobs"] - full["logprobs"]).abs().max()),
        "max_abs_entropy_diff": float((ours["entropy"] - full["entropy"]).abs().max()),
        "grad_rel_diff": float(difference),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_sizes", type=int, nargs="+", default=[49152, 151936])
    parser.add_argument("--hidden_size", type=int, default=576)
    parser.add_argument("--num_tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help="internal: measure one side")
    parser.add_argument("--result", help="internal: where to write what was measured")
    args = parser.parse_args()
    if args.side is None:
        for vocab_size in args.vocab_sizes:
            print(json.dumps(compare(vocab_size, args)), flush=True)
        return
    (vocab_size,) = args.vocab_sizes
    result = measure(SIDES[args.side], vocab_size, args.hidden_size, args.num_tokens, args.repeats)
    torch.save(result, args.result)


if __name__ == "__main__":
    main()
