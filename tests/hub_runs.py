"""A tiny run that pushes to a stand-in of the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from hub_standin import TOKEN, HubStandin
from peft import LoraConfig
from tiny_models import byte_tokenizer, tiny_llama

from trl_atropos import AtroposConfig, AtroposTrainer


NUM_STEPS = 4


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandin]:
    with HubStandin() as standin:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", standin.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield standin


@pytest.fixture
def data_path(tmp_path: Path) -> str:
    path = tmp_path / "data.jsonl"
    groups = [
        {
            "tokens": [[5, 6, 7 + number, 8 + i] for i in range(2)],
            "masks": [[-100, -100, 7 + number, 8 + i] for i in range(2)],
            "scores": [0.0, 1.0 + number],
            "inference_logprobs": [[1.0, 1.0, -3.0, -3.0]] * 2,
            "env_id": number % 2,
        }
        for number in range(NUM_STEPS)
    ]
    path.write_text("".join(json.dumps(group) + "\n" for group in groups))
    return str(path)


@pytest.fixture
def base_model(tmp_path: Path) -> str:
    path = tmp_path / "base"
    tiny_llama(vocab_size=257).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


def trainer(tmp_path: Path, data_path: str, base_model: str, **options: Any) -> AtroposTrainer:
    lora = options.pop("lora", False)
    args = AtroposConfig(
        output_dir=str(tmp_path / "out"),
        data_path=data_path,
        learning_rate=1e-2,
        max_length=16,
        report_to="none",
        use_cpu=True,
        env_names=["word|problems", "capitals"],
        **{
            "per_device_train_batch_size": 2,
            "save_steps": 2,
            "push_to_hub": True,
            "hub_model_id": "user/model",
            "report_html": False,
            **options,
        },
    )
    peft_config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None
    return AtroposTrainer(base_model, args, processing_class=byte_tokenizer(), peft_config=peft_config)
