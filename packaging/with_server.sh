#!/usr/bin/env bash
# Runs a command beside an inference server, whose address it finds in BASE_URL, and ends the server with it.
# Usage: packaging/with_server.sh VENV MODEL COMMAND...
set -euo pipefail

venv=$1
model=$2
shift 2
log=$(mktemp)
port=$("$venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export BASE_URL=http://127.0.0.1:$port/v1 MODEL=$model

# A session of its own, so that its worker processes end with it.
VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 OMP_WAIT_POLICY=passive setsid "$venv/bin/trl" vllm-serve \
    --model "$model" --host 127.0.0.1 --port "$port" --max_model_len 8192 --enforce_eager True --dtype float32 \
    --weight-transfer-config '{"backend": "trl_atropos_shm"}' \
    --middleware trl_atropos.serving.generate_endpoint.GenerateEndpoint >"$log" 2>&1 &
server=$!
trap 'kill -TERM -- "-$server" 2>/dev/null || true; sleep 1; kill -KILL -- "-$server" 2>/dev/null || true; rm -f "$log"' EXIT

for _ in $(seq 240); do
    if curl --silent --fail --max-time 2 "http://127.0.0.1:$port/health" >/dev/null; then
        "$@"
        exit
    fi
    kill -0 "$server" 2>/dev/null || break
    sleep 0.5
done
echo "with_server: the server of $model is not ready:" >&2
tail -n 40 "$log" >&2
exit 1
