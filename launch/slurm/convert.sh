#!/bin/bash
#SBATCH --job-name=vespo_convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# sbatch launch/slurm/convert.sh to-megatron | to-hf | verify FROM TO; killed in the middle, the same command goes on.
set -euo pipefail
# Slurm runs a copy of this file: the library is where the job was submitted, or in VESPO_HOME.
cd "${VESPO_HOME:-${SLURM_SUBMIT_DIR:-.}}"
# shellcheck source=launch/slurm/job.sh
source launch/slurm/job.sh
command_job convert "$@"
