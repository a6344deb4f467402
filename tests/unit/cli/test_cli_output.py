"""What a launch shows on a terminal and writes into the combined log."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from trl_atropos.cli.launch.output import LaunchOutput


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.02)


def plain_console() -> tuple[Console, io.StringIO]:
    shown = io.StringIO()
    return Console(file=shown, width=80, highlight=False, soft_wrap=True), shown


def write(path: Path, data: bytes) -> None:
    with path.open("ab") as log:
        log.write(data)


def test_lines_are_copied_when_they_are_whole_and_the_last_one_at_the_end(tmp_path: Path) -> None:
    console, _ = plain_console()
    log, combined = tmp_path / "env.log", tmp_path / "combined.log"
    write(log, b"before\n")
    with LaunchOutput(combined, console=console) as output:
        output.follow("env", log)
        write(log, b"first ha")
        wait_for(lambda: "before" in combined.read_text())
        assert "first" not in combined.read_text()
        write(log, b"lf\nno line break")
        wait_for(lambda: "first half" in combined.read_text())
    lines = [line.partition("| ")[2] for line in combined.read_text().splitlines()]
    assert lines == ["before", "first half", "no line break"]


def test_progress_bar_leaves_what_it_showed_last_and_broken_text_ends_nothing(tmp_path: Path) -> None:
    console, _ = plain_console()
    log, combined = tmp_path / "env.log", tmp_path / "combined.log"
    write(log, b"10%\r20%\r100%\n\xff\xfe broken\nwindows\r\n")
    with LaunchOutput(combined, console=console) as output:
        output.follow("env", log)
    lines = [line.partition("| ")[2] for line in combined.read_text().splitlines()]
    assert lines == ["100%", "\ufffd\ufffd broken", "windows"]


def test_log_of_a_process_that_is_started_again_goes_on(tmp_path: Path) -> None:
    console, _ = plain_console()
    log, combined = tmp_path / "api.log", tmp_path / "combined.log"
    with LaunchOutput(combined, console=console) as output:
        write(log, b"the port is taken\n")
        output.follow("api", log)
        wait_for(lambda: "is taken" in combined.read_text())
        write(log, b"ready\n")
        output.follow("api", log)
    lines = [line.partition("| ")[2] for line in combined.read_text().splitlines()]
    assert lines == ["the port is taken", "ready"]


def test_terminal_shows_the_checklist_and_the_trainer_or_everything(tmp_path: Path) -> None:
    log = tmp_path / "env.log"
    write(log, b"rollout [1/2]\n")
    for shows_all in (False, True):
        console, shown = plain_console()
        with LaunchOutput(tmp_path / "combined.log", shows_all, console) as output:
            output.follow("env", log)
            output.say("env", "starting [bold]")
            output.show("step 1")
        lines = shown.getvalue().splitlines()
        assert re.fullmatch(r"\[ +\d\.\d s\] env      starting \[bold\]", lines[0])
        assert lines[1:] == (["env      | rollout [1/2]"] if shows_all else ["step 1"])


def test_names_have_their_colours_on_a_terminal_only(tmp_path: Path) -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, color_system="standard", width=200, soft_wrap=True)
    (tmp_path / "a.log").touch()
    with LaunchOutput(tmp_path / "combined.log", console=console) as output:
        output.follow("a", tmp_path / "a.log")
        output.say("a", "ready")
    assert "\x1b[36ma       \x1b[0m ready" in shown.getvalue()  # 36 is cyan, the first colour
    assert "\x1b" not in (tmp_path / "combined.log").read_text()


def test_silence_is_broken_by_what_is_waited_for_and_the_newest_line(tmp_path: Path) -> None:
    console, shown = plain_console()
    log = tmp_path / "vllm.log"
    write(log, b'loading [weights]\nINFO:     127.0.0.1:48776 - "GET /health HTTP/1.1" 200 OK\n')
    with LaunchOutput(tmp_path / "combined.log", console=console, silence_s=0.1) as output:
        output.follow("vllm", log)
        write(tmp_path / "api.log", b"newer, but nobody waits for it\n")
        output.follow("api", tmp_path / "api.log")
        output.wait_for("launch", "waiting for vllm", ["vllm"])
        wait_for(lambda: "loading" in shown.getvalue())
    assert re.search(
        r"launch   waiting for vllm \(\d+ s\); vllm: loading \[weights\]$", shown.getvalue(), re.MULTILINE
    )
