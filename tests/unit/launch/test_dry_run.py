"""The dry run of a cluster's job: the shipped scripts, and cases that cannot work, each refused in one line."""

import io
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from dapo_megatron.config import load_config
from dapo_megatron.errors import DapoError
from launch import slurm
from launch.demo import write_data, write_model
from launch.dry_run import Gpu, Options, _gpu, dry_run
from launch.engine_memory import engine_memory
from launch.host_memory import GIB
from launch.plan import micro_batches
from launch.sbatch import Request
from tests.unit.actor.test_memory import QWEN_32B
from tests.unit.weights.real_configs import CONFIGS

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "launch" / "recipes"
QWEN = CONFIGS["Qwen/Qwen2.5-32B, with YaRN as its README says"] | {"rope_scaling": None}
SIZES_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
RUN_32B = 'exec python -m launch.slurm --recipe launch/recipes/dapo_qwen2.5_32b.yaml "$@"'
MODELS = {"32b": QWEN, "7b": QWEN | SIZES_7B}
OPTIONS = Options(
    script=None,
    nodes=None,
    gpus_per_node=8,
    cpus_per_node=96,
    gpu_memory_gib=None,
    host_memory_gib=None,
    bandwidth_gbs=25.0,
    tokens_per_second=None,
    response_tokens=None,
    shape_only=True,
    bash=False,
)


def told(folder, size, *overrides, **options):
    """(what is printed, on stdout) for a job of that recipe; the model folder holds config.json alone."""
    (folder / "config.json").write_text(json.dumps(MODELS[size]))
    (folder / "data.jsonl").touch()
    given = [f"model.path={folder}", f"data.train={folder / 'data.jsonl'}", f"data.eval={folder / 'data.jsonl'}"]
    out = io.StringIO()
    recipe = RECIPES / f"dapo_qwen2.5_{size}.yaml"
    dry_run(recipe, [*given, *overrides], replace(OPTIONS, **options), Console(file=out, width=120))
    return out.getvalue()


def words_of_rows(text):
    """Of every row of its tables."""
    return [" ".join(line.split("│")[1:-1]).split() for line in text.splitlines() if line.startswith("│")]


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads(recipe):
    load_config(recipe, [])


@pytest.mark.parametrize("size", ["32b", "7b"])
def test_the_hyper_parameters_of_the_paper(size):
    c = load_config(RECIPES / f"dapo_qwen2.5_{size}.yaml", [])
    assert (c.rollout.prompts_per_step, c.rollout.group_size, c.updates_per_step, c.warmup_updates) == (
        512,
        16,
        16,
        320,
    )
    assert c.trainer.mini_batch_prompts * c.rollout.group_size == 512
    assert (c.rollout.max_response_tokens, c.algorithm.overlong_cache) == (20480, 4096)
    assert (c.algorithm.clip_low, c.algorithm.clip_high, c.algorithm.aggregation) == (0.2, 0.28, "token")
    assert (c.optimizer.lr, c.rollout.temperature, c.rollout.max_policy_lag) == (1e-6, 1.0, 1)
    assert (c.evaluation.samples, c.evaluation.top_p, c.algorithm.dynamic_sampling) == (32, 0.7, True)


def test_32b_on_16_nodes(tmp_path):
    text = told(tmp_path, "32b", script=ROOT / "slurm" / "dapo_32b.sh")
    rows = words_of_rows(text)
    assert ["node1", "ranks", "0-7", "controller"] in rows
    assert ["node16", "engine-14", "(0-3),", "engine-15", "(4-7)"] in rows
    assert ["parameters", "3.81", "3.81"] in rows and ["optimizer", "5.72", "5.72"] in rows
    assert ["weights", "15.3"] in rows  # 61.0 GiB over 4 GPUs
    assert ["weight", "push", "61.0", "GiB", "in", "66", "buckets"] in rows and "2.6 s at 25 GB/s" in text
    assert "beside the weights: sender 4.96 GiB, rank of an engine 1.45" in text  # as tools/plan_resharding.py says
    assert " tokens/s" not in text and "of 80 (5 of them in reserve)" in text
    assert text.endswith("dry run: nothing was started\n")


