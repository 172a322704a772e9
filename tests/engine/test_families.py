"""A real server and the trainer agree on every kind of model, before and after other weights are pushed."""

import json
import os

import pytest

from tests.distributed.harness import run_ranks  # first: patches megatron-core on machines without CUDA
from tests.distributed.test_actor import LAYOUTS, ROPES
from tests.engine.conftest import ENGINE, serve
from tests.engine.test_push import push_and_verify
from tests.tiny import UNLIKE, hf_folder, run_config

MODELS = {
    "llama3": ("llama", True, UNLIKE | {"rope_parameters": ROPES["llama3"]}),
    "linear": ("qwen2", True, {"rope_parameters": ROPES["linear"]}),
    "yarn": ("qwen3", False, {"rope_parameters": ROPES["yarn"]}),
    "mistral": ("mistral", False, UNLIKE),
    "olmo2, 67 tokens": ("olmo2", False, {"vocab_size": 67}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS if os.environ.get("LAYOUTS") == "all" else ["olmo2, 67 tokens"])
def test_engine_and_trainer_agree(tmp_path, name):
    kind, tied, options = MODELS[name]
    served, pushed = (hf_folder(tmp_path / str(seed), kind, tied, seed=seed, **options) for seed in (1, 2))
    if name == "yarn":
        for folder in (served, pushed):
            config = json.loads((folder / "config.json").read_text())
            config["rope_parameters"]["attn_factor"] = 0.8
            (folder / "config.json").write_text(json.dumps(config))
    with serve(served, tmp_path / "logs") as (url, _):
        config = run_config(pushed, actor=LAYOUTS["tp2_sp"], engine=ENGINE)
        for metrics in run_ranks(2, push_and_verify, config, url, 1):
            assert metrics["sync/logprob_difference"] <= 1e-4 and metrics["sync/checksums"] > 10
