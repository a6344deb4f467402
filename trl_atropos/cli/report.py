"""`trl-atropos report`: the HTML page of a run, and its plots as PNG."""

from __future__ import annotations

from pathlib import Path

from ..errors import PreflightError
from ..report.page import REPORT_FILE, write_report
from ..report.run_files import read_run_files


def run_report(run_dir: Path, output: Path | None = None, png_dir: Path | None = None) -> Path:
    """Write the report of a run.

    Args:
        run_dir (`Path`):
            Directory of the trainer, or that of `trl-atropos launch`.
        output (`Path`, *optional*):
            The page. Defaults to `report.html` in the directory of the trainer.
        png_dir (`Path`, *optional*):
            Also gets every plot as a PNG.

    Returns:
        `Path`: The page.

    Raises:
        PreflightError: There is nothing to report, or it cannot be written.
    """
    run = read_run_files(run_dir)
    path = output or run.output_dir / REPORT_FILE
    try:
        write_report(run, path, png_dir)
    except OSError as exc:
        raise PreflightError(
            f"The report cannot be written: {exc}.",
            "The directory may be read-only, or the disk full.",
            "Name another place with `--output`, and with `--png_dir` if you gave it.",
        ) from exc
    return path
