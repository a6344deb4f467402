#!/usr/bin/env bash
# Installs the browser that tests/e2e/test_report_browser.py opens reports in. Debian or Ubuntu, as root.
set -euo pipefail

if command -v chromium google-chrome >/dev/null; then
    exit 0
fi
if [[ "$(id -u)" != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "No chromium is on PATH, and it can be installed here only by root with apt-get." >&2
    echo "The test of reports in a browser needs it. Install chromium or google-chrome by hand." >&2
    exit 1
fi
apt-get update -qq
apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core
