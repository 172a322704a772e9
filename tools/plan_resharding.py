"""What one push of weights moves, before anything runs: a function of a model's config.json and two layouts."""

import sys
from math import prod
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dapo_megatron.actor.layout_check import check_layout
from dapo_megatron.config import RunConfig, load_config
from dapo_megatron.config.load import parse_config
from dapo_megatron.errors import exit_code
from dapo_megatron.resharding.plan import PushPlan, plan_push
from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.hf_config import read_model

app = typer.Typer(add_completion=False, rich_markup_mode=None)
GB, GIB = 1e9, 2**30


@app.command(
    epilog="Examples:  python tools/plan_resharding.py my.yaml   |   python tools/plan_resharding.py "
    "models/Qwen2.5-32B actor.tensor_model_parallel_size=8 actor.pipeline_model_parallel_size=2 "
    "actor.data_parallel_size=4 engine.tensor_parallel_size=4 engine.replicas=16 --explain"
)
def command(
    source: Annotated[Path, typer.Argument(help="A recipe (YAML), or a model: its folder, or its config.json alone.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, as many as needed")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Every stage, link and bucket too.")] = False,
    network_gbs: Annotated[
        float, typer.Option(min=1e-3, help="GB/s of a broadcast from a sender to all engines: the slowest link's.")
    ] = 25.0,
    gather_gbs: Annotated[
        float, typer.Option(min=1e-3, help="GB/s that a sender gathers from the other ranks of its stage.")
    ] = 200.0,
) -> None:
    """Plan a push of weights from the trainer's layout to the engines': bytes, buckets, memory, seconds."""
    config = _config(source, overrides or [])
    shape = read_model(config.model.path)
    check_layout(config, shape)
    plan = plan_push(
        shape,
        config.actor,
        config.engine,
        dtype=config.model.dtype,
        engine_dtype=config.engine_dtype,
        bucket_bytes=config.resharding.bucket_mib << 20,
    )
    console = Console(soft_wrap=True, highlight=False)
    for line in summary(config, shape, plan, network_gbs, gather_gbs):
        console.print(line, markup=False)
    if explain:
        links = [] if config.resharding.transport == "disk" else [_engines(plan)]
        for table in (_stages(plan), *links, _buckets(plan)):
            console.print(table)


def _config(source: Path, overrides: list[str]) -> RunConfig:
    if source.suffix in (".yaml", ".yml"):
        return load_config(source, overrides)
    folder = source.parent if source.name == "config.json" else source
    # A push does not depend on data and lengths, but a configuration has them.
    tree = {
        "model": {"path": str(folder)},
        "data": {"train": "none", "max_prompt_tokens": 1},
        "rollout": {"max_response_tokens": 1},
        "algorithm": {"overlong_cache": 0},
        "engine": {"context_length": 2},
    }
    return parse_config(tree, str(source), overrides)


def summary(config: RunConfig, shape: ModelShape, plan: PushPlan, network_gbs: float, gather_gbs: float) -> list[str]:
    """The plan in a few lines."""
    a, e = config.actor, config.engine
    size, world = plan.bytes, e.replicas * e.tensor_parallel_size
    parameters = sum(prod(s) for stage in plan.stages for bucket in stage.buckets for s in bucket.shapes)
    sending, gathering = plan.bytes / GB / network_gbs, plan.gathered / GB / gather_gbs
    total = plan.seconds(network_gbs * GB, gather_gbs * GB)
    at_sender = f"{max(s.sender_peak for s in plan.stages) / GIB:.3g} GiB"
    gather = f"{gathering:.3g} s at {gather_gbs:g} GB/s to the senders"
    if config.resharding.transport == "disk":
        pieces, takes = "files", "reads"
        how = [
            f"disk      {2 * size / GB:.4g} GB in the run folder: two versions, until every engine has the newer one",
            f"memory    beside the weights: sender {at_sender}",
            f"time      not known: the disk's, beside it {gather}",
        ]
    else:
        pieces, takes = "buckets", "receives"
        how = [
            f"memory    beside the weights: sender {at_sender}, rank of an engine {plan.engine_peak / GIB:.3g} GiB",
            f"time      at least {total:.3g} s: {sending:.3g} s at {network_gbs:g} GB/s to all engines, "
            f"beside it {gather}",
        ]
    return [
        f"model     {shape.family.architecture}, {shape.layers} layers, {parameters / 1e9:.3g} B parameters, "
        f"{config.model.dtype} in the trainer, {config.engine_dtype} in the engines",
        f"trainer   TP {a.tensor_model_parallel_size} x PP {a.pipeline_model_parallel_size} x CP "
        f"{a.context_parallel_size} x DP {a.data_parallel_size}, EP {a.expert_model_parallel_size}: {a.world_size} "
        f"ranks, of which {len(plan.stages)} send",
        f"engines   {e.replicas} x TP {e.tensor_parallel_size}: {world} ranks",
        f"push      {size / GB:.4g} GB in {sum(len(s.buckets) for s in plan.stages)} {pieces}, the largest of "
        f"{plan.engine_peak / 2**20:.4g} MiB; each of the {world} ranks {takes} all of it and keeps "
        f"{max(plan.kept) / GB:.4g} GB",
        f"gather    {plan.gathered / GB:.4g} GB from other ranks to the senders",
        *how,
    ]


def _stages(plan: PushPlan) -> Table:
    gives = ("each TP rank gives", "each EP x ETP rank gives")
    table = Table("stage", "tensors", "buckets", "sends", *gives, "sender peak")
    table.title = "pipeline stages"
    for number, stage in enumerate(plan.stages):
        tensors = sum(len(bucket.names) for bucket in stage.buckets)
        given = [_gb(stage.contributed(experts=experts)) for experts in (False, True)]
        peak = f"{stage.sender_peak / GIB:.3g} GiB"
        table.add_row(str(number), str(tensors), str(len(stage.buckets)), _gb(stage.bytes), *given, peak)
    return table


def _engines(plan: PushPlan) -> Table:
    table = Table("engine", "ranks of each stage's group", *(f"from stage {i}" for i in range(len(plan.stages))), "all")
    table.title = "bytes over each link, to every rank of the engine"
    for engine in dict.fromkeys(link.engine for link in plan.links):
        links = [link for link in plan.links if link.engine == engine]
        ranks = links[0].ranks
        cells = [_gb(link.bytes) for link in links]
        table.add_row(str(engine), f"{ranks[0]} .. {ranks[-1]}", *cells, _gb(sum(link.bytes for link in links)))
    return table


def _buckets(plan: PushPlan) -> Table:
    table = Table("stage", "bucket", "MiB", "tensors", "names", title="buckets, in the order of sending")
    for number, stage in enumerate(plan.stages):
        for i, bucket in enumerate(stage.buckets):
            names = " .. ".join(dict.fromkeys((bucket.names[0], bucket.names[-1])))
            table.add_row(str(number), str(i), f"{bucket.bytes / 2**20:.1f}", str(len(bucket.names)), names)
    return table


def _gb(size: int) -> str:
    return f"{size / GB:.4g} GB" if size else "-"


def main() -> None:
    """Entry point: a DapoError is one line on stderr and exit code 1."""
    sys.exit(exit_code(app))


if __name__ == "__main__":
    main()
