#!/bin/bash
#SBATCH --job-name=moe_30b_vespo
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Qwen3-30B-A3B by VESPO, synchronous, as in the paper: sbatch launch/slurm/moe_30b_vespo.sh [key=value ...]
# N=16 sbatch ...: a rollout batch makes 16 updates of 256 prompts, and the run 1,500 (the config's N is 8).
set -euo pipefail
# Slurm runs a copy of this file: the library is where the job was submitted, or in VESPO_HOME.
cd "${VESPO_HOME:-${SLURM_SUBMIT_DIR:-.}}"
# shellcheck source=launch/slurm/job.sh
source launch/slurm/job.sh
split_into "${N:-}"
train_job "${CONFIG:-model_configs/qwen3_30b_a3b_vespo.yaml}" "${SPLIT[@]}" "$@"
