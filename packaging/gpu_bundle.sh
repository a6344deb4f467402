#!/usr/bin/env bash
# Collects what benchmarks/gpu.py needs on a machine that has torch for CUDA 13, transformers, accelerate and peft, and no network:
#
#     bash packaging/gpu_bundle.sh DIR [PYTHON_VERSION]
#
# There: python3 -m pip install --no-index --no-deps --target /tmp/site DIR/*.whl, then PYTHONPATH=/tmp/site and
# VLLM_PACKED_TENSOR=DIR/packed_tensor.py. About 10 MB.
set -euo pipefail
cd "$(dirname "$0")/.."

target=${1:?the directory to fill}
python_version=${2:-3.12}
python=${PYTHON:-.venv/bin/python}

# Name and version of a package, as the lock has it.
locked() {
    grep -ihE "^$1==" requirements/*.txt | sort -u | head -1 | cut -d" " -f1
}

download() {
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$python_version" \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux2014_x86_64 --dest "$1" "${@:2}"
}

mkdir -p "$target"
packages=()
for name in trl datasets dill multiprocess hjson pydantic pydantic-core annotated-types typing-inspection; do
    packages+=("$(locked $name)")
done
download "$target" "${packages[@]}"

# DeepSpeed is published as source; what it compiles, it compiles where it runs.
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$target" "$(locked deepspeed)"

# Of bitsandbytes only the library for CUDA 13: the others are 40 MB.
whole=$(mktemp -d)
trap 'rm -r "$whole"' EXIT
download "$whole" "$(locked bitsandbytes)"
"$python" - "$whole" "$target" <<'EOF'
import sys
import zipfile
from pathlib import Path

(source,) = Path(sys.argv[1]).glob("bitsandbytes-*.whl")
version = source.name.split("-")[1]
target = Path(sys.argv[2]) / f"bitsandbytes-{version}-py3-none-any.whl"
with zipfile.ZipFile(source) as whole, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as part:
    for name in whole.namelist():
        if name.endswith(".so") and not name.endswith(("_cpu.so", "_cuda130.so")):
            continue
        if name.endswith("/WHEEL"):
            part.writestr(name, "Wheel-Version: 1.0\nGenerator: gpu_bundle\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        else:
            part.writestr(name, b"" if name.endswith("/RECORD") else whole.read(name))
EOF

vllm=$("$python" -c "import importlib.util; print(importlib.util.find_spec('vllm').submodule_search_locations[0])")
cp "$vllm/distributed/weight_transfer/packed_tensor.py" "$target/"
du -sh "$target" | cut -f1
