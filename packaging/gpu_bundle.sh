#!/usr/bin/env bash
# Collects what benchmarks/gpu.py needs on a machine that has torch, transformers, accelerate and peft, and no network:
#
#     bash packaging/gpu_bundle.sh DIR [PYTHON_VERSION]
#
# There: python3 -m pip install --no-index --no-deps --target /tmp/site DIR/*.whl, then PYTHONPATH=/tmp/site and
# VLLM_PACKED_TENSOR=DIR/packed_tensor.py. Pure Python only, below 8 MB.
set -euo pipefail
cd "$(dirname "$0")/.."

target=${1:?the directory to fill}
python_version=${2:-3.12}
python=${PYTHON:-.venv/bin/python}

mkdir -p "$target"
packages=()
for name in trl datasets dill multiprocess; do
    packages+=("$(grep -ihE "^$name==" requirements/*.txt | sort -u | head -1)")
done
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$python_version" --dest "$target" "${packages[@]}"
vllm=$("$python" -c "import importlib.util; print(importlib.util.find_spec('vllm').submodule_search_locations[0])")
cp "$vllm/distributed/weight_transfer/packed_tensor.py" "$target/"
du -sh "$target" | cut -f1
