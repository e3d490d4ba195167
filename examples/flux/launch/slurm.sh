#!/bin/bash
# sbatch examples/flux/launch/slurm.sh kontext-nft --data.chains train.jsonl ...
# One task per GPU, without a launcher in between: Slurm's signal before the time limit reaches every
# rank; the run saves the last complete round and exits with 0. Submit several jobs under one name
# with --dependency=singleton: each resumes where the previous one stopped. All nodes must share this
# folder, the data and output.folder. Not run on GPUs yet.
#SBATCH --job-name=mteditflow
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --output=%x-%j.log
set -euo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-29500}" WORLD_SIZE="$SLURM_NTASKS"
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
    export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID"
    exec python examples/train_flux.py "$@"' rank "$@"
