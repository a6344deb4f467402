"""What a run uploads to the Hub, through the real client of the Hub, and what a failed upload does to it: nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from hub_runs import NUM_STEPS, trainer
from hub_standin import READ_TOKEN, TOKEN, HubStandin
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tiny_models import byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import ModelConfig

from trl_atropos import AtroposConfig, AtroposParser
from trl_atropos.cli.push_run import Push, run_push
from trl_atropos.errors import HubUploadError, PreflightError
from trl_atropos.loss.loss_types import BUILT_IN_LOSSES


MODEL_FILES = {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}
DESCRIPTION = {"README.md", "reward.png", "training_config.yaml"}


def stored(hub: HubStandin, repo: str, directory: Path, revision: str = "main") -> Path:
    """What lies in a repository, as a directory."""
    for name, content in hub.files[repo][revision].items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def equal(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def test_the_trained_model_is_on_the_hub_with_what_tells_of_it(hub, tmp_path, data_path, base_model):
    run = trainer(tmp_path, data_path, base_model)
    run.train()
    run.push_to_hub()
    tree = hub.files["user/model"]["main"]
    assert set(tree) == {*MODEL_FILES, *DESCRIPTION, "generation_config.json"}
    directory = stored(hub, "user/model", tmp_path / "stored")
    assert equal(AutoModelForCausalLM.from_pretrained(directory).state_dict(), run.model.state_dict())
    assert AutoTokenizer.from_pretrained(directory)("abc").input_ids == byte_tokenizer()("abc").input_ids
    # Steps of 2 and 4 are saved, every save is pushed while training goes on; the final push has the same message as TRL's.
    assert [message for _, _, message in hub.commits][-1] == "End of training"
    assert all(message.startswith("Training in progress") for _, _, message in hub.commits[:-1])
    assert list((tmp_path / "out").glob("_hub_upload_*")) == []


def test_the_card_tells_how_to_do_it_again(hub, tmp_path, data_path, base_model):
    run = trainer(tmp_path, data_path, base_model, hub_strategy="end", beta=0.1, ref_logprobs="recompute")
    run.train()
    run.push_to_hub()
    text = hub.files["user/model"]["main"]["README.md"].decode()
    card = ModelCard(text)
    assert card.data.library_name == "transformers" and {"trl", "atropos"} <= set(card.data.tags)
    assert (tmp_path / "out" / "README.md").read_text() == text
    rewards = [entry["reward"] for entry in run.state.log_history if "reward" in entry]
    first, last = sum(rewards[:2]) / 2, sum(rewards[2:]) / 2
    assert f"first 2 logged steps: {first:.3f}; of the last 2: **{last:.3f}**" in text
    assert "| capitals | 50% |" in text and "| word\\|problems | 50% |" in text
    assert "`base`, a model that is not on the Hub" in text and "None" not in text
    assert "`beta` 0.1" in text and "yu2025dapo" in text and "deepseekai2025v32" in text and "@misc{atropos" in text
    assert "- vllm: " in text and "```bash\npython " in text
    assert hub.files["user/model"]["main"]["reward.png"].startswith(b"\x89PNG")


def test_the_configuration_on_the_hub_is_that_of_the_run(hub, tmp_path, data_path, base_model):
    options = {"advantage_clipping": [-1.0, 2.0], "lr_scheduler_type": "cosine", "hub_token": TOKEN}
    run = trainer(tmp_path, data_path, base_model, lora=True, hub_strategy="end", **options)
    run.train()
    run.push_to_hub()
    content = hub.files["user/model"]["main"]["training_config.yaml"]
    assert TOKEN.encode() not in content
    path = tmp_path / "again.yaml"
    path.write_bytes(content)
    arguments = ["--config", str(path), "--output_dir", str(tmp_path / "again"), "--report_to", "none"]
    args, model_args = AtroposParser((AtroposConfig, ModelConfig)).parse_args_and_config(arguments)
    assert (args.advantage_clipping, args.learning_rate, args.lr_scheduler_type) == ([-1.0, 2.0], 1e-2, "cosine")
    assert (args.env_names, args.data_path) == (run.args.env_names, data_path)
    assert (model_args.model_name_or_path, model_args.use_peft, model_args.lora_r) == (base_model, True, 2)
    assert model_args.lora_target_modules == ["q_proj", "v_proj"]
    ours = {"output_dir", "run_name", "logging_dir", "push_to_hub", "hub_model_id", "hub_token", "hub_strategy"}
    differing = {name for name, value in args.to_dict().items() if value != run.args.to_dict()[name]}
    assert differing <= ours


def test_an_adapter_is_pushed_as_adapter_and_merged(hub, tmp_path, data_path, base_model, caplog):
    run = trainer(tmp_path, data_path, base_model, lora=True, hub_strategy="end", push_merged=True)
    run.train()
    run.push_to_hub()
    assert "adapter_model.safetensors" in hub.files["user/model"]["main"]
    assert "model.safetensors" not in hub.files["user/model"]["main"]
    assert f"The adapter names the directory {base_model}" in caplog.text
    adapted = AutoPeftModelForCausalLM.from_pretrained(stored(hub, "user/model", tmp_path / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(stored(hub, "user/model-merged", tmp_path / "stored"))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-5)
    assert not equal(merged.state_dict(), tiny_llama(vocab_size=257).state_dict()), "the delta is in it"
    text = hub.files["user/model-merged"]["main"]["README.md"].decode()
    assert "The adapter [user/model](https://huggingface.co/user/model) is merged into it." in text


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [("checkpoint", {"last-checkpoint"}), ("all_checkpoints", {"checkpoint-2", "checkpoint-4"})],
)
def test_checkpoints_go_to_the_hub_whole_without_the_pickled_options(
    hub, tmp_path, data_path, base_model, strategy, folders
):
    run = trainer(tmp_path, data_path, base_model, hub_strategy=strategy, hub_always_push=True, save_total_limit=1)
    run.train()
    tree = hub.files["user/model"]["main"]
    assert {name.partition("/")[0] for name in tree if "/" in name} == folders
    files = {path.name for path in (tmp_path / "out" / "checkpoint-4").iterdir()}
    for folder in folders:
        assert {name.partition("/")[2] for name in tree if name.startswith(f"{folder}/")} == files - {
            "training_args.bin"
        }
    assert not any(name.endswith("training_args.bin") for name in tree)


@pytest.mark.parametrize("failure", [403, 400, "close"])
def test_a_failed_upload_does_not_end_training_and_can_be_made_later(
    hub, tmp_path, data_path, base_model, failure, caplog, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
    run = trainer(tmp_path, data_path, base_model)
    hub.script["batch"] = [failure]
    run.train()
    assert run.push_to_hub() is None
    assert run.state.global_step == NUM_STEPS
    assert hub.commits == []
    counted = [entry["hub/num_failed_uploads"] for entry in run.state.log_history if "loss" in entry]
    assert run._hub.num_failed >= 2 and counted == sorted(counted)
    command = f"trl-atropos push {tmp_path / 'out'} --hub_model_id user/model"
    assert command in caplog.text
    hub.script.clear()
    (url,) = run_push(Push(tmp_path / "out", "user/model"))
    assert url.startswith(hub.url)
    loaded = AutoModelForCausalLM.from_pretrained(stored(hub, "user/model", tmp_path / "stored"))
    assert equal(loaded.state_dict(), run.model.state_dict())


def test_a_tracker_that_fails_at_an_upload_does_not_end_training(hub, tmp_path, data_path, base_model, caplog):
    class Tracker(TrainerCallback):
        def on_push_begin(self, args, state, control, **kwargs):
            raise ConnectionError("no Space")

    run = trainer(tmp_path, data_path, base_model)
    run.add_callback(Tracker())
    run.train()
    assert run.push_to_hub() is not None
    assert "ConnectionError: no Space" in caplog.text and run._hub.num_failed >= 2
    assert "model.safetensors" in hub.files["user/model"]["main"]


def test_a_hub_that_is_down_at_the_start_is_tried_again(hub, tmp_path, data_path, base_model, caplog):
    hub.script["create"] = [503, 503, None]
    run = trainer(tmp_path, data_path, base_model)
    assert "HTTP 503" in caplog.text and "tried again" in caplog.text
    run.train()
    assert run.push_to_hub() is not None
    assert "README.md" in hub.files["user/model"]["main"]
    assert run._hub.num_failed == 2


@pytest.mark.parametrize(
    ("token", "options", "words"),
    [
        (None, {}, "hf auth login"),
        ("hf_wrong", {}, "hf auth login"),
        (READ_TOKEN, {}, "role write"),
        (TOKEN, {"hub_model_id": "no such/na me"}, "--hub_model_id"),
    ],
)
def test_what_can_never_be_uploaded_is_refused_before_training(
    hub, tmp_path, data_path, base_model, token, options, words, monkeypatch
):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubUploadError, match=words):
        trainer(tmp_path, data_path, base_model, **options)


def test_what_cannot_be_merged_is_refused_before_training(hub, tmp_path, data_path, base_model):
    with pytest.raises(PreflightError, match="has no adapter"):
        trainer(tmp_path, data_path, base_model, push_merged=True)
    with pytest.raises(ValueError, match="push_to_hub is not"):
        trainer(tmp_path, data_path, base_model, push_merged=True, push_to_hub=False)


def test_offline_mode_with_push_to_hub_is_refused_before_training(hub, tmp_path, data_path, base_model, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    try:
        with pytest.raises(HubUploadError, match="HF_HUB_OFFLINE"):
            trainer(tmp_path, data_path, base_model)
    finally:
        monkeypatch.undo()
        huggingface_hub.close_session()


def test_files_that_cannot_be_staged_do_not_end_training(hub, tmp_path, data_path, base_model, caplog, monkeypatch):
    def full(*args: Any, **kwargs: Any) -> str:
        raise OSError(28, "No space left on device", str(tmp_path))

    run = trainer(tmp_path, data_path, base_model)
    monkeypatch.setattr("trl_atropos.report.hub.upload.tempfile.mkdtemp", full)
    run.train()
    assert run.push_to_hub() is None
    assert "No space left on device" in caplog.text and "trl-atropos push" in caplog.text
    assert run.state.global_step == NUM_STEPS and hub.commits == []


def test_a_checkpoint_that_is_deleted_during_its_upload_arrives_whole(hub, tmp_path, data_path, base_model):
    run = trainer(tmp_path, data_path, base_model, hub_strategy="end")
    run.train()
    large = tmp_path / "out" / "checkpoint-4" / "large.safetensors"
    large.write_bytes(os.urandom(2**20 + 1))
    content = large.read_bytes()
    hub.on_commit = lambda: shutil.rmtree(tmp_path / "out" / "checkpoint-4", ignore_errors=True)
    run.args.hub_strategy = "all_checkpoints"
    run._push_from_checkpoint(str(tmp_path / "out" / "checkpoint-4"))
    run._finish_current_push()
    assert hub.files["user/model"]["main"]["large.safetensors"] == content
    assert hub.files["user/model"]["main"]["checkpoint-4/large.safetensors"] == content


def test_a_killed_run_is_pushed_from_its_newest_complete_checkpoint(hub, tmp_path, data_path, base_model):
    run = trainer(tmp_path, data_path, base_model, push_to_hub=False)
    run.train()
    out = tmp_path / "out"
    assert not (out / "model.safetensors").exists(), "nobody called save_model"
    (out / "checkpoint-4" / "trainer_state.json").unlink()
    expected = load_file(out / "checkpoint-2" / "model.safetensors")
    run_push(Push(out, "user/model", private=True, revision="draft"))
    assert hub.private == {"user/model": True}
    assert set(hub.files["user/model"]["draft"]) == {*MODEL_FILES, *DESCRIPTION, "generation_config.json"}
    directory = stored(hub, "user/model", tmp_path / "stored", "draft")
    assert equal(load_file(directory / "model.safetensors"), expected)
    assert "# Model Card for model" in (directory / "README.md").read_text()


def test_a_run_that_is_saved_at_its_end_only_has_its_card_and_configuration(hub, tmp_path, data_path, base_model):
    run = trainer(tmp_path, data_path, base_model, lora=True, push_to_hub=False, save_strategy="no")
    run.train()
    run.save_model()
    assert "### Results" in (tmp_path / "out" / "README.md").read_text()
    run_push(Push(tmp_path / "out", "user/model"))
    assert set(hub.files["user/model"]["main"]) >= {"adapter_model.safetensors", *DESCRIPTION}


def test_push_merges_an_adapter(hub, tmp_path, data_path, base_model):
    run = trainer(tmp_path, data_path, base_model, lora=True, push_to_hub=False)
    run.train()
    assert len(run_push(Push(tmp_path / "out", "user/model", merged=True))) == 2
    merged = AutoModelForCausalLM.from_pretrained(stored(hub, "user/model-merged", tmp_path / "stored"))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, run.model(ids).logits, rtol=1e-5, atol=1e-5)


def test_weights_of_a_run_before_in_the_same_directory_are_not_pushed(hub, tmp_path, data_path, base_model):
    trainer(tmp_path, data_path, base_model, push_to_hub=False).save_model()
    trainer(tmp_path, data_path, base_model, push_to_hub=False, lora=True).save_model()
    run_push(Push(tmp_path / "out", "user/model"))
    tree = hub.files["user/model"]["main"]
    assert "adapter_model.safetensors" in tree and "model.safetensors" not in tree
    trainer(tmp_path, data_path, base_model, push_to_hub=False).save_model()
    run_push(Push(tmp_path / "out", "user/whole"))
    tree = hub.files["user/whole"]["main"]
    assert "model.safetensors" in tree and not any(name.startswith("adapter") for name in tree)


def test_push_without_a_model_says_what_is_missing(tmp_path):
    with pytest.raises(PreflightError, match=r"adapter_model\.safetensors"):
        run_push(Push(tmp_path, "user/model"))


def test_merging_a_whole_model_is_refused(hub, tmp_path, base_model):
    with pytest.raises(PreflightError, match="nothing to merge"):
        run_push(Push(Path(base_model), "user/model", merged=True))


def test_every_loss_has_its_papers():
    assert {name for name, loss in BUILT_IN_LOSSES.items() if not loss.papers} == {"weighted_sft"}