def test_7b_on_2_nodes(tmp_path):
    text = told(tmp_path, "7b", script=ROOT / "slurm" / "dapo_7b.sh", tokens_per_second=8192.0, response_tokens=5000)
    assert "node2" in text and "node3" not in text and "engine-7 (7)" in text
    assert "5000 s at 8192 tokens/s" in text and "with 5000 tokens a response" in text


def test_7b_on_one_node(tmp_path):
    one = ["launch.engine_nodes=null", "engine.replicas=4", "actor.data_parallel_size=1"]
    assert "ranks 0-3" in told(tmp_path, "7b", *one, nodes=1)


def test_a_heterogeneous_job(tmp_path):
    script = tmp_path / "het.sh"
    groups = "#SBATCH --nodes=8 --gpus-per-node=8\n#SBATCH hetjob\n#SBATCH --nodes=8 --gpus-per-node=h200:8\n"
    run = 'exec python -m launch.slurm --recipe launch/recipes/dapo_qwen2.5_32b.yaml engine.mem_fraction=0.5 "$@"\n'
    script.write_text("#!/bin/bash\n" + groups + run)
    text = told(tmp_path, "32b", script=script)
    assert "node16" in text and "of 141 (engine.mem_fraction=0.5)" in text
    assert "of 141 (engine.mem_fraction=0.6)" in told(tmp_path, "32b", "engine.mem_fraction=0.6", script=script)


def test_the_host_memory_of_each_node(tmp_path):
    """Controller and graders are on the first one; what each group of nodes asks for counts for itself."""
    script = tmp_path / "het.sh"
    trainer, engines = "--nodes=8 --gpus-per-node=8 --mem=430G", "--nodes=8 --gpus-per-node=8 --mem=1G"
    script.write_text(f"#!/bin/bash\n#SBATCH {trainer}\n#SBATCH hetjob\n#SBATCH {engines}\n{RUN_32B}\n")
    text = told(tmp_path, "32b", script=script)
    rows = words_of_rows(text)
    assert ["node1", "53.4", "351.0", "2.81", "16.0", "423.2", "430"] in rows
    assert ["node2", "..", "node8", "(7", "nodes)", "53.4", "351.0", "0.00", "0.00", "404.4", "430"] in rows
    assert "node9 .." not in text
    script.write_text(script.read_text().replace("430G", "400G"))
    with pytest.raises(DapoError, match=r"node2 .. node8 \(7 nodes\): a node needs 404.4 GiB"):
        told(tmp_path, "32b", script=script)


def test_without_gpus_ranks_and_engines_are_in_host_memory(tmp_path):
    options = {"nodes": 16, "gpus_per_node": 0}
    text = told(tmp_path, "32b", "engine.max_total_tokens=45056", **options)
    rows = words_of_rows(text)
    assert ["KV", "cache", "2.75"] in rows and ["most", "at", "one", "time", "26.7", "26.7"] in rows
    # Eight ranks; two engines of four processes, each with 15.26 of weights, its KV cache and a bucket of 1.45.
    assert ["node1", "213.6", "0.00", "53.4", "351.0", "2.81", "16.0", "636.8", "not", "known"] in rows
    assert ["node9", "..", "node16", "(8", "nodes)", "0.00", "155.7"] in [row[:7] for row in rows]
    with pytest.raises(DapoError, match=r"\(8 nodes\): a node needs 155.7 GiB of host memory \(engines 155.7\), "):
        told(tmp_path, "32b", "engine.max_total_tokens=45056", host_memory_gib=155.0, **options)
    assert "not known: as the node has room; set engine.max_total_tokens" in told(tmp_path, "32b", **options)


