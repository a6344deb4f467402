"""docs/agents.md against the command and the tables of what agents may ask for."""

from __future__ import annotations

import re
from pathlib import Path

from command_tables import documented_options, options_of, rows

from trl_atropos.gateway.app import COUNT_PATH
from trl_atropos.gateway.chat import NEUTRAL, REFUSED
from trl_atropos.gateway.dialects import DIALECTS


TEXT = (Path(__file__).resolve().parents[3] / "docs" / "agents.md").read_text()


def test_every_option_has_a_row_with_its_default():
    options, documented = options_of("gateway"), documented_options(TEXT)
    assert documented.keys() == options.keys()
    for name, default in options.items():
        assert documented[name] == str(default) or (default is None and documented[name] in ("required", "none"))


def test_what_is_said_of_sampling_is_what_is_done():
    asked = {row[0] for row in rows(TEXT, "Sampling is plain")}
    names = {name for cell in asked for name in re.findall(r"`(\w+)`", cell)}
    assert {"temperature", "top_p", "top_k", "min_p"} <= names & NEUTRAL.keys()
    assert {"logit_bias", "min_tokens", "bad_words"} <= names & REFUSED.keys()


def test_every_dialect_has_a_row_with_its_routes():
    routes = {route for row in rows(TEXT, "Dialects") for route in re.findall(r"`(/v1/[\w/]+)`", row[1])}
    assert routes == {dialect.path for dialect in DIALECTS} | {COUNT_PATH}


def test_what_a_dialect_refuses_is_refused():
    refused = {"container", "mcp_servers", "background", "conversation", "prompt"}
    cells = " ".join(row[2] for row in rows(TEXT, "Dialects") if len(row) == 4)
    assert refused <= set(re.findall(r"`(\w+)`", cells)) & REFUSED.keys()
