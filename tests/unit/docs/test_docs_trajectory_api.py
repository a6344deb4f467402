"""docs/trajectory_api.md against the command and the metrics of the API."""

from __future__ import annotations

from pathlib import Path

from command_tables import documented_options, options_of, rows

from trl_atropos.api.metrics import METRICS


TEXT = (Path(__file__).resolve().parents[3] / "docs" / "trajectory_api.md").read_text()


def test_every_option_has_a_row_with_its_default():
    options, documented = options_of("api"), documented_options(TEXT)
    assert list(documented) == list(options)
    for name, default in options.items():
        if default is None:
            assert documented[name] in ("required", "all", "none")
        else:
            assert documented[name] == str(default)


def test_every_metric_has_a_row_with_its_meaning():
    documented = {name.strip("`"): meaning for name, meaning in rows(TEXT, "Watching it")}
    assert documented == {name: meaning for name, (_, meaning) in METRICS.items()}
