"""What `sequence_layout auto` takes against every single layout: forward and backward of one group of rollouts.

    python benchmarks/layouts.py [--cases 512/64/8 ...] [--threads N] [--model DIR]

The model has the proportions of SmolLM2-135M (576 hidden, 9 heads of 64 with 3 key-value heads, 1,536 in the MLP) in two
layers, a vocabulary of 4,096, and random weights; with `--model` it is the one of that directory. A case is prompt tokens / completion tokens /
rollouts of the group, `turns` is a group of multi-turn rollouts that fork after each turn, `ragged` one of completions
of 32 to 2,048 tokens, `window` is 512/512/8 with a window of 256 tokens in every layer, `delta` and `mamba` are 512/64/8 of a model one
layer of which is a gated delta net (Qwen3.5) or a Mamba-2 (Bamba), by transformers' own code, and `system` has four groups of four
that share a system prompt of 512 tokens and differ in the 100 behind it. Each measurement is a process
of its own, the layouts in turns. One JSON line per case:

    tokens, tree_tokens     of all rollouts; without what they share
    auto                    the layout that the start of a run found best
    auto_s, padded_s, packed_s, best_s
                            seconds of forward and backward: the fastest of the repeats; packed rows make a mask of all
                            pairs and are left out above 8,192 tokens (null), and where they are wrong (`delta`, `mamba`)
    auto_time_ratio         auto_s / best_s; the limit is 1.1
    auto_bytes, padded_bytes, auto_memory_ratio
                            largest growth of resident memory over the loaded model, and their ratio; the limit is 1.1

The last line sums up: how many cases are within both limits, and the worst ratios.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from typing import Any


# All before torch is imported: no hub, no DeepSpeed looking for an accelerator, and threads that sleep while they wait.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from resident_memory import watch_peak
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from trl_atropos.data.micro_batches import RolloutCollator
from trl_atropos.policy.layouts import num_computed_tokens
from trl_atropos.policy.plan import plan_forward
from trl_atropos.policy.scoring import ForwardPlan, PolicyScorer
from trl_atropos.types import Rollout, RolloutOrigin


GRID = [
    f"{prompt}/{completion}/{rollouts}"
    for prompt in (32, 128, 512, 2048)
    for completion in (16, 128, 512, 2048)
    for rollouts in (4, 8, 16)
]
STATES = {"delta": "512/64/8", "mamba": "512/64/8"}
"""Cases of models with layers that carry a state from token to token."""

CASES = (*GRID, "0/2000/8", "turns", "ragged", "window", *STATES, "system")
VOCAB_SIZE = 4096
MAX_PACKED = 8192
TIME_LIMIT = MEMORY_LIMIT = 1.1
MIN_REPEATED_S = 2.0
"""Steps that take less are repeated, up to `MAX_REPEATS` times."""
MAX_REPEATS = 5


def make_rollouts(case: str) -> list[Rollout]:
    generator = torch.Generator().manual_seed(0)

    def tokens(number: int) -> torch.Tensor:
        return torch.randint(VOCAB_SIZE, (number,), generator=generator)

    prompt = tokens(512)
    if case == "ragged":
        members = [(0, prompt, tokens(length)) for length in (32, 64, 128, 256, 512, 1024, 1536, 2048)]
    elif case == "turns":
        first, other = torch.cat([prompt, tokens(200)]), torch.cat([prompt, tokens(300)])
        second = torch.cat([first, tokens(400)])
        starts = (second, second, first, first, other, other, prompt, prompt)
        members = [(0, start, tokens(100 + 60 * number)) for number, start in enumerate(starts)]
    elif case == "system":
        starts = tuple(torch.cat([prompt, tokens(100)]) for _ in range(4))
        members = [(group, start, tokens(128)) for group, start in enumerate(starts) for _ in range(4)]
    else:
        num_prompt, length, number = map(int, {"window": "512/512/8", **STATES}.get(case, case).split("/"))
        prompt = tokens(num_prompt)
        members = [(0, prompt, tokens(length)) for _ in range(number)]
    return [
        Rollout(
            input_ids=torch.cat([start, completion]),
            labels=torch.cat([torch.full_like(start, -100), completion]),
            reward=0.0,
            advantages=torch.ones(start.numel() + completion.numel()),
            origin=RolloutOrigin(0, group, index),
        )
        for index, (group, start, completion) in enumerate(members)
    ]


def make_model(case: str, model_dir: str | None) -> Any:
    if model_dir is not None:
        return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).train()
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 2,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
    }
    model_class: Any = MistralForCausalLM
    if case == "delta":
        model_class = Qwen3_5ForCausalLM
        heads = {"linear_num_value_heads": 9, "linear_num_key_heads": 9}
        dims = {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "head_dim": 64}
        config = Qwen3_5TextConfig(**sizes, **heads, **dims, layer_types=["linear_attention", "full_attention"])
    elif case == "mamba":
        model_class = BambaForCausalLM
        config = BambaConfig(**sizes, attn_layer_indices=[1], mamba_n_heads=18, mamba_d_head=64, mamba_d_state=64)
    else:
        config = MistralConfig(**sizes, head_dim=64, sliding_window=256 if case == "window" else None)
    return model_class._from_config(config, attn_implementation="sdpa").train()


def measure(case: str, layout: str, threads: int, model_dir: str | None, results: Any) -> None:
    """Puts layout, seconds and bytes of one case into the queue `results`."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = make_model(case, model_dir)
    rollouts = make_rollouts(case)
    plan = ForwardPlan(layout, projects_in_pieces=True)
    if layout == "auto":
        max_length = max(rollout.num_tokens for rollout in rollouts)
        device = torch.device("cpu")
        plan = plan_forward(model, model, layout, max_length=max_length, dtype=torch.float32, device=device)
    scorer = PolicyScorer(model, plan)
    collate = RolloutCollator(plan.layout, temperature=1.0, shares_between_groups=scorer.shares_between_groups)

    def step(of: list[Rollout]) -> float:
        model.zero_grad()
        start = time.perf_counter()
        scores, no_loss = scorer(model, collate(of))
        (scores.logprobs.sum() + no_loss).backward()
        return time.perf_counter() - start

    step(make_rollouts("16/16/2"))
    peak_growth = watch_peak()
    times = [step(rollouts)]
    num_bytes = peak_growth()
    while len(times) < MAX_REPEATS and sum(times) < MIN_REPEATED_S:
        times.append(step(rollouts))
    results.put((plan.layout, min(times), num_bytes))


