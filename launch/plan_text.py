"""A plan as tables for a terminal."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from dapo_megatron.actor.memory import longest_micro_batch
from launch.host_memory import GIB
from launch.plan import RESERVE_GIB, Plan, micro_batches
from launch.topology import named


def print_plan(plan: Plan, console: Console) -> None:
    """Placement, layout, batches, memory, push, checkpoint and, where a rate was given, the time of a step."""
    tables = [_placement(plan), _layout(plan), _batches(plan), *_memory(plan), _host(plan), _transfers(plan)]
    for title, table in tables:
        console.print(f"\n{title}", highlight=False)
        console.print(table)


_Titled = tuple[str, Table]


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> _Titled:
    table = Table(*head, show_header=any(head))
    for row in rows:
        table.add_row(*row)
    return title, table


def _placement(plan: Plan) -> _Titled:
    p = plan.placement
    rows = []
    for node in p.nodes:
        ranks = [r.rank for r in p.ranks if r.node == node]
        trains = f"ranks {ranks[0]}-{ranks[-1]}" if ranks else ""
        engines = [f"{e.name}{_devices(e.devices)}" for e in p.engines if e.node == node]
        rows.append((node.name, trains, "controller" if p.controller.node == node else "", ", ".join(engines)))
    return _table("placement", ("node", "trainer", "controller", "engines (GPUs)"), rows)


def _devices(devices: Sequence[int]) -> str:
    if not devices:
        return ""
    return f" ({devices[0]})" if len(devices) == 1 else f" ({devices[0]}-{devices[-1]})"


def _layout(plan: Plan) -> _Titled:
    a, e = plan.config.actor, plan.config.engine
    sizes = {
        "TP": a.tensor_model_parallel_size,
        "PP": a.pipeline_model_parallel_size,
        "VPP": a.virtual_pipeline_model_parallel_size,
        "CP": a.context_parallel_size,
        "EP": a.expert_model_parallel_size,
        "DP": a.data_parallel_size,
    }
    trainer = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one rank"
    parallel = "sequence parallel" if a.sequence_parallel and a.tensor_model_parallel_size > 1 else ""
    return _table(
        "parallel layout",
        ("", "processes", "layout", ""),
        [
            ("trainer", f"{a.world_size} ranks", trainer, parallel),
            ("engines", f"{e.replicas} servers", f"TP {e.tensor_parallel_size}", plan.config.engine_dtype),
        ],
    )


def _batches(plan: Plan) -> _Titled:
    c, r, a = plan.config, plan.config.rollout, plan.config.actor
    longest = c.data.max_prompt_tokens + r.max_response_tokens
    rows = {
        "responses a step": f"{r.prompts_per_step} prompts x {r.group_size} = {r.prompts_per_step * r.group_size}",
        "updates a step": str(c.updates_per_step),
        "responses a mini-batch": f"{c.trainer.mini_batch_prompts} prompts x {r.group_size} = "
        f"{c.trainer.mini_batch_prompts * r.group_size}",
        "longest sequence": f"{longest} tokens",
        "micro-batch": f"at most {longest_micro_batch(c) * a.context_parallel_size} tokens",
        "micro-batches a replica and update": f"at most {micro_batches(c, longest)}, all of the longest sequences",
        "policy lag": str(r.max_policy_lag),
    }
    return _table("batches", ("", ""), rows.items())


def _memory(plan: Plan) -> list[_Titled]:
    stages, gpu = plan.trainer, plan.cluster.gpu_gib
    where = "process" if plan.placement.cpu else "GPU"
    rows = [(name, *(_gib(s.parts[name]) for s in stages)) for name in stages[0].parts]
    rows.append(("most at one time", *(_gib(s.peak) for s in stages)))
    limit = "" if plan.placement.cpu else f", of {gpu:g} ({RESERVE_GIB:g} of them in reserve)"
    trainer = _table(
        f"trainer, GiB a {where}{limit}; actor.recompute={str(plan.config.actor.recompute).lower()}",
        ("part", *(f"stage {s.stage}" for s in stages)),
        rows,
    )
    e, c = plan.engine, plan.config
    longest = c.data.max_prompt_tokens + c.rollout.max_response_tokens
    limit = "" if plan.placement.cpu else f", of {gpu:g} (engine.mem_fraction={c.engine.mem_fraction:g})"
    engine_rows = [("weights", _gib(e.weights))]
    if plan.placement.cpu and c.engine.max_total_tokens is None:
        engine_rows.append(("KV cache", "not known: as the node has room; set engine.max_total_tokens"))
    else:
        tokens = f"{e.kv_tokens}: {e.kv_tokens // longest} of the longest sequences"
        engine_rows += [("KV cache", _gib(e.kv_cache)), ("tokens in one engine's KV cache", tokens)]
    return [trainer, _table(f"engine, GiB a {where}{limit}", ("part", ""), engine_rows)]


def _host(plan: Plan) -> _Titled:
    parts = [name for name in plan.hosts[0].each.parts if any(hosts.each.parts[name] for hosts in plan.hosts)]
    rows = []
    for hosts in plan.hosts:
        gib = hosts.nodes[0].memory_gib
        sizes = [*(hosts.each.parts[name] for name in parts), hosts.each.total]
        rows.append((named(hosts.nodes), *map(_gib, sizes), "not known" if gib is None else f"{gib:g}"))
    title = "host memory of a node, GiB at most, beside Python and its libraries; copy, gather: of a checkpoint"
    return _table(title, ("", *parts, "together", "of"), rows)


def _transfers(plan: Plan) -> _Titled:
    c, push = plan.cluster, plan.push
    if plan.config.resharding.transport == "disk":
        pieces, takes = (
            "files",
            f"{_gib(2 * push.bytes)} GiB of disk, for two versions; it takes as long as the disk",
        )
    else:
        pieces, takes = "buckets", f"{push.seconds:.1f} s at {c.bandwidth_gbs:g} GB/s (--bandwidth-gbs)"
    rows = [
        ("weight push", f"{_gib(push.bytes)} GiB in {push.buckets} {pieces}"),
        ("", takes),
        ("", f"beside the weights: sender {_gib(max(push.senders))} GiB, rank of an engine {_gib(push.engine)}"),
        ("checkpoint", f"{_gib(plan.save.disk)} GiB, every {plan.config.checkpoint.every} steps"),
    ]
    if plan.step_seconds is not None:
        tokens = c.response_tokens or plan.config.rollout.max_response_tokens
        rows.append(("step", f"{plan.step_seconds:.0f} s at {c.tokens_per_second:g} tokens/s"))
        rows.append(("", f"with {tokens} tokens a response (--response-tokens)"))
    return _table("transfers and times", ("", ""), rows)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size < 10 * GIB else f"{size / GIB:.1f}"