def test_of_two_kinds_of_gpu_the_smaller_one_counts():
    kinds = [Request(8, 8, 96, "h200"), Request(8, 8, 96, "h100")]
    for groups in (kinds, kinds[::-1]):
        assert _gpu(groups, None).gib == 80 and _gpu(groups, 60.0) == Gpu(60.0, (9, 0))
    assert _gpu([Request(8, 8, 96)], None).gib == 80


@pytest.mark.parametrize(
    ("tokens", "replicas", "count"),
    [
        (5000, 1, 171),  # 512 sequences, 3 in each
        (5000, 8, 22),  # 64 a replica
        (16384, 8, 64),
        (22528, 8, 64),  # one that is longer than the budget stands alone
    ],
)
def test_micro_batches_by_hand(tokens, replicas, count):
    layout = [f"actor.data_parallel_size={replicas}", "actor.micro_batch_tokens=16384"]
    config = load_config(RECIPES / "dapo_qwen2.5_32b.yaml", [*layout, "launch.engine_nodes=null"])
    assert micro_batches(config, tokens) == count


@pytest.mark.parametrize(("tp", "heads"), [(1, 8), (4, 2), (8, 1), (16, 1)])
def test_the_kv_cache_of_an_engine_by_hand(tp, heads):
    """GPUs of 80 GiB, 0.9 of them for bfloat16 weights and the cache; beyond 8 GPUs, two hold the same head."""
    changes = [f"engine.tensor_parallel_size={tp}", "engine.mem_fraction=0.9", "engine.replicas=1"]
    config = load_config(RECIPES / "dapo_qwen2.5_32b.yaml", changes)
    found = engine_memory(config, QWEN_32B, 80 * GIB)
    token = 2 * 64 * heads * 128 * 2
    assert found.weights == 32763876352 * 2 // tp
    assert (
        found.kv_tokens == (int(80 * GIB * 0.9) - found.weights) // token and found.kv_cache == found.kv_tokens * token
    )


CANNOT_WORK = {
    "too few GPUs": ([], {"nodes": 12}, "64 trainer ranks (TP x PP x CP x DP) need 8 times 8 GPUs"),
    "no node for the trainer": ([], {"nodes": 8}, "launch.engine_nodes=8 leaves no node for the trainer"),
    "heads of the trainer": (["actor.tensor_model_parallel_size=16"], {}, "=16 does not divide the model's number of"),
    "heads of the engine": (
        ["engine.tensor_parallel_size=3"],
        {},
        "engine.tensor_parallel_size=3 does not divide the model's 40 attention heads",
    ),
    "layers": (["actor.pipeline_model_parallel_size=3", "actor.data_parallel_size=1"], {}, "number of layers 64"),
    "activations": (["actor.recompute=false"], {}, "stage 0 of the trainer needs 77.0 GiB a GPU"),
    "memory of the trainer": ([], {"gpu_memory_gib": 30.0, "nodes": 16}, "GPUs of 30 GiB have 25 for it"),
    "memory of the engine": (["engine.mem_fraction=0.1"], {}, "15.3 GiB of weights a GPU leave no KV cache"),
    "KV cache": (["engine.max_total_tokens=20000"], {}, "KV cache holds 20000 tokens, one sequence may have 22528"),
    "bucket of an engine": (["resharding.bucket_mib=16384"], {}, "leaves 12.0 of an engine's GPU: lower resharding."),
    "bucket of a sender": (
        ["resharding.bucket_mib=16384", "resharding.transport=disk"],
        {"gpu_memory_gib": 50.0},
        "the sender of pipeline stage 0 needs 33.2 GiB for a push beside 17.2, GPUs of 50 GiB have 45 for both: lower",
    ),
    "host memory": ([], {"host_memory_gib": 415.0}, "node1: a node needs 423.2 GiB of host memory (copy 53.4, "),
    "engine context": (["engine.context_length=20480"], {}, "exceed engine.context_length=20480"),
    "context of the model": (["engine.context_length=131073"], {}, "max_position_embeddings=131072"),
    "a missing data file": (["data.train=nowhere.parquet"], {}, "data.train=nowhere.parquet does not exist"),
    "a missing image": (
        ["launch.container={runtime: pyxis, image: /nowhere/dapo.sqsh}"],
        {},
        "launch.container.image=/nowhere/dapo.sqsh does not exist",
    ),
    "no weights": ([], {"shape_only": False}, "safetensors"),
    "mini-batch": (["trainer.mini_batch_prompts=48"], {}, "mini_batch_prompts=48 must divide"),
    "another recipe": (
        [],
        {"nodes": None, "script": ROOT / "slurm" / "dapo_7b.sh"},
        "runs launch/recipes/dapo_qwen2.5_7b",
    ),
    "no script": ([], {"nodes": None, "script": Path("nowhere.sh")}, "--script nowhere.sh: No such file"),
    "no nodes": ([], {"nodes": None}, "give --script slurm/x.sh, or --nodes"),
    "a file for the run folder": (["run_dir=/etc/passwd/run"], {}, "run_dir=/etc/passwd/run is a file, or lies in one"),
    "no such Python": (["engine.python=/nowhere/python"], {}, "engine.python=/nowhere/python cannot be started"),
}


