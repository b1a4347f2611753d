#!/bin/bash
# A Ray cluster inside a Slurm job, and one grid on it:
#   sbatch --nodes=4 --gpus-per-node=1 slurm.sh GRID STORE
# GRID and STORE must be on a file system that all nodes share (STORE may be a URL). Submit it again to
# continue a job that stopped. See docs/slurm.md.
#SBATCH --job-name=calprune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --output=calprune-%j.log
#SBATCH --open-mode=append

set -euo pipefail

if [[ $# -ne 2 ]]; then
    echo "usage: sbatch slurm.sh GRID STORE" >&2
    exit 2
fi
grid=$1
store=$2

# This job's own token; Slurm passes it to the nodes with the environment.
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE RAY_AUTH_TOKEN

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
on_head=(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head")
address=$("${on_head[@]}" hostname --ip-address)
address=${address%% *}:$((20000 + SLURM_JOB_ID % 10000))

start=(ray start --block --num-cpus="$SLURM_CPUS_PER_TASK" --dashboard-agent-listen-port=0)

trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT

"${on_head[@]}" "${start[@]}" --head --node-ip-address="${address%:*}" --port="${address#*:}" \
    --include-dashboard=false --ray-client-server-port="$((30000 + SLURM_JOB_ID % 10000))" &

for _ in {1..60}; do
    if "${on_head[@]}" ray health-check --address="$address" 2>/dev/null; then
        break
    fi
    sleep 1
done

others=$((${#nodes[@]} - 1))
if ((others > 0)); then
    srun --overlap --nodes="$others" --ntasks="$others" --exclude="$head" \
        "${start[@]}" --address="$address" &
fi

"${on_head[@]}" python -m jobs run "$grid" --store "$store" --address "$address"
