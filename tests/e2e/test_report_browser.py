"""A report in a real browser: it fits a phone and a desk, asks for nothing, and the console stays empty."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from trl_atropos.report.page import write_report
from trl_atropos.report.plots import PLOTS
from trl_atropos.report.run_files import read_run_files


BROWSER = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
WIDTHS = (400, 1280)

# The page itself may run no script, so that another page looks into it.
LOOK = """<!DOCTYPE html><link rel="icon" href="data:,"><body><pre id="seen"></pre><script>
const seen = {}
for (const width of %s) {
  const frame = document.createElement("iframe")
  frame.style.width = width + "px"
  frame.onload = () => {
    const page = frame.contentDocument
    const svgs = [...page.querySelectorAll("svg")]
    seen[width] = {
      width: frame.clientWidth,
      scrolled: page.documentElement.scrollWidth,
      title: page.title,
      requests: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
      num_drawn: svgs.filter(svg => svg.getBoundingClientRect().width > width / 5).length,
      text: page.body.innerText,
    }
    document.getElementById("seen").textContent = JSON.stringify(seen)
  }
  frame.src = "report.html"
  document.body.append(frame)
}
</script>"""


def look(directory: Path) -> tuple[dict[str, Any], str]:
    """Open report.html at every width; return what is seen there and what the console said."""
    if BROWSER is None:
        assert os.environ.get("CI") != "true", "No chromium on PATH: run packaging/install_chromium.sh."
        pytest.skip("no chromium on PATH: run packaging/install_chromium.sh")
    (directory / "look.html").write_text(LOOK % json.dumps(WIDTHS))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [
        "--enable-logging=stderr",
        f"--user-data-dir={directory / 'profile'}",
    ]
    # Not file://, whose requests a browser does not list.
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(directory)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command += ["--virtual-time-budget=10000", "--dump-dom", f"http://127.0.0.1:{server.server_port}/look.html"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    finally:
        server.shutdown()
        server.server_close()
    found = re.search(r'<pre id="seen">(.+?)</pre>', result.stdout, flags=re.DOTALL)
    assert found, result.stderr
    console = "\n".join(line for line in result.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(html.unescape(found[1])), console


def write_page(directory: Path) -> None:
    series = [key for plot in PLOTS for key in plot.series if "/" in key or key in ("reward", "kl", "entropy")]
    history = [
        {"step": step, "loss": 0.5, "step_time": 4.0, "num_tokens": 100.0 * step, "num_trained_tokens": 20.0}
        | dict.fromkeys(series, 0.25)
        for step in range(1, 30)
    ]
    (directory / "completions").mkdir()
    row = {"step": 1, "prompt": "2 + 2", "completion": "x" * 900, "environment": "e" * 200, "reward": 1.0}
    pd.DataFrame([row | {"advantage": 0.5}]).to_parquet(directory / "completions" / "completions_00001.parquet")
    write_report(read_run_files(directory, history), directory / "report.html")


def test_a_report_fits_phone_and_desk_and_asks_for_nothing(tmp_path):
    write_page(tmp_path)
    seen, console = look(tmp_path)
    assert console == ""
    for width in WIDTHS:
        page = seen[str(width)]
        assert page["scrolled"] <= page["width"] == width
        assert page["requests"] == []
        assert page["num_drawn"] == len(PLOTS)
        assert page["title"] == f"Report of {tmp_path.name}"
        assert "x" * 900 in page["text"]


def test_the_look_at_a_page_sees_what_is_wrong_with_it(tmp_path):
    (tmp_path / "report.html").write_text(
        '<!DOCTYPE html><link rel="icon" href="data:,"><img src="missing.png"><script>console.error("wrong")</script>'
        '<div style="width: 3000px">wide</div>'
    )
    seen, console = look(tmp_path)
    assert "wrong" in console
    assert seen["400"]["scrolled"] >= 3000
    assert [name.rpartition("/")[2] for name in seen["400"]["requests"]] == ["missing.png"]
