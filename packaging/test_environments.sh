#!/usr/bin/env bash
# Samples a group of each of a dozen environments of all ecosystems, and trains one optimizer step on each.
# Usage: packaging/test_environments.sh VENV MODEL
# Run beside a server (packaging/with_server.sh). The ecosystems that do not fit into VENV are in VENV-verifiers and so on.
set -euo pipefail

venv=$1
model=$2
run_dir=runs/environments
groups=$run_dir/groups.jsonl
rm -rf "$run_dir"
mkdir -p "$run_dir"
root=$PWD
# Their tools are servers, which are looked for by name.
export PYTHONPATH=$root:$root/tests/verifiers_tasks

sample() {
    local python=$1
    shift
    "$python" benchmarks/environments.py --base_url "$BASE_URL" --model "$model" --groups "$groups" "$@" \
        2>>"$run_dir/samples.log" | tee -a "$run_dir/samples.jsonl"
}

sample "$venv/bin/python" reasoning-gym:chain_sum reasoning-gym:spell_backward textarena:GuessTheNumber-v0 \
    textarena:Blackjack-v0 openenv:tests/openenv_standin
sample "$venv-reasoning-core/bin/python" reasoning-core:arithmetics reasoning-core:logic_nli
sample "$venv-gem/bin/python" gem:game:GuessTheNumber-v0-easy gem:rg:basic_arithmetic
sample "$venv-verifiers/bin/python" verifiers:sums_for_verifiers verifiers:guesses_for_verifiers \
    verifiers:tools_for_verifiers

"$venv/bin/python" examples/scripts/atropos.py --config examples/configs/quickstart.yaml --model_name_or_path "$model" \
    --data_path "$groups" --output_dir "$run_dir/model" --max_length 4096 --per_device_train_batch_size 4 --max_steps 12 \
    --logging_steps 1 >"$run_dir/trainer.log" 2>&1 || { tail -n 40 "$run_dir/trainer.log" >&2; exit 1; }
"$venv/bin/python" - "$run_dir" <<'CHECK'
import json
import sys
from pathlib import Path

run = Path(sys.argv[1])
names = [json.loads(line)["env_id"] for line in (run / "groups.jsonl").read_text().splitlines()]
state = json.loads((run / "model" / "trainer_state.json").read_text())
print(f"environments: {len(names)} groups of {len(set(names))} environments, {state['global_step']} optimizer steps")
assert len(set(names)) == 12 and state["global_step"] == 12, (names, state["global_step"])
CHECK
