"""After a push: do trainer and engine give the same log-probs? A fixed prompt set answers."""

import dataclasses

import numpy as np
import torch
import torch.distributed as dist

from dapo_megatron.actor.actor import Actor
from dapo_megatron.actor.packing_demands import packing_rules
from dapo_megatron.batching.build import shard_samples
from dapo_megatron.batching.packing import Sample
from dapo_megatron.errors import DapoError
from dapo_megatron.records import Prompt, Response, VersionSpan
from dapo_megatron.resharding.push import Pusher


def verify_logprobs(actor: Actor, pusher: Pusher, prompts: list[list[int]], tolerance: float) -> float:
    """Largest |log-prob difference| over the prompts' tokens; collective over all ranks.

    Raises:
        DapoError: it exceeds `tolerance`; names the engine, the prompt and the token.
    """
    layout = actor.layout
    # Every data-parallel rank scores all prompts: with experts spread over them, all must take part.
    rules = dataclasses.replace(packing_rules(actor.config), data_parallel_size=1)
    (shard,) = shard_samples([prompt_sample(i, p) for i, p in enumerate(prompts)], rules)
    ours = actor.logprobs(shard, temperature=1.0)
    # The engines are asked by rank 0, the log-probs are on the last stage, a part on each rank: sum them in one table.
    table = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.float64)
    if layout.dp_rank == 0:
        for micro_batch, values in zip(shard, ours, strict=False):
            positions = actor.own(micro_batch)
            starts = micro_batch.cu_seqlens[:-1]
            owners = np.searchsorted(starts, positions, side="right") - 1
            for position, owner, value in zip(positions, owners, values.tolist(), strict=True):
                table[micro_batch.sequences[owner][1], position - starts[owner]] = value
    dist.all_reduce(table, group=layout.control)
    worst, where, error = 0.0, "", None
    if layout.rank == 0:
        try:
            worst, where = _compare(pusher, prompts, table)
        except DapoError as e:
            error = str(e)
    verdict = [(worst, where, error)]
    dist.broadcast_object_list(verdict, src=0, group=layout.control)
    worst, where, error = verdict[0]
    if error is not None:
        raise DapoError(error)
    if not worst <= tolerance:
        raise DapoError(
            f"trainer and engine disagree after the push: |log-prob difference| {worst:.2e} at {where} exceeds "
            f"resharding.verify_tolerance={tolerance:.1e}"
        )
    return worst


def _compare(pusher: Pusher, prompts: list[list[int]], table: torch.Tensor) -> tuple[float, str]:
    worst, where = 0.0, "no token"
    for engine in pusher.engines:
        for i, theirs in enumerate(engine.prompt_logprobs(prompts)):
            difference = (table[i, : len(theirs)] - torch.tensor(theirs, dtype=torch.float64)).abs()
            token = int(difference.argmax())
            # `not <=` so that a NaN is the worst of all.
            if not float(difference[token]) <= worst:
                worst, where = float(difference[token]), f"{engine.url}, prompt {i}, token {token + 1}"
    return worst, where


def prompt_sample(index: int, prompt: list[int]) -> Sample:
    """A fixed prompt as a sequence whose every token but the first is scored."""
    n = len(prompt) - 1
    head = Prompt(id=f"verify {index}", input_ids=prompt[:1], ground_truth="", text="", row=index)
    rest = Response(head.id, index, prompt[1:], [True] * n, [0.0] * n, [VersionSpan(0, 0, n)], "length", "")
    return Sample(head, rest, weight=0.0)
