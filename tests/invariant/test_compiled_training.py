"""A compiled model is trained as one that is not: `torch_compile`, `torch_compile_backend`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from short_runs import train


@pytest.mark.parametrize("tied", [True, False])
def test_a_compiled_model_trains_as_one_that_is_not(tmp_path: Path, tied: bool) -> None:
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    eager, compiled = (train(tmp_path, tied=tied, **changes) for changes in ({}, options))
    assert (compiled.args.torch_compile_backend, hasattr(compiled.model_wrapped, "_orig_mod")) == ("aot_eager", True)
    for before, after in zip(eager.model.parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
