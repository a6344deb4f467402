"""Upstream's own tests of its API, as they ship in the wheel, against `trl-atropos api` in place of `run-api`.

They start `python -m atroposlib.cli.run_api` on port 8000, which stands in their text: hence a network namespace of their own,
and a package earlier on the path whose `run_api` is ours.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import atroposlib
import pytest

import trl_atropos


UPSTREAM = Path(atroposlib.__file__).parent / "tests"
FILES = (
    "test_api_compression.py",
    "test_api_messages_handling.py",
    "test_utils/test_heterogeneous_batching.py",
    "test_utils/test_heterogeneous_packing.py",
    "test_utils/test_min_batch_allocation.py",
)
NUM_TESTS = 66
"""All of these files, which also pass against `run-api`."""

REFUSED_ON_PURPOSE = {
    # Four advantages for three tokens, which no trainer can use: token-level advantages are one number a token. Ragged lists
    # are refused when they are posted, and not when a trainer has them in a batch with others.
    "TestSFTIntegration::test_sft_batch_processing",
    "TestWeirdMessageFormats::test_messages_with_numeric_strings_as_content",
}
"""Tests of upstream that post what this API refuses, and expect that it is taken."""

PACKAGE = """
from importlib.machinery import PathFinder
import sys
real = PathFinder.find_spec("atroposlib", [entry for entry in sys.path if entry != {shim!r}])
__path__ = [{shim!r} + "/atroposlib", *real.submodule_search_locations]
"""
RUN_API = """
import sys
from pathlib import Path
from trl_atropos.cli.main import main
Path({marker!r}).touch()
sys.exit(main(["api", "--db", {database!r}, *sys.argv[1:]]))
"""
# Python, because the programs `ip` and `ifconfig` are not everywhere: SIOCSIFFLAGS with IFF_UP | IFF_RUNNING.
LOOPBACK_UP = (
    "import fcntl, socket, struct; fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sH14s', b'lo', 0x41, b''))"
)


def namespace() -> list[str]:
    """The command that runs another one in a network namespace of its own; skips where there is none."""
    program = shutil.which("unshare")
    for flags in (["-rn"], ["-n"]):
        if (
            program is not None
            and subprocess.run(
                [program, *flags, sys.executable, "-c", LOOPBACK_UP], capture_output=True, timeout=30
            ).returncode
            == 0
        ):
            return [program, *flags]
    pytest.skip("this machine gives no network namespace (unshare -n), and the tests have port 8000 in their text")


def test_upstreams_tests_pass_unmodified_but_for_those_that_post_what_nobody_can_train(tmp_path):
    prefix = namespace()
    shim = tmp_path / "shim"
    (shim / "atroposlib" / "cli").mkdir(parents=True)
    (shim / "atroposlib" / "__init__.py").write_text(PACKAGE.format(shim=str(shim)))
    (shim / "atroposlib" / "cli" / "__init__.py").touch()
    marker = tmp_path / "was_started"
    (shim / "atroposlib" / "cli" / "run_api.py").write_text(
        RUN_API.format(marker=str(marker), database=str(tmp_path / "api.db"))
    )
    command = [sys.executable, "-c", f"{LOOPBACK_UP}; import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"]
    arguments = ["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), *(str(UPSTREAM / name) for name in FILES)]
    paths = [str(shim), str(Path(trl_atropos.__file__).parent.parent)]

    result = subprocess.run(
        [*prefix, *command, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert marker.exists(), result.stderr
    failed = re.findall(r"^(?:FAILED|ERROR) \S*?::(\S+)", result.stdout, re.M)
    assert set(failed) == REFUSED_ON_PURPOSE, result.stdout[-5000:] + result.stderr[-2000:]
    assert f"{len(failed)} failed, {NUM_TESTS - len(failed)} passed" in result.stdout
    assert "skipped" not in result.stdout.splitlines()[-1]
