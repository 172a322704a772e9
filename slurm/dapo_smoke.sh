#!/usr/bin/env bash
# The demo recipe on a cluster, CPUs or GPUs: two nodes train (PP 2), one generates. `make demo` makes its model first.
#SBATCH --job-name=dapo_smoke
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --time=00:30:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

exec .venv/bin/python -m launch.slurm --recipe launch/recipes/demo.yaml run_dir=runs/smoke launch.engine_nodes=1 \
    actor.pipeline_model_parallel_size=2 actor.tensor_model_parallel_size=1 launch.save_before_end_s=120 "$@"
