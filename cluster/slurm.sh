#!/usr/bin/env bash
# A Ray cluster inside one Slurm allocation, one run on it, and its exit code as the job's:
#   sbatch cluster/slurm.sh corpus.toml
# From the top of a checkout on a file system that every node has, after `make setup LOCK=cluster/locks/gpu.txt`.
# A job that hit its time limit is submitted again and goes on.
#SBATCH --job-name=distill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@120
set -euo pipefail

config=${1:?usage: sbatch cluster/slurm.sh CONFIG [section.key=value ...]}
ray=$PWD/.venv/bin/ray
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000)) # several jobs may share a node

export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$("$PWD/.venv/bin/python" -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN

srun --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --nodelist="$head" \
	"$ray" start --head --node-ip-address="$head" --port="$port" --num-cpus="$SLURM_CPUS_PER_TASK" --block &
until "$ray" status --address "$head:$port" > /dev/null 2>&1; do
	kill -0 $! || exit 1
	sleep 2
done
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
	srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) \
		--cpus-per-task="$SLURM_CPUS_PER_TASK" --exclude="$head" \
		"$ray" start --address="$head:$port" --num-cpus="$SLURM_CPUS_PER_TASK" --block &
fi

RAY_ADDRESS="$head:$port" "$PWD/.venv/bin/python" -m pipeline run "$config" "${@:2}"
