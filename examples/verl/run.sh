#!/usr/bin/env bash
# Trains a small model with verl on an unmodified Atropos environment, on a CPU: makes what is missing, then starts API, vLLM
# server, environment and trainer. Usage: examples/verl/run.sh [KEY=VALUE ...], the keys of verl
set -euo pipefail

cd "$(dirname "$0")/../.."
make --silent .venv-verl/.installed
.venv/bin/trl-atropos model fetch smollm2 --output_dir .models/SmolLM2-135M-Instruct
exec .venv/bin/trl-atropos launch -c examples/verl/launch.yaml --trainer_args="$*"
