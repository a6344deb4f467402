"""How the tests of verl's trainer run launched_trainer.py, with the Python that has verl."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from trl_atropos.cli.launch.processes import free_port


ROOT = Path(__file__).resolve().parent.parent.parent
VERL_PYTHON = os.environ.get("TRL_ATROPOS_VERL_PYTHON")
LAUNCHED = Path(__file__).with_name("launched_trainer.py")
TIMEOUT_S = 400

needs_verl = pytest.mark.skipif(
    VERL_PYTHON is None, reason="TRL_ATROPOS_VERL_PYTHON names no Python that has verl (docs/verl.md)"
)


def case(name: str, action: str, model: Path, output_dir: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    """A run of launched_trainer.py in float32, with `options` of the section `atropos`."""
    given = [f"+atropos.{key}={json.dumps(value)}" for key, value in options.items()]
    return {
        "name": name,
        "action": action,
        "overrides": [
            *(f"model.path={model}", "model.use_remove_padding=false", "model.enable_gradient_checkpointing=false"),
            "+model.override_config.attn_implementation=sdpa",
            *("data.max_length=32", "data.use_dynamic_bsz=false", "data.micro_batch_size_per_gpu=8"),
            *("+engine.mixed_precision.param_dtype=fp32", "+engine.mixed_precision.reduce_dtype=fp32"),
            *("optim.lr=1e-3", "optim.weight_decay=0.0", "optim.clip_grad=1e9"),
            *("trainer.device=cpu", "trainer.logger=[]", "trainer.total_epochs=1", "trainer.resume_mode=disable"),
            f"trainer.default_local_dir={output_dir}",
            *overrides,
            *given,
        ],
    }


def launch(num_ranks: int, cases: list[dict[str, Any]], directory: Path) -> dict[str, Any]:
    """Run the cases on so many ranks, and return what each gave by its name."""
    cases_path, output = directory / f"cases{num_ranks}.json", directory / f"output{num_ranks}.json"
    cases_path.write_text(json.dumps(cases))
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")},
        "PYTHONPATH": str(ROOT),
        "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": "trl_atropos.verl.cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    command = [
        *(str(VERL_PYTHON), "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node", str(num_ranks)),
        *("--master_port", str(free_port()), str(LAUNCHED), str(cases_path), str(output)),
    ]
    result = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return json.loads(output.read_text())