@pytest.mark.parametrize("case", CANNOT_WORK)
def test_refused(tmp_path, case, capsys):
    overrides, options, says = CANNOT_WORK[case]
    with pytest.raises(DapoError) as e:
        told(tmp_path, "32b", *overrides, **({"nodes": 16} | options))
    assert says in str(e.value) and "\n" not in str(e.value)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("line", "options", "says"),
    [
        ("--gpus-per-node=v100:8", {}, "the memory of a GPU called v100 is not known here"),
        ("--gpus-per-node=v100:8", {"gpu_memory_gib": 20.0}, "GPUs of 20 GiB have 15 for it"),
        ("--gpus-per-node=8 --mem=420G", {}, "node1: a node needs 423.2 GiB of host memory"),
        ("--gpus-per-node=8 --mem=500G", {"host_memory_gib": 420.0}, "the job has 420 there: ask for more (#SBATCH"),
        ("--gpus-per-node=8 --mem=0", {"host_memory_gib": 420.0}, "the job has 420 there"),
        ("--gpus-per-node=8 --signal=USR1@1800", {}, "--signal=USR1@1800 ends engines and trainer"),
        ("--gpus-per-node=8 --time=1:00:00 --signal=B:USR1@3600", {}, "--signal comes 3600 s before the end of a job"),
        ("--gpus-per-node=8 --time=00:20:00", {}, "save_before_end_s=1500 leaves nothing of a job of 1200 s"),
    ],
)
def test_a_script_that_cannot_work(tmp_path, line, options, says):
    script = tmp_path / "x.sh"
    script.write_text(f"#!/bin/bash\n#SBATCH --nodes=16 {line}\n{RUN_32B}\n")
    with pytest.raises(DapoError) as e:
        told(tmp_path, "32b", script=script, **options)
    assert says in str(e.value)


def test_a_script_of_another_system(tmp_path):
    script = tmp_path / "x.sh"
    text = f"#!/bin/bash\n# caf\xe9\n#SBATCH --nodes=16 --gpus-per-node=8\n{RUN_32B}\n".encode("latin-1")
    script.write_bytes(text)
    assert "node16" in told(tmp_path, "32b", script=script)
    script.write_bytes(text.replace(b"\n", b"\r\n"))
    with pytest.raises(DapoError, match=rf"--script {script} has DOS line breaks \(\\r\\n\), which sbatch refuses"):
        told(tmp_path, "32b", script=script)


