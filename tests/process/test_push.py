"""Pushing to the Hub from several ranks, and from the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fork_server
from hub_runs import base_model, data_path, hub, trainer  # noqa: F401
from hub_standin import TOKEN
from launcher import run_launcher

from trl_atropos.cli.main import main


def test_two_ranks_push_once(hub, tmp_path, data_path, base_model):  # noqa: F811
    script = tmp_path / "two_ranks.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "import huggingface_hub.constants\n"
        # Read from the environment when a process imports it, and this one is a fork.
        f"huggingface_hub.constants.ENDPOINT = {hub.url!r}\n"
        "huggingface_hub.constants.HF_HUB_DISABLE_XET = True\n"
        "huggingface_hub.constants.HF_HUB_OFFLINE = False\n"
        "from hub_runs import trainer\n"
        f"options = dict(lora=True, push_merged=True, per_device_train_batch_size=1, ddp_backend='gloo')\n"
        f"run = trainer(Path({str(tmp_path)!r}), {data_path!r}, {base_model!r}, **options)\n"
        "run.train()\n"
        "run.save_model()\n"
        "run.push_to_hub()\n"
    )
    status, log = run_launcher(
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", fork_server.PROGRAM, script],
        timeout_s=300,
        environment={"HF_TOKEN": TOKEN},
    )
    assert status == 0, log
    assert "adapter_model.safetensors" in hub.files["user/model"]["main"]
    assert "model.safetensors" in hub.files["user/model-merged"]["main"]
    repos = [repo for repo, _, message in hub.commits if not message.startswith("Training in progress")]
    assert set(repos) == {"user/model", "user/model-merged"}


def test_push_on_the_command_line(hub, tmp_path, data_path, base_model, monkeypatch, capsys):  # noqa: F811
    run = trainer(tmp_path, data_path, base_model, push_to_hub=False)
    run.train()
    command = ["push", str(tmp_path / "out"), "--hub_model_id", "user/model"]
    capsys.readouterr()
    assert main([*command, "--dry_run"]) == 0
    assert "model.safetensors" in capsys.readouterr().out and hub.requests == []
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(command) == 1
    assert capsys.readouterr().err.count("hf auth login") == 1 and hub.commits == []
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    pushed = subprocess.run(
        [sys.executable, "-m", "trl_atropos.cli.main", *command],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert pushed.returncode == 0, pushed.stderr
    assert hub.url in pushed.stdout and "model.safetensors" in hub.files["user/model"]["main"]
