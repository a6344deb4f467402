#!/usr/bin/env bash
# Makes an environment with SGLang for the tests, which sees the packages of the project's own.
# Usage: packaging/install_sglang.sh VENV SGLANG_VENV
set -euo pipefail

venv=$1
sglang=$2
packages_of() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

printf 'install: SGLang for the tests, in %s ' "$sglang"
start=$SECONDS
rm -rf "$sglang"
"$venv/bin/python" -m venv --without-pip "$sglang"
# Without its dependencies: it pins another torch, and runs with that of the project.
"$venv/bin/python" -m pip --python "$sglang/bin/python" install --quiet --disable-pip-version-check --no-deps \
    -r requirements/sglang.txt
# Last: pip would take what it finds there for a part of this environment, and replace it.
packages_of "$venv" >"$(packages_of "$sglang")/project.pth"
printf ' %d s\n' $((SECONDS - start))
