"""The report of a run: what is read, what is drawn, and that text of the run stays text."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from trl_atropos.cli.main import main
from trl_atropos.errors import PreflightError
from trl_atropos.report.callback import ReportCallback, changed_options
from trl_atropos.report.page import find_warnings, write_report
from trl_atropos.report.plots import MAX_POINTS, PLOTS, series_of
from trl_atropos.report.run_files import MAX_TEXT_CHARACTERS, read_run_files


def make_history(num_steps: int, **values: float) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "loss": 0.5,
            "reward": step / num_steps,
            "env/<b>maths</b>/reward": 0.5,
            "env/words/reward": 0.25,
            "num_tokens": 100.0 * step,
            "num_trained_tokens": 20.0,
            "step_time": 4.0,
            "perf/batch_wait_s": 1.0,
            "perf/weight_sync_s": 0.5,
            "sampling/importance_sampling_ratio/max": float(step),
            **values,
        }
        for step in range(1, num_steps + 1)
    ]


def save_history(directory: Path, history: list[dict[str, Any]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "trainer_state.json").write_text(json.dumps({"log_history": history}))


def save_completions(output_dir: Path, step: int, text: str) -> None:
    folder = output_dir / "completions"
    folder.mkdir(exist_ok=True)
    row = {"step": step, "prompt": text, "completion": text, "reward": 1.0, "environment": text, "advantage": 0.5}
    pd.DataFrame([row]).to_parquet(folder / f"completions_{step:05d}.parquet")


class Tags(HTMLParser):
    """Collects the elements of a page, and every address that one of them names."""

    def __init__(self, text: str):
        super().__init__()
        self.names: set[str] = set()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.addresses.append(value or "")


def plot_of(name: str) -> Any:
    return next(plot for plot in PLOTS if plot.name == name)


def test_the_page_is_self_contained_and_text_of_the_run_stays_text(tmp_path):
    attack = "<script>alert(1)</script><img src=http://example.invalid/x>"
    save_history(tmp_path, make_history(5))
    save_completions(tmp_path, 3, attack)
    (tmp_path / "quarantine.jsonl").write_text(json.dumps({"batch": 0, "group": 0, "reason": attack}) + "\n")
    assert main(["report", str(tmp_path), "--png_dir", str(tmp_path / "png")]) == 0
    text = (tmp_path / "report.html").read_text()
    tags = Tags(text)
    assert tags.names.isdisjoint({"script", "img", "iframe", "b"})
    assert [address for address in tags.addresses if not address.startswith(("#", "data:"))] == []
    assert len(tags.ids) == len(set(tags.ids))
    assert text.count("&lt;script&gt;alert(1)") == 4  # prompt, completion, environment, reason
    assert (tmp_path / "png" / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "png" / "kl.png").exists()
    assert "Not recorded: train with --beta above 0." in text


def test_the_page_of_a_launch_has_its_restarts_and_what_its_gateway_counted(tmp_path):
    save_history(tmp_path / "model", make_history(2))
    assert main(["report", str(tmp_path)]) == 0
    page = tmp_path / "model" / "report.html"
    assert "<h2>Launch</h2>" not in page.read_text()

    counts = {"num_sessions": 8, "num_turns": 2400, "num_branches": 3, "num_groups_sent": 1, "num_groups_lost": 0}
    counts |= {"num_sampled_tokens": 9000, "spliced_share": 0.75, "masked_tokens": {"grammar": 7}}
    (tmp_path / "summary.json").write_text(json.dumps({"num_restarts": {"vllm": 2}, "gateway": counts}))
    assert main(["report", str(tmp_path)]) == 0
    section = page.read_text().partition("<h2>Launch</h2>")[2].partition("</section>")[0]
    for row in (
        "<td>vllm started again</td><td>2</td>",
        "<td>turns</td><td>2,400</td>",
        "<td>share of later turns that continue what was sampled</td><td>0.750</td>",
        "<td>tokens not trained: grammar</td><td>7</td>",
    ):
        assert row in section


def test_environments_have_a_curve_each_if_there_are_several(tmp_path: Path) -> None:
    history = make_history(3)
    of_all = ["mean of the step", "mean of 4 points"]
    assert list(series_of(read_run_files(tmp_path, history), plot_of("reward"))) == [*of_all, "<b>maths</b>", "words"]
    for entry in history:
        del entry["env/words/reward"]
    assert list(series_of(read_run_files(tmp_path, history), plot_of("reward"))) == of_all


def test_the_parts_of_a_step_add_up_to_its_time(tmp_path):
    series = series_of(read_run_files(tmp_path, make_history(3)), plot_of("step_time"))
    # 4 s of which 1 s is waited and 0.5 s published.
    assert {label: points[0][1] for label, points in series.items()} == {
        "wait for rollouts": 1.0,
        "forward, backward, rest": 2.5,
        "publish": 0.5,
    }


def test_throughput_is_tokens_of_one_step_over_its_time(tmp_path):
    history = make_history(4)
    del history[2]
    series = series_of(read_run_files(tmp_path, history), plot_of("throughput"))
    # 100 tokens in 4 s; step 4 has no neighbour, so that its tokens are those of two steps.
    assert series["all tokens"] == [(2.0, 25.0)]
    assert series["trained tokens"] == [(1.0, 5.0), (2.0, 5.0), (4.0, 5.0)]


def test_a_long_run_is_thinned_and_keeps_its_extremes(tmp_path):
    history = make_history(10_000)
    history[17]["sampling/importance_sampling_ratio/max"] = 1e6
    run = read_run_files(tmp_path, history)
    points = series_of(run, plot_of("importance_ratio"))["max"]
    assert len(points) <= MAX_POINTS
    assert max(value for _, value in points) == 1e6
    write_report(run, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 3e6


def test_values_that_are_not_finite_are_left_out_and_named(tmp_path):
    run = read_run_files(tmp_path, make_history(3, entropy=math.nan))
    assert series_of(run, plot_of("entropy")) == {}
    assert find_warnings(run) == ["3 values of entropy are NaN or infinite."]


def test_long_texts_are_cut_and_say_so(tmp_path):
    save_history(tmp_path, make_history(1))
    save_completions(tmp_path, 1, "x" * (MAX_TEXT_CHARACTERS + 7))
    (row,) = read_run_files(tmp_path).completions
    assert row.completion == "x" * MAX_TEXT_CHARACTERS + " … [7 more characters]"


def test_staleness_is_counted_at_the_step_that_trained_a_rollout(tmp_path):
    # Published after every step: step 1 trains with version 0, step 2 with version 1, step 3 with version 2.
    save_history(tmp_path, [entry | {"policy_version": float(entry["step"])} for entry in make_history(3)])
    marks = [
        {"event": "versions", "batch": 0, "first_group": 0, "policy_versions": [[0, 0], [0, None]]},
        {"event": "versions", "batch": 1, "first_group": 0, "policy_versions": [[0, 0], [0, 0]]},
        # Of these groups the first was refused and the last belongs to the next step.
        {"event": "versions", "batch": 2, "first_group": 0, "policy_versions": [None, [2, 1], [0, 0], [0, 0]]},
        {"event": "trained", "batch": 0, "step": 1, "first_group": 0, "num_groups": 2},
        # Trained once more after a resume.
        {"event": "trained", "batch": 0, "step": 2, "first_group": 0, "num_groups": 2},
        {"event": "trained", "batch": 1, "step": 2, "first_group": 0, "num_groups": 2},
        {"event": "dropped", "batch": 2, "groups": [2], "reason": "stale"},
        {"event": "trained", "batch": 2, "step": 3, "first_group": 0, "num_groups": 3},
    ]
    (tmp_path / "journal").mkdir()
    lines = [json.dumps(mark) for mark in marks]
    # The run is in the middle of its last line.
    (tmp_path / "journal" / "marks.jsonl").write_text("\n".join(lines) + '\n{"event": "tr')
    run = read_run_files(tmp_path)
    assert run.staleness == {0: 3 + 1, 1: 4 + 1}
    assert run.refused == {"stale (dropped)": 1}
    write_report(run, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<td>1</td><td>5</td>" in page and "56 %" in page and "stale (dropped)" in page


def test_the_report_knows_the_api(tmp_path):
    history = make_history(4, **{"trajectory_api/keeps_batches": 1.0})
    for entry, queued, restarts in zip(history, (3.0, 1200.0, 2.0, 5.0), (0.0, 2.0, 0.0, 1.0), strict=True):
        # The trainer was started again after the second step: its counts begin anew.
        entry |= {"trajectory_api/num_queued_groups": queued, "trajectory_api/num_restarts": restarts}
        entry["trajectory_api/num_posts_refused"] = 7.0
    save_history(tmp_path, history)
    run = read_run_files(tmp_path)
    write_report(run, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<td>trl-atropos api</td>" in page
    assert "<td>groups in the queue</td><td>5 at the end, at most 1,200</td>" in page
    assert "<td>restarts</td><td>3</td>" in page
    assert "bytes stored" not in page
    assert "The trajectory API refused posts; its log says why. Largest trajectory_api/num_posts_refused: 7." in (
        find_warnings(run)
    )

    save_history(tmp_path, make_history(4, **{"trajectory_api/keeps_batches": 0.0}))
    write_report(read_run_files(tmp_path), tmp_path / "report.html")
    assert "run-api, which shows no more of itself" in (tmp_path / "report.html").read_text()


def test_a_killed_run_is_read_from_its_newest_whole_checkpoint(tmp_path):
    for step in (9, 10):
        save_history(tmp_path / f"checkpoint-{step}", make_history(step))
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-11" / "trainer_state.json").write_text('{"log_hist')
    run = read_run_files(tmp_path)
    assert run.state_path == tmp_path / "checkpoint-10" / "trainer_state.json"
    assert (run.output_dir, len(run.history)) == (tmp_path, 10)


def test_the_directory_of_launch_is_that_of_its_trainer(tmp_path):
    save_history(tmp_path / "model", make_history(2))
    assert read_run_files(tmp_path).output_dir == tmp_path / "model"


def test_a_directory_without_a_log_is_an_error_that_helps(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "holds no trainer_state.json" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_a_broken_file_is_named(tmp_path):
    save_history(tmp_path, make_history(1))
    (tmp_path / "completions").mkdir()
    (tmp_path / "completions" / "completions_00001.parquet").write_text("not parquet")
    with pytest.raises(PreflightError, match="cannot be read"):
        read_run_files(tmp_path)


def end_run(output_dir: Path, history: list[dict[str, Any]], **options: Any) -> None:
    args = TrainingArguments(output_dir=str(output_dir), report_to=[], use_cpu=True, **options)
    state = TrainerState(log_history=history, is_world_process_zero=True)
    callback = ReportCallback()
    callback.on_train_begin(args, state, TrainerControl())
    callback.on_train_end(args, state, TrainerControl())


def test_the_end_of_a_run_writes_its_report_with_options_and_versions(tmp_path):
    end_run(tmp_path, make_history(2), learning_rate=0.125, hub_token="hf_secret")
    text = (tmp_path / "report.html").read_text()
    assert "<td>learning_rate</td><td>0.125</td>" in text
    assert "<td>torch</td>" in text
    assert "hf_secret" not in text + (tmp_path / "run_facts.json").read_text()


def test_a_login_in_an_address_is_not_shown(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, run_name="http://me:pw@host:1/")
    assert changed_options(args)["run_name"] == "http://***@host:1/"


def test_a_report_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "report.html").mkdir()
    end_run(tmp_path, make_history(2))
    assert "The report of the run was not written" in caplog.text
    assert f"trl-atropos report {tmp_path}" in caplog.text
