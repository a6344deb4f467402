#!/usr/bin/env bash
# Makes an environment that shares no package with the project's own: for what must not see them. The project itself is there.
# Usage: packaging/install_apart.sh VENV OTHER_VENV REQUIREMENTS
set -euo pipefail

venv=$1
other=$2
requirements=$3

printf 'install: %s, in %s ' "$requirements" "$other"
start=$SECONDS
rm -rf "$other"
"$venv/bin/python" -m venv --without-pip "$other"
settings=$("$venv/bin/python" packaging/pip_settings.py)
uv_flags=()
eval "$settings"
"$venv/bin/uv" pip install --quiet --compile-bytecode --no-deps --python "$other/bin/python" \
    ${uv_flags[@]+"${uv_flags[@]}"} -r "$requirements"
pwd >"$("$other/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
printf ' %d s\n' $((SECONDS - start))
