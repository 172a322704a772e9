"""Without CUDA, run what a trainer does on two ranks with one patch of compat/megatron_cpu.py left out.

    python -m tests.distributed.compat_probe SCENARIO [PATCH]

Exit code 0: the scenario ran.
"""

import sys
import tempfile
from pathlib import Path

from dapo_megatron import compat
from dapo_megatron.compat import adam, megatron_cpu

SCENARIOS = {
    "stages": ("qwen3", {"pipeline_model_parallel_size": 2}),
    "experts": ("qwen3_moe", {"data_parallel_size": 2, "expert_model_parallel_size": 2}),
}

if __name__ == "__main__":
    scenario, without = sys.argv[1], frozenset(sys.argv[2:])
    megatron_cpu.install(without - {"adam"})
    if "adam" not in without:
        adam.install()

    compat.prepare_trainer = lambda: None  # the harness calls it; the patches of this probe are in place
    from tests.distributed import harness

    harness.DEADLINE_S = 40.0
    from tests.distributed.test_checkpoint import resume, two_steps_and_save
    from tests.tiny import hf_folder, run_config

    with tempfile.TemporaryDirectory() as folder:
        kind, layout = SCENARIOS[scenario]
        path = hf_folder(Path(folder) / "hf", kind, tied=True)
        config = run_config(path, actor=layout).model_copy(update={"run_dir": folder})
        harness.run_ranks(config.world_size, two_steps_and_save, config, deadline_s=40.0)
        harness.run_ranks(config.world_size, resume, config, deadline_s=40.0)