def test_too_few_nodes_do_not_hide_what_else_is_wrong(tmp_path, capsys):
    with pytest.raises(DapoError, match="leaves no node for the trainer"):
        told(tmp_path, "32b", "data.train=nowhere.parquet", nodes=4)
    assert capsys.readouterr().err == "error: data.train=nowhere.parquet does not exist\n"


def test_an_image_of_a_registry_is_left_to_the_nodes(tmp_path):
    assert "nothing was started" in told(
        tmp_path, "32b", "launch.container={runtime: apptainer, image: docker://ubuntu}", nodes=16
    )


def test_another_nccl_is_refused(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 2.19.3\n")
    python.chmod(0o755)
    with pytest.raises(DapoError, match=rf"{python} has NCCL 2\.19\.3, {sys.executable} has .*: a weight push needs"):
        told(tmp_path, "32b", f"engine.python={python}", nodes=16)
    told(tmp_path, "32b", f"engine.python={python}", "resharding.transport=disk", nodes=16)
    python.write_text("#!/bin/sh\necho 'ImportError: no torch' >&2; exit 1\n")
    with pytest.raises(DapoError, match="cannot import torch: ImportError: no torch"):
        told(tmp_path, "32b", f"engine.python={python}", nodes=16)


def test_all_reasons_at_once_from_the_command_line(tmp_path):
    """The plan is printed too; each reason is one line."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    overrides = [f"model.path={tmp_path}", "data.train=nowhere", "actor.recompute=false", "engine.mem_fraction=0.1"]
    command = ["--recipe", str(RECIPES / "dapo_qwen2.5_32b.yaml"), "--dry-run", "--shape-only", *overrides]
    nodes = ["--script", str(ROOT / "slurm" / "dapo_32b.sh")]
    found = CliRunner().invoke(slurm.app, command + nodes)
    errors = found.stderr.splitlines()
    assert found.exit_code == 1 and len(errors) == 3 and all(line.startswith("error: ") for line in errors)
    assert "nowhere does not exist" in errors[0] and "weight push" in found.stdout
    assert "nothing was started" not in found.stdout


@pytest.mark.slow
def test_the_demo_on_three_nodes(tmp_path, capfd):
    """CPUs alone, and everything is there: the rows are read too."""
    write_data(tmp_path, random.Random(0))
    write_model(tmp_path / "model")
    data = [f"data.{name}={tmp_path / name}.jsonl" for name in ("train", "eval")]
    given = [f"model.path={tmp_path / 'model'}", *data, f"run_dir={tmp_path / 'run'}"]
    out = io.StringIO()
    options = replace(OPTIONS, script=ROOT / "slurm" / "dapo_smoke.sh", shape_only=False)
    dry_run(RECIPES / "demo.yaml", given, options, Console(file=out, width=120))
    assert "engine-0" in out.getvalue() and "GiB a process" in out.getvalue()
    assert "data.eval: 200 prompts" in capfd.readouterr().out
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(typer.Exit):
        dry_run(RECIPES / "demo.yaml", given, options, Console(file=out, width=120))
    assert "train.jsonl" in capfd.readouterr().err


def test_a_run_that_cannot_be_gone_on_with(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("model: {path: another}\ndata: {train: another}\n")
    with pytest.raises(DapoError, match="a resume cannot change model.path"):
        told(tmp_path, "32b", f"run_dir={run}", nodes=16)


def test_the_script_that_would_run(tmp_path):
    shipped = (ROOT / "slurm" / "dapo_32b.sh").read_text()
    text = told(tmp_path, "32b", script=ROOT / "slurm" / "dapo_32b.sh", bash=True)
    assert text.startswith(shipped[: shipped.index("exec")]) and f"model.path={tmp_path} " in text and "$@" not in text
    made = told(tmp_path, "32b", nodes=16, bash=True)
    assert "#SBATCH --nodes=16\n" in made and "#SBATCH --gpus-per-node=8\n" in made and "$@" not in made
