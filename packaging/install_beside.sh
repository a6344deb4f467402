#!/usr/bin/env bash
# Makes an environment with packages that do not fit beside the pinned ones, for tests. It sees the packages of the project's own.
# Usage: packaging/install_beside.sh VENV OTHER_VENV REQUIREMENTS
set -euo pipefail

venv=$1
other=$2
requirements=$3
packages_of() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

printf 'install: %s, in %s ' "$requirements" "$other"
start=$SECONDS
rm -rf "$other"
"$venv/bin/python" -m venv --without-pip "$other"
# Without their dependencies: what they pin otherwise is that of the project.
"$venv/bin/python" -m pip --python "$other/bin/python" install --quiet --disable-pip-version-check --no-deps \
    -r "$requirements"
# Last: pip would take what it finds there for a part of this environment, and replace it.
packages_of "$venv" >"$(packages_of "$other")/project.pth"
printf ' %d s\n' $((SECONDS - start))
