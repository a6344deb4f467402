#!/usr/bin/env bash
# The trainer of examples/verl/launch.yaml: turns the flags that `trl-atropos launch` gives a trainer into the keys of verl, and
# starts it. Usage: examples/verl/trainer.sh PYTHON [--FLAG VALUE ...] [KEY=VALUE ...]
set -euo pipefail

python=$1
shift
overrides=()
while [ $# -gt 0 ]; do
    case $1 in
        --model_name_or_path) overrides+=("model.path=$2") && shift 2 ;;
        --atropos_api_url) overrides+=("data.atropos.api_url=$2") && shift 2 ;;
        --vllm_server_base_url) overrides+=("+atropos.vllm_server_base_url=$2") && shift 2 ;;
        --output_dir) overrides+=("trainer.default_local_dir=$2") && shift 2 ;;
        *) overrides+=("$1") && shift ;;
    esac
done

# On GPUs leave out the two variables of verl, and take the number of GPUs as --nproc_per_node.
export VERL_PLATFORM=cpu VERL_USE_EXTERNAL_MODULES=trl_atropos.verl.cpu OMP_WAIT_POLICY=passive
exec "$python" -m torch.distributed.run --standalone --nproc_per_node 1 -m trl_atropos.verl.train \
    --config-path "$PWD/examples/verl" --config-name capitals "${overrides[@]}"
