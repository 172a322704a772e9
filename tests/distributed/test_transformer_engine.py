"""TransformerEngine's layers and recipes, built from its real Python sources on a machine without a GPU."""

import json
import os
import subprocess
import sys

import pytest
import torch

from dapo_megatron.actor.precision import RECIPES, Machine, check_precision
from dapo_megatron.errors import DapoError
from tests.te_stub import ROOT
from tests.unit.actor.test_precision import SHAPE, fp8_config

VERSIONS = sorted(path.name for path in ROOT.glob("*") if (path / "transformer_engine").is_dir())
LAYERS = {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention"}

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu uses the real one"),
    pytest.mark.skipif(not VERSIONS, reason="no TransformerEngine sources in .venv-te: make setup"),
]


@pytest.fixture(scope="module", params=VERSIONS or ["none"])
def probed(request) -> dict:
    """What tests/distributed/te_probe.py says of one version; a process of its own, for the stub is for good."""
    command = [sys.executable, "-m", "tests.distributed.te_probe", str(ROOT / request.param)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout) | {"version": request.param}


def test_every_parameter_has_a_rule_and_every_tensor_a_parameter(probed):
    assert len(probed["families"]) == 6
    for name, family in probed["families"].items():
        # A tied output layer shares the embedding's parameter on a single stage, so it is named once.
        expected = set(family["rules"]) - ({"output_layer.weight"} if " tied" in name else set())
        assert set(family["parameters"]) == expected, name
        assert family["exported"] == family["hf"], name


def test_weights_go_in_and_out_unchanged(probed):
    assert {name: family["changed"] for name, family in probed["families"].items()} == {
        name: [] for name in probed["families"]
    }


def test_a_converted_checkpoint_holds_all_that_the_layers_ask_for(probed):
    for name, family in probed["families"].items():
        assert set(family["asked"]) == set(family["stored"]), name


def test_the_layers_are_transformer_engines(probed):
    for name, family in probed["families"].items():
        assert set(family["layers"]) >= LAYERS, name
        assert not {"PackedAttention", "TorchRMSNorm", "ColumnParallelLinear"} & set(family["layers"]), name


def test_each_recipe_is_the_one_that_was_asked_for(probed):
    got = {name: (r["class"], r["format"], r["e4m3"]) for name, r in probed["recipes"].items()}
    assert got == {
        "delayed": ("TEDelayedScaling", "HYBRID", "E4M3"),
        "tensorwise": ("Float8CurrentScaling", "HYBRID", "E4M3"),
        "blockwise": ("Float8BlockScaling", "E4M3", "E4M3"),
        "mxfp8": ("MXFP8BlockScaling", "E4M3", "E4M3"),
    }


def test_first_and_last_layers_stay_in_bfloat16(probed):
    for name, recipe in probed["recipes"].items():  # four layers; one at the start and two at the end
        assert recipe["on"] == ([True] * 4 if name == "delayed" else [False, True, False, False]), name


def test_the_machine_is_read(probed):
    assert probed["machine"] == {"transformer_engine": probed["version"], "capability": None, "cuda": "13.0"}


def test_our_table_is_what_transformer_engine_itself_supports(probed):
    seen = set()
    for recipe, capability, cuda, supported in probed["te"]:
        machine = Machine(probed["version"], tuple(capability), cuda)
        try:
            check_precision(fp8_config(recipe), SHAPE, machine)
            ours = True
        except DapoError:
            ours = False
        assert ours == supported, (recipe, capability, cuda)
        seen.add((recipe, supported))
    assert seen == {(recipe, answer) for recipe in RECIPES for answer in (True, False)}
