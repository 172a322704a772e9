#!/usr/bin/env bash
# The demo recipe on a cluster, CPUs or GPUs: two nodes train, one generates.
#SBATCH --job-name=dapo_smoke
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --time=00:30:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

exec .venv/bin/python -m launch.slurm --recipe launch/recipes/demo.yaml launch.engine_nodes=1 "$@"
