"""What vLLM calls in each of its processes."""

from __future__ import annotations

import pytest
import torch

from trl_atropos.serving import plugin


@pytest.mark.parametrize(("has_amx", "asked"), [(True, ["asked"]), (False, [])])
def test_the_tile_registers_are_asked_for_where_there_are_some(monkeypatch, has_amx, asked):
    calls: list[str] = []
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: calls.append("asked"))
    plugin.register()
    assert calls == asked
