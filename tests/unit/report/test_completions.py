"""Tables of completions: what is printed, what is in the file, what a tracker gets."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import wandb
from tiny_models import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from trl_atropos.errors import PreflightError
from trl_atropos.report.completions import CompletionsTable
from trl_atropos.types import IGNORE_INDEX, Rollout, RolloutGroup


EOS = 256


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def make_rollout(tokenizer):
    def make(*parts: tuple[str, bool], reward: float = 0.0, **fields: Any) -> Rollout:
        """A rollout of texts, each trained or not."""
        ids, labels = [], []
        for text, is_trained in parts:
            of_part = tokenizer.encode(text)
            ids += of_part
            labels += of_part if is_trained else [IGNORE_INDEX] * len(of_part)
        return Rollout(torch.tensor(ids), torch.tensor(labels), reward, **fields)

    return make


def table(tokenizer: Any, directory: Path, **options: Any) -> CompletionsTable:
    return CompletionsTable(tokenizer, directory, "none", "group", **options)


def rows(directory: Path, step: int) -> list[dict[str, Any]]:
    frame = pd.read_parquet(directory / "completions" / f"completions_{step:05d}.parquet")
    return json.loads(frame.to_json(orient="records"))


class TestFile:
    def test_a_row_for_each_rollout_with_reward_advantage_and_environment(self, tokenizer, tmp_path, make_rollout):
        first = make_rollout(("2+2=", False), ("4", True), ("<eos>", True), reward=1.0)
        second = make_rollout(("2+2=", False), ("5", True), reward=0.0)
        table(tokenizer, tmp_path, env_names=["math"]).log([RolloutGroup((first, second), 0)], 12)
        common = {"step": 12, "prompt": "2+2=", "environment": "math"}
        # Advantages: reward minus the group's mean of 0.5.
        assert rows(tmp_path, 12) == [
            {**common, "completion": "4<eos>", "reward": 1.0, "advantage": 0.5},
            {**common, "completion": "5", "reward": 0.0, "advantage": -0.5},
        ]

    def test_token_level_advantages_are_shown_as_their_mean_over_trained_tokens(
        self, tokenizer, tmp_path, make_rollout
    ):
        rollout = make_rollout(("ab", False), ("cd", True), ("e", False), ("f", True))
        sent = torch.tensor([0.0, 0.0, 3.0, 0.0, 0.0, 6.0])
        groups = [RolloutGroup((Rollout(rollout.input_ids, rollout.labels, 0.0, advantages=sent),), 0)]
        table(tokenizer, tmp_path).log(groups, 1)
        # (3 + 0 + 6) / 3
        assert rows(tmp_path, 1)[0]["advantage"] == 3

    def test_a_completion_begins_at_the_first_trained_token_and_keeps_the_turns_in_between(
        self, tokenizer, tmp_path, make_rollout
    ):
        turns = make_rollout(("ask ", False), ("call ", True), ("result ", False), ("answer", True))
        untrained = make_rollout(("nothing", False))
        table(tokenizer, tmp_path).log([RolloutGroup((turns, untrained), 0)], 1)
        found = [(row["prompt"], row["completion"]) for row in rows(tmp_path, 1)]
        assert found == [("ask ", "call result answer"), ("nothing", "")]

    def test_turns_are_split_at_the_first_of_the_assistant(self, tokenizer, tmp_path, make_rollout):
        turns = (
            {"role": "system", "content": "Be brief.", "reward": None},
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "4"},
            {"role": "user", "content": "Sure?"},
        )
        table(tokenizer, tmp_path).log([RolloutGroup((make_rollout(("a", True), messages=turns),), 0)], 1)
        (row,) = rows(tmp_path, 1)
        assert row["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
        assert row["completion"] == [{"role": "assistant", "content": "4"}, {"role": "user", "content": "Sure?"}]

    def test_examples_in_a_prompt_are_no_completions(self, tokenizer, tmp_path, make_rollout):
        example = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
        asked = [{"role": "user", "content": "2+2?"}]
        answered = [
            {"role": "assistant", "content": "add(2, 2)"},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "4"},
        ]
        texts = (("example ask ", False), ("call ", True), ("result ", False), ("answer", True))
        rollout = make_rollout(*texts, messages=(*example, *asked, *answered))
        table(tokenizer, tmp_path).log([RolloutGroup((rollout,), 0)], 1)
        (row,) = rows(tmp_path, 1)
        assert (row["prompt"], row["completion"]) == ([*example, *asked], answered)

    def test_turns_without_an_assistant_are_all_of_the_text_and_say_less_than_the_tokens(
        self, tokenizer, tmp_path, make_rollout
    ):
        # What atroposlib sends for an environment that sets `include_messages` and builds no messages.
        turns = ({"role": "user", "content": "2+2=4"},)
        rollout = make_rollout(("2+2=", False), ("4", True), messages=turns)
        table(tokenizer, tmp_path).log([RolloutGroup((rollout,), 0)], 1)
        (row,) = rows(tmp_path, 1)
        assert (row["prompt"], row["completion"]) == ("2+2=", "4")

    def test_turns_beside_text_are_written_as_json(self, tokenizer, tmp_path, make_rollout):
        turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
        groups = [
            RolloutGroup((make_rollout(("a", True), messages=turns),), 0),
            RolloutGroup((make_rollout(("c", False), ("d", True)),), 1),
        ]
        table(tokenizer, tmp_path).log(groups, 1)
        first, second = rows(tmp_path, 1)
        assert json.loads(first["completion"]) == [{"role": "assistant", "content": "b"}]
        assert second["completion"] == "d"

    def test_no_groups_make_no_file(self, tokenizer, tmp_path):
        table(tokenizer, tmp_path).log([], 1)
        assert list(tmp_path.iterdir()) == []


class TestWhatEnvironmentsMaySend:
    @pytest.mark.parametrize(
        ("turn", "content"),
        [
            ({"content": None}, ""),
            ({"content": 4}, "4"),
            ({"content": {"a": 1}}, '{"a": 1}'),
            ({"content": [{"type": "text", "text": "a"}, {"type": "image"}, "b"]}, 'a{"type": "image"}"b"'),
            # The policy wrote these arguments: they need not be JSON.
            (
                {"content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
                'x[{"function": {"name": "f", "arguments": "{"}}]',
            ),
            ({"content": "a", "thinking": 7}, "a"),
            # Half of a surrogate pair.
            ({"content": "a\ud83d"}, "a?"),
        ],
    )
    def test_any_turn_is_printed_and_written(self, tokenizer, tmp_path, make_rollout, capsys, turn, content):
        rollout = make_rollout(("a", True), messages=({"role": "assistant", **turn},))
        table(tokenizer, tmp_path).log([RolloutGroup((rollout,), 0)], 1)
        assert rows(tmp_path, 1)[0]["completion"] == [{"role": "assistant", "content": content}]
        assert "ASSISTANT" in capsys.readouterr().out

    def test_a_role_that_is_not_text(self, tokenizer, tmp_path, make_rollout):
        turns = ({"role": None, "content": "a"}, {"role": "assistant", "content": "b"})
        table(tokenizer, tmp_path).log([RolloutGroup((make_rollout(("a", True), messages=turns),), 0)], 1)
        assert rows(tmp_path, 1)[0]["prompt"] == [{"role": "None", "content": "a"}]


class TestConsole:
    @pytest.fixture
    def groups(self, make_rollout) -> list[RolloutGroup]:
        def group(env_id: int, *texts: str) -> RolloutGroup:
            return RolloutGroup(tuple(make_rollout(("ask", False), (text, True)) for text in texts), env_id)

        return [group(1, "c1", "c2"), group(0, "m1", "m2"), group(1, "c3")]

    def test_each_environment_has_a_table(self, tokenizer, tmp_path, groups, capsys):
        table(tokenizer, tmp_path, env_names=["math", "code"]).log(groups, 7)
        code, math = capsys.readouterr().out.split("Step 7")[1:]
        assert all(text in code for text in ("c1", "c2", "c3", "code"))
        assert all(text in math for text in ("m1", "m2", "math"))
        assert "m1" not in code and "c1" not in math

    @pytest.mark.parametrize(
        ("number", "printed"), [(None, (3, 2)), (5, (3, 2)), (2, (2, 2)), (1, (1, 1)), (0, (0, 0))]
    )
    def test_so_many_of_each_environment_are_printed_and_all_are_written(
        self, tokenizer, tmp_path, groups, capsys, number, printed
    ):
        table(tokenizer, tmp_path, num_completions_to_print=number).log(groups, 7)
        out = capsys.readouterr().out
        assert (sum(f"c{i}" in out for i in (1, 2, 3)), sum(f"m{i}" in out for i in (1, 2))) == printed
        assert len(rows(tmp_path, 7)) == 5

    def test_looking_does_not_change_the_run(self, tokenizer, tmp_path, groups):
        random.seed(1)
        state = random.getstate()
        table(tokenizer, tmp_path, num_completions_to_print=1).log(groups, 7)
        assert random.getstate() == state

    def test_without_rich_the_file_is_written_and_nothing_printed(
        self, tokenizer, tmp_path, groups, capsys, monkeypatch
    ):
        monkeypatch.setattr("trl_atropos.report.completions.is_rich_available", lambda: False)
        table(tokenizer, tmp_path).log(groups, 7)
        assert capsys.readouterr().out == ""
        assert len(rows(tmp_path, 7)) == 5


class TestTrackers:
    def test_wandb_gets_the_table_if_it_is_reported_to(self, tokenizer, tmp_path, make_rollout):
        groups = [RolloutGroup((make_rollout(("2+2=", False), ("4", True), reward=1.0),), 0)]
        run = wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True))
        try:
            table(tokenizer, tmp_path).log(groups, 1)
            assert not list(Path(run.dir).rglob("*.table.json"))
            table(tokenizer, tmp_path, report_to=["wandb"]).log(groups, 2)
            (file,) = Path(run.dir).rglob("*.table.json")
        finally:
            run.finish()
        found = json.loads(file.read_text())
        assert dict(zip(found["columns"], found["data"][0], strict=True)) == {
            "step": 2,
            "prompt": "2+2=",
            "completion": "4",
            "reward": 1.0,
            "environment": "env_0",
            "advantage": 0.0,
        }

    def test_wandb_without_a_run_is_left_alone(self, tokenizer, tmp_path, make_rollout):
        assert wandb.run is None
        groups = [RolloutGroup((make_rollout(("a", True)),), 0)]
        table(tokenizer, tmp_path, report_to=["tensorboard", "wandb"]).log(groups, 2)
        assert len(rows(tmp_path, 2)) == 1


def test_text_needs_a_tokenizer(tmp_path):
    with pytest.raises(PreflightError, match="has no tokenizer"):
        table(None, tmp_path)
