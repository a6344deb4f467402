"""Draw the last frame of the live panel from the recording of a terminal, for the documents.

Usage:
    script -c "python examples/scripts/atropos.py ..." recording
    python packaging/panel_image.py recording panel.svg
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text


def last_frame(recording: str) -> str:
    """What the panel showed at its end, with its colours."""
    start = recording.rindex("╭─")
    frame = recording[start : recording.index("╯", start) + 1]
    # Its top left corner follows the colour of the border.
    return "\x1b[36m" + re.sub(r"\x1b\[\?25[lh]|\r", "", frame)


def main() -> None:
    """Read a recording and write an SVG."""
    source, target = sys.argv[1:]
    frame = Text.from_ansi(last_frame(Path(source).read_text(encoding="utf-8", errors="replace")))
    width = max(len(line) for line in frame.plain.splitlines())
    console = Console(file=io.StringIO(), record=True, width=width, force_terminal=True)
    console.print(frame)
    # No fonts from the network: the page's own monospaced one.
    svg = re.sub(r"@font-face \{.*?\}", "", console.export_svg(title=""), flags=re.DOTALL)
    Path(target).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
