"""A training step against TRL's: the same model, rollouts and machine; forward, loss and backward.

    python benchmarks/train_step.py [--model DIR] [--repeats N] [--cases 128/32/8 ...] [--layout auto] [--checkpoint_every N]
                                    [--recompute_granularity selective]

A case is prompt tokens / completion tokens / rollouts of the group; `ragged` has completions of 8 to 64 tokens behind a
prompt of 128. Our side may make activations of every N-th layer again in the backward pass (`--gradient_checkpointing true
--gradient_checkpointing_kwargs '{"every_n_layers": N}'` of a run, with its `--recompute_granularity`). Each side runs in a
process of its own, in turns. One JSON line per case, times are medians over the repeats after one step to warm up:

    ours_s, trl_s            one step: AtroposTrainer.training_step; GRPOTrainer._compute_loss and backward
    speedup_vs_trl           trl_s / ours_s
    ours_rss_bytes, trl_rss_bytes
                             largest growth of resident memory over the loaded model, gradients included
    peak_rss_ratio_vs_trl    ours / TRL's
    gradient_bytes           what of both the gradients are: no layout can save them
    activations_ratio_vs_trl what is left of both without them, ours / TRL's
    max_abs_logprob_diff     largest difference of the logprob of a completion token, in nats
    grad_rel_diff            norm of the difference of the gradients / norm of TRL's
    layout                   the layout that was used
    recompute_time_ratio     with --checkpoint_every: the time of our step to that of one which recomputes nothing, median of
                             the pairs of steps that follow each other in one process
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parent.parent
CASES = ("128/32/8", "48/24/8", "512/64/8", "ragged")

# All before torch is imported: no hub, no DeepSpeed looking for an accelerator, and threads that sleep while they wait,
# on both sides.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402
from resident_memory import watch_peak  # noqa: E402
from rollouts import as_rollouts, as_trl_inputs  # noqa: E402


def make_rollouts(case: str) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Prompt ids, completions, and one advantage per completion; the same on both sides."""
    generator = torch.Generator().manual_seed(0)
    if case == "ragged":
        num_prompt, lengths = 128, [8, 16, 20, 28, 36, 44, 52, 64]
    else:
        num_prompt, length, num_rollouts = map(int, case.split("/"))
        lengths = [length] * num_rollouts
    # Ordinary ids: the first ones of a vocabulary are special tokens.
    prompt = torch.randint(100, 40_000, (num_prompt,), generator=generator)
    completions = [torch.randint(100, 40_000, (length,), generator=generator) for length in lengths]
    return prompt, completions, torch.randn(len(lengths), generator=generator)


def measure(step: Callable[[], object], model: torch.nn.Module, repeats: int) -> dict[str, Any]:
    """Run the step once to warm up and `repeats` times, as a trainer does: gradients are freed in between."""
    peak_growth = watch_peak()
    times = []
    for _ in range(1 + repeats):
        model.zero_grad()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    rss_bytes = peak_growth()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return {"times": times[1:], "rss_bytes": rss_bytes, "gradient": gradient}


def run_trl(model_dir: str, case: str, repeats: int) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    prompt, completions, advantages = make_rollouts(case)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    num_rollouts, longest = len(completions), max(map(len, completions))
    with tempfile.TemporaryDirectory() as directory:
        args = GRPOConfig(
            output_dir=directory,
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
            per_device_train_batch_size=num_rollouts,
            num_generations=num_rollouts,
            max_completion_length=longest,
            loss_type="dapo",
            beta=0.0,
            temperature=1.0,
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
            reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
            args=args,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": ["unused"] * num_rollouts}),
        )
    model = trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = as_trl_inputs(prompt, completions, advantages)
    result = measure(lambda: trainer._compute_loss(model, inputs).backward(), model, repeats)
    with torch.no_grad():
        logprobs, _, _ = trainer._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            longest,
        )
    return {**result, "logprobs": logprobs[inputs["completion_mask"].bool()], "layout": "padded"}


