"""One FP8 update against the same one in bfloat16, for each recipe that this GPU has.

The bounds are not measurements of a GPU. Rounding inputs, weights and output gradients of this model's layers to
e4m3/e5m2 with one scale a tensor, in float32 on a CPU, gave a gradient cosine of 0.988, a mean |log-prob difference| of
0.039 and a relative loss difference of 6e-4 (2026-11-24); the bounds leave room around these.
"""

import pytest
import torch
from safetensors.torch import load_file

from dapo_megatron.actor.precision import RECIPES, check_precision, read_machine
from dapo_megatron.errors import DapoError
from tests.gpu.harness import cosine, has_transformer_engine, model_folder, relative_l2, run_worker
from tests.unit.actor.test_precision import SHAPE, fp8_config

needs_fp8 = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(not has_transformer_engine(), reason="TransformerEngine is not installed"),
]
CASES = [(recipe, gather) for recipe in RECIPES for gather in (False, True)]


def gpu(test):
    """Mark a test that needs a GPU and TransformerEngine."""
    for mark in needs_fp8:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def bf16(model, tmp_path_factory):
    return run_worker(tmp_path_factory.mktemp("bf16"), model)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[0] + ("-gather" if case[1] else ""))
def fp8(request, model, tmp_path_factory):
    """(recipe, gathers parameters, what the worker saved)."""
    recipe, gather = request.param
    try:
        check_precision(fp8_config(recipe), SHAPE, read_machine())
    except DapoError as e:
        pytest.skip(str(e))
    precision = {"fp8": recipe, "fp8_param_gather": gather}
    return recipe, gather, run_worker(tmp_path_factory.mktemp("fp8"), model, precision=precision)


def test_the_comparison_sees_bfloat16_against_float32(model, bf16, tmp_path):
    """A control that runs everywhere: worker, gradients and bounds, with a precision that is not FP8."""
    exact = run_worker(tmp_path, model, model={"dtype": "float32"}, actor={"layer_spec": "torch"})
    assert 0.99 < cosine(bf16["gradients"], exact["gradients"]) < 1 - 1e-9
    assert bf16["metrics"]["policy/loss"] == pytest.approx(exact["metrics"]["policy/loss"], rel=5e-3)
    assert 0 < float((bf16["logprobs"] - exact["logprobs"]).abs().mean()) < 0.02
    assert float((bf16["after"] - bf16["logprobs"]).mean()) > 0  # the update raised what it was trained on
    assert bf16["fp8_modules"] == []


@gpu
def test_layers_run_in_fp8_and_the_output_layer_does_not(fp8):
    _, _, run = fp8
    names = [n for n in run["fp8_modules"] if n.endswith(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"))]
    assert len(names) == 4 * 4
    assert not any("output_layer" in n or "embedding" in n for n in run["fp8_modules"])


@gpu
def test_loss_and_logprobs_are_near_bfloat16(fp8, bf16):
    _, _, run = fp8
    assert run["metrics"]["policy/loss"] == pytest.approx(bf16["metrics"]["policy/loss"], rel=0.02)
    difference = (run["logprobs"] - bf16["logprobs"]).abs()
    assert 0 < float(difference.mean()) < 0.1
    assert float((run["after"] - run["logprobs"]).mean()) > 0


@gpu
def test_gradients_point_the_same_way(fp8, bf16):
    _, _, run = fp8
    assert run["metrics"]["optimizer/skipped"] == 0
    assert cosine(run["gradients"], bf16["gradients"]) > 0.95
    assert run["metrics"]["optimizer/grad_norm"] == pytest.approx(bf16["metrics"]["optimizer/grad_norm"], rel=0.1)


@gpu
def test_export_after_fp8_training(fp8, bf16, model):
    _, gather, run = fp8
    original = load_file(model / "model.safetensors")
    assert run["weights"].keys() == original.keys()
    for name, tensor in run["weights"].items():
        assert tensor.shape == original[name].shape and tensor.dtype == torch.bfloat16, name
        assert type(tensor) is torch.Tensor and tensor.isfinite().all(), name
        assert relative_l2(tensor, bf16["weights"][name]) < (0.06 if gather else 0.02), name


@gpu
def test_first_and_last_layers_stay_in_bfloat16(model, tmp_path):
    run = run_worker(
        tmp_path, model, precision={"fp8": "tensorwise", "bf16_layers_at_start": 1, "bf16_layers_at_end": 1}
    )
    assert {int(n.split(".")[2]) for n in run["fp8_modules"]} == {1, 2}
