#!/usr/bin/env bash
# Runs a part of the tests in several processes. Usage: packaging/run_tests.sh VENV {unit|rest}
# ARGS holds further arguments of pytest, quoted as for a shell; tests that it names are run instead of the whole part.
set -euo pipefail

# More failures than this are no accident of a busy machine.
MAX_RUN_AGAIN=3

venv=$1
part=$2
cores=$(getconf _NPROCESSORS_ONLN)
case $part in
    # They wait a lot, so that there is one process more than cores.
    unit) directories=(tests/unit) distribution=(worksteal) workers=$((cores < 7 ? cores + 1 : 8)) ;;
    # A file stays in one process, because its tests share servers. The long files come first, so that the processes end
    # together.
    rest)
        directories=(tests/e2e tests/process tests/protocol tests/invariant)
        distribution=(loadfile --no-loadscope-reorder) workers=2
        ;;
    *) echo "run_tests: $part is neither unit nor rest." >&2 && exit 2 ;;
esac

eval "arguments=(${ARGS:-})"
named=() options=()
has_named=false
for argument in ${arguments[@]+"${arguments[@]}"}; do
    path=${argument%%::*}
    if [[ $path != tests* || ! -e $path ]]; then
        options+=("$argument")
        continue
    fi
    has_named=true
    for directory in "${directories[@]}"; do
        if [[ $path/ == $directory/* ]]; then named+=("$argument"); fi
    done
done
if $has_named; then
    [ ${#named[@]} -gt 0 ] || exit 0
    directories=("${named[@]}")
fi

run_pytest() {
    # The processes that tests start import the same files again and again: compiled ones, whatever the shell says of that.
    PYTHONDONTWRITEBYTECODE='' "$venv/bin/pytest" -q "$@" "${directories[@]}" ${options[@]+"${options[@]}"}
}

list_failed() {
    "$venv/bin/python" -c "import json; print(*json.load(open('.pytest_cache/v/cache/lastfailed')), sep='\n')"
}

status=0
run_pytest -n "${WORKERS:-$workers}" --dist "${distribution[@]}" || status=$?
# A part may have no test that is asked for: pytest's exit code 5.
[ "$status" != 5 ] || [ ${#options[@]} = 0 ] || status=0
[ "$status" = 1 ] || exit "$status"

# Real processes on a busy machine: a test that fails beside others is run once more, alone, and named either way.
failed=$(list_failed)
if [ "$(wc -l <<<"$failed")" -gt $MAX_RUN_AGAIN ]; then exit 1; fi
echo "run_tests: these failed beside other tests, see above; each is run once more, alone:"
echo "$failed"
run_pytest -n 0 --last-failed --last-failed-no-failures none || exit $?
echo "run_tests: UNSTABLE, failed once and passed alone:"
echo "$failed"
