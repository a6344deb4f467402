#!/usr/bin/env bash
# Samples a group of each of a dozen environments of all ecosystems, or trains one optimizer step on each that was sampled.
# Usage: packaging/test_environments.sh sample|train VENV MODEL
# `sample` needs a server (packaging/with_server.sh). The ecosystems that are not in VENV are in VENV-verifiers and so on.
set -euo pipefail

phase=$1
venv=$2
model=$3
run_dir=runs/test_environments
groups=$run_dir/groups.jsonl

sample() {
    local python=$1
    shift
    "$python" benchmarks/environments.py --base_url "$BASE_URL" --model "$model" --groups "$groups" "$@" \
        2>>"$run_dir/samples.log"
}

if [ "$phase" = sample ]; then
    rm -rf "$run_dir"
    mkdir -p "$run_dir"
    # The tools of verifiers are servers in processes of their own, which are looked for by name.
    export PYTHONPATH=$PWD:$PWD/tests/verifiers_tasks
    sample "$venv/bin/python" reasoning-gym:chain_sum reasoning-gym:spell_backward textarena:GuessTheNumber-v0 \
        textarena:Blackjack-v0 openenv:tests/openenv_standin
    sample "$venv-reasoning-core/bin/python" reasoning-core:arithmetics reasoning-core:set_missing_element
    sample "$venv-gem/bin/python" gem:game:GuessTheNumber-v0-easy gem:rg:basic_arithmetic
    sample "$venv-verifiers/bin/python" verifiers:sums_for_verifiers verifiers:guesses_for_verifiers \
        verifiers:tools_for_verifiers
    exit
fi

# Most of these tasks are too hard for this model, and a group with equal rewards has no gradient: it is trained as if its last
# answer had been better.
"$venv/bin/python" - "$groups" "$run_dir/unequal.jsonl" <<'UNEQUAL'
import json
import sys
from pathlib import Path

groups = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
for group in groups:
    if len(set(group["scores"])) == 1:
        group["scores"][-1] += 1.0
Path(sys.argv[2]).write_text("".join(json.dumps(group) + "\n" for group in groups))
UNEQUAL

"$venv/bin/python" examples/scripts/atropos.py --config examples/configs/quickstart.yaml --model_name_or_path "$model" \
    --data_path "$run_dir/unequal.jsonl" --output_dir "$run_dir/model" --max_length 4096 --per_device_train_batch_size 2 --max_steps 12 \
    --logging_steps 1 >"$run_dir/trainer.log" 2>&1 || { tail -n 40 "$run_dir/trainer.log" >&2; exit 1; }
"$venv/bin/python" - "$run_dir" <<'CHECK'
import json
import sys
from pathlib import Path

run = Path(sys.argv[1])
num_groups = len((run / "groups.jsonl").read_text().splitlines())
history = json.loads((run / "model" / "trainer_state.json").read_text())["log_history"]
num_steps = sum(entry.get("grad_norm", 0.0) > 0.0 for entry in history)
print(f"environments: groups of {num_groups}, {num_steps} optimizer steps with a gradient")
assert num_groups == num_steps == 12
CHECK
