"""A tiny run that somebody watches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_models import tiny_llama

from trl_atropos import AtroposConfig, AtroposTrainer


NUM_STEPS = 3


def trained(tmp_path: Path, **options: Any) -> AtroposTrainer:
    data_path = tmp_path / "data.jsonl"
    group = {
        "tokens": [[5, 6, 7, 8], [5, 6, 7, 9]],
        "masks": [[-100, -100, 7, 8], [-100, -100, 7, 9]],
        "scores": [0.0, 1.0],
        "inference_logprobs": [[1.0, 1.0, -3.0, -3.0]] * 2,
        "env_id": 0,
    }
    data_path.write_text((json.dumps(group) + "\n") * NUM_STEPS)
    args = AtroposConfig(
        output_dir=str(tmp_path / "out"),
        data_path=str(data_path),
        per_device_train_batch_size=2,
        max_length=16,
        env_names=["capitals"],
        use_cpu=True,
        save_strategy="no",
        run_name="a run",
        **options,
    )
    trainer = AtroposTrainer(tiny_llama(), args)
    trainer.train()
    return trainer
