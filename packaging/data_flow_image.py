"""Draw docs/images/data_flow.svg.

Usage: python packaging/data_flow_image.py
"""

from __future__ import annotations

from html import escape
from pathlib import Path


TARGET = Path(__file__).resolve().parent.parent / "docs" / "images" / "data_flow.svg"
WIDTH, HEIGHT = 980, 470

# x, y, width, height, title, lines
BOXES = {
    "envs": (
        30,
        40,
        260,
        120,
        "Environments",
        ("python my_env.py serve", "prompts, scoring, tools", "one or many, unmodified"),
    ),
    "vllm": (
        30,
        310,
        260,
        120,
        "vLLM server",
        ("trl vllm-serve", "completions with logprobs", "always on the newest policy"),
    ),
    "api": (370, 40, 220, 120, "Atropos API", ("run-api", "queue of scored groups")),
    "data": (
        670,
        40,
        280,
        120,
        "Data plane, rank 0",
        ("journal on disk, then checks", "policy versions, staleness", "quarantine, dealing to the ranks"),
    ),
    "train": (
        670,
        230,
        280,
        200,
        "AtroposTrainer, every rank",
        (
            "prefix tree, packed or padded",
            "logprobs at trained tokens",
            "loss exact at any split",
            "optimizer step",
            "metrics, report, Hub",
        ),
    ),
    "publish": (
        370,
        310,
        220,
        120,
        "Publish",
        ("pause, transfer, resume", "NCCL, shared memory, gloo", "proven to have arrived"),
    ),
}
ARROWS = (
    ((110, 160), (110, 310), "1 completions", (118, 225), "start"),
    ((210, 310), (210, 160), "tokens, logprobs", (218, 255), "start"),
    ((290, 100), (370, 100), "2 scored", (330, 88), "middle"),
    ((590, 100), (670, 100), "3 batch", (630, 88), "middle"),
    ((810, 160), (810, 230), "4 rollouts", (820, 200), "start"),
    ((670, 370), (590, 370), "5 weights", (630, 358), "middle"),
    ((370, 370), (290, 370), "6 version n", (330, 358), "middle"),
)


def draw() -> str:
    """The picture, with colours that stand out on a light and on a dark page."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="sans-serif">',
        "<title>Rollouts go from environments through the Atropos API and the data plane to the trainer; weights go from the "
        "trainer to the vLLM server that the environments ask</title>",
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0L10 5L0 10z" fill="#3b82c4"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
    ]
    for x, y, width, height, title, lines in BOXES.values():
        parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="#f2f6fa" stroke="#3b82c4"/>'
        )
        parts.append(
            f'<text x="{x + 14}" y="{y + 28}" font-size="17" font-weight="bold" fill="#1c2b39">{escape(title)}</text>'
        )
        for index, line in enumerate(lines):
            parts.append(
                f'<text x="{x + 14}" y="{y + 54 + 23 * index}" font-size="14" fill="#3c4b59">{escape(line)}</text>'
            )
    for (x1, y1), (x2, y2), label, (x, y), anchor in ARROWS:
        parts.append(f'<path d="M{x1} {y1}L{x2} {y2}" stroke="#3b82c4" stroke-width="2" marker-end="url(#head)"/>')
        parts.append(
            f'<text x="{x}" y="{y}" font-size="13" text-anchor="{anchor}" fill="#b0551a">{escape(label)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
