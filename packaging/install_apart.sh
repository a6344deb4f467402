#!/usr/bin/env bash
# Makes an environment that shares no package with the project's own: for what must not see them. The project itself is there.
# Usage: packaging/install_apart.sh VENV OTHER_VENV REQUIREMENTS MODULE; MODULE is what must be found to load.
set -euo pipefail

venv=$1
other=$2
requirements=$3
module=$4

printf 'install: %s, in %s ' "$requirements" "$other"
start=$SECONDS
rm -rf "$other"
"$venv/bin/python" -m venv --without-pip "$other"
settings=$("$venv/bin/python" packaging/pip_settings.py)
uv_flags=()
eval "$settings"
"$venv/bin/uv" pip install --quiet --no-deps --python "$other/bin/python" \
    ${uv_flags[@]+"${uv_flags[@]}"} -r "$requirements"
pwd >"$("$other/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
# This also compiles what uv, unlike pip, leaves uncompiled, even where the user's environment forbids it.
env -u PYTHONDONTWRITEBYTECODE "$other/bin/python" -W ignore -c "import $module"
printf ' %d s\n' $((SECONDS - start))
