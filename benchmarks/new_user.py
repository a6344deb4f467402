"""A new user's path, timed: clone, quickstart, the tutorial's environment, LoRA, report, upload.

    python benchmarks/new_user.py [--keep DIRECTORY]

Clones this repository into an empty directory and types what README.md and docs/tutorial.md say there, each command in a terminal
of its own kind. One JSON line per command, and one for the whole:

    command             as typed
    exit_code           0 wherever the path is right
    seconds             until it ended
    longest_silence_s   longest time in which nothing was written

The upload goes to a stand-in for the Hub on loopback (tests/hub_standin.py).
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from hub_standin import TOKEN, HubStandin  # noqa: E402


TUTORIAL = "docs/tutorial.md"
LORA = "--use_peft --lora_target_modules all-linear --learning_rate 2e-4"
LAUNCH = "trl-atropos launch -c examples/configs/quickstart_launch.yaml"


def run(command: str, directory: Path, env: dict[str, str]) -> dict[str, Any]:
    """Type a command at a terminal, show what it writes, and time it."""
    print(f"$ {command}", file=sys.stderr, flush=True)
    main, terminal = pty.openpty()
    start = last = time.monotonic()
    process = subprocess.Popen(
        ["bash", "-c", command], cwd=directory, env=env, stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    longest = 0.0
    while True:
        if select.select([main], [], [], 0.1)[0]:
            try:
                chunk = os.read(main, 65536)
            except OSError:
                break
            if not chunk:
                break
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
            sys.stderr.write(chunk.decode(errors="replace"))
        elif process.poll() is not None:
            break
    longest = max(longest, time.monotonic() - last)
    os.close(main)
    return {
        "command": command,
        "exit_code": process.wait(),
        "seconds": round(time.monotonic() - start, 1),
        "longest_silence_s": round(longest, 1),
    }


def main() -> int:
    """Walk the path and print the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="walk in this directory, which must not exist, and leave it there")
    args = parser.parse_args()
    directory = args.keep or Path(tempfile.mkdtemp()) / "path"
    directory.mkdir(parents=True)
    clone = directory / "trl_atropos"
    with HubStandin() as hub:
        # As after `source .venv/bin/activate`.
        env = {**os.environ, "PATH": f"{clone}/.venv/bin:{os.environ['PATH']}", "TERM": "xterm-256color"}
        env |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        lines = [run(f"git clone -q {ROOT} trl_atropos", directory, env)]
        lines.append(run("make quickstart", clone, env))
        # What the reader saves.
        (code,) = re.findall(r"```python\n(.*?)```", (clone / TUTORIAL).read_text(), flags=re.DOTALL)
        (clone / "my_env.py").write_text(code)
        for command in (
            f"{LAUNCH.replace('launch', 'preflight', 1)}",
            f"{LAUNCH} --run_dir runs/opposites -- python my_env.py serve",
            f'{LAUNCH} --run_dir runs/opposites-lora --trainer_args "{LORA}" -- python my_env.py serve',
            "trl-atropos report runs/opposites",
            "trl-atropos push runs/opposites --hub_model_id user/opposites",
        ):
            lines.append(run(command, clone, env))
        uploaded = sorted(hub.files.get("user/opposites", {}).get("main", {}))
    rewards = {
        name: {key: round(summary[key], 3) for key in ("reward_first", "reward_last")}
        for name in ("quickstart", "opposites", "opposites-lora")
        if (path := clone / "runs" / name / "summary.json").exists() and (summary := json.loads(path.read_text()))
    }
    for line in lines:
        print(json.dumps(line))
    print(
        json.dumps(
            {
                "num_commands": len(lines),
                "seconds": round(sum(line["seconds"] for line in lines), 1),
                "longest_silence_s": max(line["longest_silence_s"] for line in lines),
                "rewards": rewards,
                "uploaded": uploaded,
            }
        ),
        flush=True,
    )
    if args.keep is None:
        shutil.rmtree(directory.parent)
    return int(any(line["exit_code"] for line in lines))


if __name__ == "__main__":
    sys.exit(main())
