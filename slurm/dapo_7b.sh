#!/usr/bin/env bash
# DAPO of Qwen2.5-7B: one node trains (TP 4, DP 2), one generates (8 SGLang servers).
#   python -m launch.slurm --recipe launch/recipes/dapo_qwen2.5_7b.yaml --dry-run --script slurm/dapo_7b.sh
#SBATCH --job-name=dapo_7b
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

exec .venv/bin/python -m launch.slurm --recipe launch/recipes/dapo_qwen2.5_7b.yaml "$@"
