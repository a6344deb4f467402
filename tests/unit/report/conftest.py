"""The fixtures of runs that push."""

from hub_runs import base_model, data_path, hub  # noqa: F401
