#!/bin/bash
#SBATCH --job-name=moe_30b_vespo_async
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
# Qwen3-30B-A3B by VESPO, asynchronous: trainers on the first nodes, engines on the others; the paper has 2 + 6.
# sbatch [--nodes T+R] launch/slurm/moe_30b_vespo_async.sh [key=value ...], with TRAINER_NODES=T, ROLLOUT_NODES=R
set -euo pipefail
# Slurm runs a copy of this file: the library is where the job was submitted, or in VESPO_HOME.
cd "${VESPO_HOME:-${SLURM_SUBMIT_DIR:-.}}"
# shellcheck source=launch/slurm/job.sh
source launch/slurm/job.sh
: "${TRAINER_NODES:=2}" "${ROLLOUT_NODES:=6}"
train_job "${CONFIG:-model_configs/qwen3_30b_a3b_vespo_async.yaml}" \
  "cluster.nodes=$TRAINER_NODES" "cluster.rollout_nodes=$ROLLOUT_NODES" "$@"
