#!/usr/bin/env bash
# DAPO of Qwen2.5-32B: 8 nodes train (TP 8, PP 2, DP 4), 8 generate (16 SGLang servers, TP 4).
#   python -m launch.slurm --recipe launch/recipes/dapo_qwen2.5_32b.yaml --dry-run --script slurm/dapo_32b.sh
#SBATCH --job-name=dapo_32b
#SBATCH --nodes=16
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@1800
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

exec .venv/bin/python -m launch.slurm --recipe launch/recipes/dapo_qwen2.5_32b.yaml "$@"
