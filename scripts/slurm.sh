#!/bin/bash
# Train on several machines under SLURM, and go on where it was when it runs again:
#
#   sbatch --nodes=2 --gpus-per-node=4 scripts/slurm.sh RECIPE OUTPUT_DIR [key=value ...]
#
# OUTPUT_DIR and what the recipe names are on a disk that all machines share: docs/several_cards.md. Account, partition and time
# are the cluster's; give them to sbatch, or write them here.
#SBATCH --job-name=qlora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
# ntasks-per-node: torchrun starts a process for each card itself. signal: five minutes before the end all processes are told, and
# save one checkpoint together.
set -euo pipefail

recipe=$1 output_dir=$2
shift 2
resume=()
[ -e "$output_dir/recipe.yaml" ] && resume=(--resume)

# The address of the first machine, by which all find each other: no default, or each would train alone.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
[ -n "$hosts" ]
export MASTER_HOST=${hosts%%$'\n'*} MASTER_PORT_OF_JOB=$((20000 + SLURM_JOB_ID % 10000)) CARDS=$SLURM_GPUS_PER_NODE

# With --node_rank and --master_addr the first process, which writes, is always on the first machine.
srun --kill-on-bad-exit=1 bash -c 'exec torchrun --nnodes "$SLURM_NNODES" --node_rank "$SLURM_NODEID" \
    --nproc_per_node "$CARDS" --master_addr "$MASTER_HOST" --master_port "$MASTER_PORT_OF_JOB" -m qlora train "$@"' \
    torchrun "$recipe" "output_dir=$output_dir" "$@" "${resume[@]}"