def run(case: str, layout: str, threads: int, model_dir: str | None) -> tuple[str, float, int]:
    # Forked: the imports are paid once, and memory is counted from there.
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=measure, args=(case, layout, threads, model_dir, results))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"The measurement of {case}, {layout} ended with exit code {process.exitcode}.")
    found: tuple[str, float, int] = results.get()
    return found


def compare(case: str, threads: int, model_dir: str | None) -> dict[str, Any]:
    sequences = [[rollout.input_ids for rollout in make_rollouts(case)]]
    num_tokens = num_computed_tokens(sequences, "packed")
    auto, auto_s, auto_bytes = run(case, "auto", threads, model_dir)
    _, padded_s, padded_bytes = run(case, "padded", threads, model_dir)
    is_packed = num_tokens <= MAX_PACKED and case not in STATES
    packed_s = run(case, "packed", threads, model_dir)[1] if is_packed else None
    best_s = min(seconds for seconds in (auto_s, padded_s, packed_s) if seconds is not None)
    return {
        "case": case,
        "tokens": num_tokens,
        "tree_tokens": num_computed_tokens(sequences, "tree"),
        "auto": auto,
        "auto_s": round(auto_s, 4),
        "padded_s": round(padded_s, 4),
        "packed_s": None if packed_s is None else round(packed_s, 4),
        "best_s": round(best_s, 4),
        "auto_time_ratio": round(auto_s / best_s, 3),
        "auto_bytes": auto_bytes,
        "padded_bytes": padded_bytes,
        "auto_memory_ratio": round(auto_bytes / padded_bytes, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, help="prompt/completion/rollouts, or a name from above")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    parser.add_argument("--model", help="directory of a model; its vocabulary has at least 4,096 entries")
    args = parser.parse_args()
    # A fork of a process whose OpenMP threads have worked would wait for them for ever.
    torch.set_num_threads(1)
    lines = []
    for case in args.cases:
        lines.append(compare(case, args.threads, args.model))
        print(json.dumps(lines[-1]), flush=True)
    times, memory = ([line[name] for line in lines] for name in ("auto_time_ratio", "auto_memory_ratio"))
    within = sum(t <= TIME_LIMIT and m <= MEMORY_LIMIT for t, m in zip(times, memory, strict=True))
    summary = {
        "cases": len(lines),
        "within_limits": within,
        "worst_time_ratio": max(times),
        "worst_memory_ratio": max(memory),
    }
    print(json.dumps({**summary, "time_limit": TIME_LIMIT, "memory_limit": MEMORY_LIMIT, "threads": args.threads}))


if __name__ == "__main__":
    main()
