"""The built-in losses: by what each is averaged, what it is in a sentence, and the papers it is from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A paper on arXiv.

    `key` is that of its BibTeX entry, `title` is in full, `eprint` is its number on arXiv, and `year` that of its
    first version. `author` is written as BibTeX has it, and empty where the entry names none.
    """

    key: str
    title: str
    eprint: str
    year: int
    author: str = ""

    def bibtex(self) -> str:
        """The BibTeX entry of the paper."""
        author = f"  author        = {{{self.author}}},\n" if self.author else ""
        return (
            f"@misc{{{self.key},\n  title         = {{{{{self.title}}}}},\n{author}"
            f"  year          = {{{self.year}}},\n  eprint        = {{{self.eprint}}},\n  archivePrefix = {{arXiv}}\n}}"
        )


GRPO = Paper(
    "shao2024deepseekmath",
    "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
    "2402.03300",
    2024,
    "Shao, Zhihong and others",
)
DAPO = Paper(
    "yu2025dapo",
    "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
    "2503.14476",
    2025,
    "Yu, Qiying and others",
)
DR_GRPO = Paper(
    "liu2025understanding",
    "Understanding R1-Zero-Like Training: A Critical Perspective",
    "2503.20783",
    2025,
    "Liu, Zichen and others",
)
CISPO = Paper(
    "minimax2025m1",
    "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention",
    "2506.13585",
    2025,
    "MiniMax and others",
)
SAPO = Paper("gao2025sapo", "Soft Adaptive Policy Optimization", "2511.20347", 2025)
LUSPO = Paper(
    "luspo2026",
    "Length-Unbiased Sequence Policy Optimization: Revealing and Controlling Response Length Variation in RLVR",
    "2602.05261",
    2026,
)
VESPO = Paper(
    "vespo2026",
    "VESPO: Variational Sequence-Level Soft Policy Optimization for Stable Off-Policy LLM Training",
    "2602.10693",
    2026,
)
GSPO = Paper("zheng2025gspo", "Group Sequence Policy Optimization", "2507.18071", 2025, "Zheng, Chujie and others")
INTELLECT_2 = Paper(
    "primeintellect2025intellect2",
    "INTELLECT-2: A Reasoning Model Trained Through Globally Decentralized Reinforcement Learning",
    "2505.07291",
    2025,
    "Prime Intellect Team",
)
DEEPSEEK_V3_2 = Paper(
    "deepseekai2025v32",
    "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models",
    "2512.02556",
    2025,
    "DeepSeek-AI",
)
PPO = Paper(
    "schulman2017ppo", "Proximal Policy Optimization Algorithms", "1707.06347", 2017, "Schulman, John and others"
)
DISTILLATION = Paper(
    "hinton2015distilling",
    "Distilling the Knowledge in a Neural Network",
    "1503.02531",
    2015,
    "Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff",
)


@dataclass(frozen=True)
class LossType:
    """One built-in loss.

    `aggregation` says how its token losses are weighed: `"token"` (mean over the trained tokens of the step),
    `"rollout"` (mean over rollouts of means over tokens), `"rollout_sum"` (mean over rollouts of sums over tokens) or
    `"constant"` (sum over tokens and mean over rollouts, divided by `max_completion_length`). `meaning` follows its
    name in the help of `--loss_type`. `papers` are those that it is from; docs/losses.md says what each gives.
    `is_clipped` says whether it clips the importance ratio to an interval around 1.
    """

    aggregation: str
    meaning: str
    papers: tuple[Paper, ...] = ()
    is_clipped: bool = False


BUILT_IN_LOSSES: dict[str, LossType] = {
    "weighted_sft": LossType("token", "advantage-weighted cross entropy, averaged over the tokens of the step."),
    "grpo": LossType(
        "rollout", "clipped importance ratio, averaged over rollouts of means over tokens.", (GRPO,), is_clipped=True
    ),
    "dr_grpo": LossType("constant", "clipped importance ratio, divided by a constant.", (DR_GRPO,), is_clipped=True),
    "bnpo": LossType("token", "the same as `dapo` at a split-invariant denominator.", (GRPO,), is_clipped=True),
    "dapo": LossType(
        "token", "clipped importance ratio, averaged over the tokens of the step.", (DAPO,), is_clipped=True
    ),
    "cispo": LossType("token", "capped importance ratio as a weight.", (CISPO,)),
    "sapo": LossType("rollout", "smooth gate instead of clipping.", (SAPO,)),
    "luspo": LossType(
        "rollout_sum",
        "clipped importance ratio, averaged over rollouts of sums over tokens.",
        (LUSPO,),
        is_clipped=True,
    ),
    "vespo": LossType("token", "smooth weight of the ratio of the whole rollout instead of clipping.", (VESPO,)),
}
"""The values of `loss_type`. What each computes stands in `losses.py`."""

LOSS_TYPES = tuple(BUILT_IN_LOSSES)
AGGREGATIONS = {name: loss.aggregation for name, loss in BUILT_IN_LOSSES.items()}
CLIPPED_LOSS_TYPES = tuple(name for name, loss in BUILT_IN_LOSSES.items() if loss.is_clipped)


def papers_of(options: Mapping[str, object]) -> list[Paper]:
    """The papers of the loss of a run, each once. `options` are the values of `AtroposConfig`, all of them that
    concern the loss.
    """
    papers = list(BUILT_IN_LOSSES[str(options["loss_type"])].papers)
    used = (
        (options["importance_sampling_level"] == "sequence", GSPO),
        (options["delta"] is not None, INTELLECT_2),
        (options["off_policy_mask_threshold"] is not None, DEEPSEEK_V3_2),
        (bool(options["beta"]) and bool(options["use_bias_correction_kl"]), DEEPSEEK_V3_2),
        (bool(options["beta"]) and not options["use_bias_correction_kl"], GRPO),
        (bool(options["entropy_coef"]), PPO),
        (bool(options["distillation_coef"]), DISTILLATION),
    )
    papers += [paper for is_used, paper in used if is_used]
    return list(dict.fromkeys(papers))
