"""A publish where neither TRL nor vLLM is installed, as beside another trainer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


TESTS = Path(__file__).resolve().parents[1]

PROGRAM = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("trl", "vllm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
sys.path.insert(0, sys.argv[1])
from scripted_server import ScriptedServer
from tiny_models import tiny_llama
from trl_atropos import AtroposVLLMClient

def policy(seed):
    return tiny_llama(seed=seed, vocab_size=64, num_layers=1, initializer_range=0.1)

with ScriptedServer(policy(1)) as server:
    client = AtroposVLLMClient(server.base_url, connection_timeout=5, request_timeout=10)
    with client.weight_sync(1) as sync:
        sync.push(policy(2))
    print(client.get_weight_version(), sync.report.probe.mean_abs_diff < 0.05, hasattr(client, "generate"))
"""


def test_the_client_publishes() -> None:
    command = [sys.executable, "-c", PROGRAM, str(TESTS)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, timeout=120)
    assert (result.returncode, result.stdout.strip()) == (0, "1 True False"), result.stderr
