"""What the documents need beyond MkDocs: formulas as MathML, so that no script has to be loaded, and links into the code."""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert


BLOCK = re.compile(r"^```math\n(.*?)\n```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"\$`([^`]+)`\$")
INTO_THE_CODE = re.compile(r"\[(`[^]]+`)\]\(\.\./[^)]+\)")
REFERENCE = re.compile(r"\[<code>~?(?:[\w.]+\.)?(\w+)</code>\]")
TYPE = re.compile(r"<code>([^<]*`[^<]*)</code>")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace GitHub's notation of formulas; links to files of the repository become their text."""
    markdown = BLOCK.sub(lambda match: convert(match[1], display="block"), markdown)
    # Inside of an element of a line, because Python-Markdown takes <math> at the start of a line for a block.
    markdown = INLINE.sub(lambda match: f"<span>{convert(match[1])}</span>", markdown)
    return INTO_THE_CODE.sub(r"\1", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Show what Hugging Face's docstrings mark up (`[`~module.Class`]`, `*optional*`) as plain code."""
    html = REFERENCE.sub(r"<code>\1</code>", html)
    return TYPE.sub(lambda match: f"<code>{_plain(match[1])}</code>", html)


def _plain(text: str) -> str:
    text = re.sub(r"\[`~?(?:[\w.]+\.)?(\w+)`\]", r"\1", text)
    return text.replace("`", "").replace("*optional*", "optional")
