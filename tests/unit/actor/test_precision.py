"""FP8: what is asked of model, options and machine, and what megatron-core is told."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dapo_megatron import cli
from dapo_megatron.actor import precision
from dapo_megatron.actor.precision import (
    RECIPES,
    Machine,
    check_precision,
    ddp_arguments,
    model_arguments,
    optimizer_arguments,
    require_precision,
)
from dapo_megatron.actor.packing_demands import packing_rules
from dapo_megatron.config import PrecisionConfig, load_config
from dapo_megatron.errors import ConfigError
from dapo_megatron.weights.families import FAMILIES, ModelShape
from launch.topology import Node
from tests.tiny import groups, hf_folder, packed_batch, run_config

HOPPER = Machine("2.20.2", (9, 0), "13.0")
BLACKWELL = Machine("2.20.2", (10, 0), "13.0")
SHAPE = ModelShape(
    family=FAMILIES["Qwen3ForCausalLM"],
    layers=4,
    hidden=256,
    ffn=768,
    heads=8,
    kv_heads=4,
    head_dim=32,
    vocab=1000,
    tied=True,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    max_positions=4096,
)


def fp8_config(recipe: str = "blockwise", dtype: str = "bfloat16", actor: dict | None = None, **options):
    return run_config(
        Path("m"), model={"dtype": dtype}, actor=actor or {}, precision={"fp8": recipe, **options}, engine={}
    )


def refusal(config, machine=BLACKWELL, **shape) -> str:
    with pytest.raises(ConfigError) as e:
        check_precision(config, dataclasses.replace(SHAPE, **shape), machine)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_fitting_machine_and_model_pass(recipe):
    check_precision(fp8_config(recipe), SHAPE, BLACKWELL)
    check_precision(fp8_config(recipe, actor={"tensor_model_parallel_size": 4}), SHAPE, BLACKWELL)


def test_off_asks_for_nothing():
    nowhere = Machine(None, None, None)
    check_precision(fp8_config("off", dtype="float32"), dataclasses.replace(SHAPE, hidden=17), nowhere)
    assert model_arguments(PrecisionConfig()) == ddp_arguments(PrecisionConfig()) == {}
    assert optimizer_arguments(PrecisionConfig()) == {}


@pytest.mark.parametrize("recipe", RECIPES)
def test_without_transformer_engine_nothing_trains_in_bf16_silently(recipe):
    said = refusal(fp8_config(recipe), Machine(None, (10, 0), "13.0"))
    assert f"precision.fp8={recipe} needs TransformerEngine" in said and "pip install" in said


@pytest.mark.parametrize(
    ("recipe", "version", "enough"),
    [
        ("delayed", "0.13.0", False),
        ("delayed", "1.13.0", True),
        ("tensorwise", "2.1.0", False),
        ("tensorwise", "2.2.0.dev0+abc", True),
        ("blockwise", "2.2.0", False),
        ("blockwise", "2.10.0", True),  # not a comparison of strings
        ("mxfp8", "2.0", False),
        ("mxfp8", "2.1.0", True),
    ],
)
def test_versions(recipe, version, enough):
    machine = dataclasses.replace(BLACKWELL, transformer_engine=version)
    if enough:
        check_precision(fp8_config(recipe), SHAPE, machine)
    else:
        assert f"{version} is installed" in refusal(fp8_config(recipe), machine)


@pytest.mark.parametrize(
    ("recipe", "machine", "says"),
    [
        ("delayed", Machine("2.20.2", None, None), "needs a GPU"),
        ("delayed", Machine("2.20.2", (8, 0), "13.0"), "8.9 or higher, this GPU has 8.0: take off"),
        ("tensorwise", Machine("2.20.2", (8, 6), "13.0"), "8.9 or higher, this GPU has 8.6: take off"),
        ("blockwise", Machine("2.20.2", (8, 9), "13.0"), "9.0 or higher, this GPU has 8.9: take delayed or tensorwise"),
        ("blockwise", Machine("2.20.2", (9, 0), "12.8"), "CUDA 12.9 or newer, this one is for 12.8"),
        ("blockwise", Machine("2.20.2", (9, 0), None), "CUDA 12.9 or newer, this one is for None"),
        ("mxfp8", HOPPER, "10.0 or higher, this GPU has 9.0: take delayed or tensorwise or blockwise"),
        ("mxfp8", Machine("2.20.2", (12, 0), "13.0"), "not supported by TransformerEngine on compute capability 12.0"),
    ],
)
def test_machines(recipe, machine, says):
    assert says in refusal(fp8_config(recipe), machine)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "float32"}, "model.dtype=bfloat16"),
        ({"actor": {"layer_spec": "torch"}}, "actor.layer_spec"),
        ({"recipe": "delayed", "bf16_layers_at_end": 1}, "cannot keep first or last layers"),
        ({"bf16_layers_at_start": 5}, "bf16_layers_at_start=5 exceeds the 4 layers"),
        (
            {"bf16_layers_at_end": 3, "actor": {"pipeline_model_parallel_size": 2}},
            "bf16_layers_at_end=3 exceeds the 2 layers",
        ),
    ],
)
def test_options(options, says):
    assert says in refusal(fp8_config(**options))


def test_a_gather_needs_a_recipe(tmp_path):
    (tmp_path / "r.yaml").write_text("model: {path: m}\ndata: {train: t}\n")
    with pytest.raises(ConfigError, match="fp8_param_gather needs an FP8 recipe"):
        load_config(tmp_path / "r.yaml", ["precision.fp8_param_gather=true"])


@pytest.mark.parametrize(
    ("recipe", "shape", "tp", "says"),
    [
        ("delayed", {"hidden": 264}, 1, "hidden size to be a multiple of 16, it is 264"),
        ("mxfp8", {"hidden": 272}, 1, "hidden size to be a multiple of 32, it is 272"),
        ("tensorwise", {"ffn": 776}, 1, "intermediate size / TP 1 to be a multiple of 16, it is 776"),
        ("tensorwise", {"ffn": 784}, 2, "intermediate size / TP 2 to be a multiple of 16, it is 392"),
        ("blockwise", {"heads": 4, "kv_heads": 4, "head_dim": 20}, 2, "attention heads x head size / TP 2"),
        ("mxfp8", {"heads": 8, "kv_heads": 1, "head_dim": 20}, 1, "query, key and value rows / TP 1"),
        ("blockwise", {"hidden": 576}, 2, "multiple of 128, it is 576"),
    ],
)
def test_sizes(recipe, shape, tp, says):
    assert says in refusal(fp8_config(recipe, actor={"tensor_model_parallel_size": tp}), **shape)


def test_blocks_may_be_cut_where_nothing_is_gathered_in_fp8():
    shape = dataclasses.replace(SHAPE, hidden=576)
    check_precision(fp8_config("blockwise"), shape, HOPPER)
    whole = {"tensor_model_parallel_size": 2, "sequence_parallel": False}
    check_precision(fp8_config("blockwise", actor=whole), shape, HOPPER)


@pytest.mark.parametrize(
    ("recipe", "tokens"), [("off", 1), ("delayed", 16), ("tensorwise", 16), ("blockwise", 128), ("mxfp8", 32)]
)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_padding_fits_each_rank_and_is_not_trained(recipe, tokens, tp):
    config = fp8_config(recipe, actor={"tensor_model_parallel_size": tp})
    rules = dataclasses.replace(packing_rules(config), data_parallel_size=3)
    assert rules.total_multiple == tokens * tp
    made = groups()
    for budget in (200, 1000):
        batch = packed_batch(
            made,
            step=1,
            version=0,
            seed=0,
            mini_batch_groups=2,
            aggregation="token",
            rules=dataclasses.replace(rules, micro_batch_tokens=budget),
        )
        micro_batches = [mb for m in batch.mini_batches for shard in m.shards for mb in shard]
        assert all(len(mb.tokens) % (tokens * tp) == 0 for mb in micro_batches)
        trained = sum(len(r.token_ids) for g in made for r in g.responses)
        assert sum(int(mb.active.sum()) for mb in micro_batches) == trained
        assert all((mb.weights[~mb.active] == 0).all() for mb in micro_batches)


@pytest.mark.parametrize(("recipe", "equal"), [("off", False), ("delayed", True), ("blockwise", False)])
def test_replicas_run_equally_many_micro_batches_where_each_of_them_exchanges_something(recipe, equal):
    """Delayed scaling exchanges maxima, experts their tokens; otherwise padding alone would be run for nothing."""
    assert packing_rules(fp8_config(recipe, actor={"data_parallel_size": 2})).equal_counts == equal
    experts = {"data_parallel_size": 2, "expert_model_parallel_size": 2}
    assert packing_rules(fp8_config(recipe, actor=experts)).equal_counts


def test_what_megatron_core_is_told():
    p = PrecisionConfig(fp8="blockwise", bf16_layers_at_start=1)
    assert model_arguments(p) == {
        "fp8": "e4m3",
        "fp8_recipe": "blockwise",
        "fp8_param": False,
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 1,
        "num_layers_at_end_in_bf16": 0,
    }
    assert (ddp_arguments(p), optimizer_arguments(p)) == ({}, {})
    assert model_arguments(PrecisionConfig(fp8="delayed"))["first_last_layers_bf16"] is False
    assert model_arguments(PrecisionConfig(fp8="mxfp8", fp8_format="hybrid"))["fp8"] == "hybrid"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gather_in_fp8_is_told_to_model_ddp_and_optimizer(recipe):
    p = PrecisionConfig(fp8=recipe, fp8_param_gather=True)
    assert model_arguments(p)["fp8_param"] is True
    assert ddp_arguments(p)["fp8_param_gather"] is True
    assert optimizer_arguments(p)["fp8_recipe"] == recipe
    shared = "reuse_grad_buf_for_mxfp8_param_ag"
    assert (shared in ddp_arguments(p), shared in optimizer_arguments(p)) == (recipe == "mxfp8",) * 2


def test_the_machine_is_looked_at_only_for_fp8(monkeypatch):
    monkeypatch.setattr(precision, "read_machine", lambda: pytest.fail("looked"))
    require_precision(fp8_config("off"), SHAPE)


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None and torch.cuda.is_available(),
    reason="this machine can train in FP8",
)
@pytest.mark.parametrize("arguments", [["--dry-run"], []])
def test_a_run_is_refused_before_anything_starts(tmp_path, monkeypatch, arguments):
    model = hf_folder(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "r.yaml").write_text(f"model: {{path: {model}}}\ndata: {{train: {tmp_path}/train.jsonl}}\n")
    monkeypatch.setattr("launch.local.run_local", lambda *a, **k: pytest.fail("started"))
    monkeypatch.setattr(cli, "_run_module", lambda *a: None)  # reads the rows of the data
    monkeypatch.setattr("launch.local.this_machine", lambda: Node("here", "127.0.0.1", 0, 2))
    small = ["engine.context_length=512", "rollout.max_response_tokens=256", "data.max_prompt_tokens=256"]
    overrides = [*small, "algorithm.overlong_cache=64", f"run_dir={tmp_path}/run"]
    command = ["run", str(tmp_path / "r.yaml"), *overrides, *arguments]
    refused = CliRunner().invoke(cli.app, [*command, "precision.fp8=delayed"])
    assert isinstance(refused.exception, ConfigError) and "TransformerEngine" in str(refused.exception)
    assert not (tmp_path / "run").exists()
    if arguments:
        assert CliRunner().invoke(cli.app, command).exit_code == 0