def run_ours(
    model_dir: str, case: str, repeats: int, layout: str, checkpoint_every: int, granularity: str
) -> dict[str, Any]:
    from trl_atropos import AtroposConfig, AtroposTrainer

    prompt, completions, advantages = make_rollouts(case)
    with tempfile.TemporaryDirectory() as directory:
        args = AtroposConfig(
            output_dir=directory,
            use_cpu=True,
            report_to="none",
            gradient_checkpointing=checkpoint_every > 0,
            recompute_granularity=granularity,
            per_device_train_batch_size=len(completions),
            loss_type="dapo",
            inference_logprobs="recompute",
            sequence_layout=layout,
        )
        trainer = AtroposTrainer(model_dir, args)
    model = trainer.model
    if checkpoint_every:
        # As `train` does.
        model.gradient_checkpointing_enable({"use_reentrant": False}, every_n_layers=checkpoint_every)
    rollouts = as_rollouts(prompt, completions, advantages)

    def step() -> None:
        # Laying out and weighing belong to the step: TRL's inputs come padded and counted.
        (item,), num_items = trainer.get_batch_samples(iter([[rollouts]]), 1, torch.device("cpu"))
        trainer.training_step(model, item, num_items)

    trainer._get_forward()
    result = measure(step, model, repeats)
    with torch.no_grad():
        (batch,) = trainer.get_batch_samples(iter([[rollouts]]), 1, torch.device("cpu"))[0][0]
        scores, _ = trainer._get_forward().scorer(model, batch)
    plan = trainer._get_forward().scorer.plan
    result |= {"logprobs": scores.logprobs[batch["token_index"]], "layout": plan.layout}
    if checkpoint_every:
        result["recompute_time_ratio"] = compare_times(step, model, repeats)
    return result


def compare_times(step: Callable[[], object], model: torch.nn.Module, repeats: int) -> float:
    """Median ratio of the times of a step with and without recomputation, which take turns; the order changes each time."""
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]

    def time_one(recomputes: bool) -> float:
        for layer in layers:
            layer.gradient_checkpointing = recomputes
        model.zero_grad()
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    ratios = []
    for number in range(2 * repeats):
        times = {recomputes: time_one(recomputes) for recomputes in ((True, False) if number % 2 else (False, True))}
        ratios.append(times[True] / times[False])
    return statistics.median(ratios)


def run_side(side: str, args: argparse.Namespace, case: str) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".pt") as result:
        command = [sys.executable, __file__, "--side", side, "--result", result.name, "--cases", case]
        command += ["--model", args.model, "--repeats", str(args.repeats), "--layout", args.layout]
        command += ["--checkpoint_every", str(args.checkpoint_every)]
        command += ["--recompute_granularity", args.recompute_granularity]
        subprocess.run(command, check=True, stdout=sys.stderr)
        return torch.load(result.name, weights_only=True)


def compare(args: argparse.Namespace, case: str) -> dict[str, Any]:
    ours, trl = run_side("ours", args, case), run_side("trl", args, case)
    ours_s, trl_s = (statistics.median(side["times"]) for side in (ours, trl))
    gradient_bytes = trl["gradient"].numel() * trl["gradient"].element_size()
    ours_bytes, trl_bytes = ours["rss_bytes"], trl["rss_bytes"]
    difference = (ours["gradient"] - trl["gradient"]).norm() / trl["gradient"].norm()
    return {
        "case": case,
        "speedup_vs_trl": round(trl_s / ours_s, 2),
        "peak_rss_ratio_vs_trl": round(ours_bytes / trl_bytes, 3),
        "max_abs_logprob_diff": float((ours["logprobs"] - trl["logprobs"]).abs().max()),
        "grad_rel_diff": float(difference),
        "layout": ours["layout"],
        "ours_s": round(ours_s, 3),
        "trl_s": round(trl_s, 3),
        "ours_rss_bytes": ours_bytes,
        "trl_rss_bytes": trl_bytes,
        "gradient_bytes": gradient_bytes,
        "activations_ratio_vs_trl": round((ours_bytes - gradient_bytes) / (trl_bytes - gradient_bytes), 3),
        **({"recompute_time_ratio": round(ours["recompute_time_ratio"], 3)} if args.checkpoint_every else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / ".models" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--layout", default="auto")
    parser.add_argument("--checkpoint_every", type=int, default=0, help="0: no layer's activations are made again")
    parser.add_argument("--recompute_granularity", choices=["full", "selective"], default="full")
    parser.add_argument("--side", choices=["ours", "trl"], help="internal: measure one side")
    parser.add_argument("--result", help="internal: where to write what was measured")
    args = parser.parse_args()
    if args.side is None:
        for case in args.cases:
            print(json.dumps(compare(args, case)), flush=True)
        return
    (case,) = args.cases
    if args.side == "ours":
        result = run_ours(
            args.model, case, args.repeats, args.layout, args.checkpoint_every, args.recompute_granularity
        )
    else:
        result = run_trl(args.model, case, args.repeats)
    torch.save(result, args.result)


if __name__ == "__main__":
    main()
