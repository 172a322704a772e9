"""After a push: do trainer and engine give the same log-probs? A fixed prompt set answers."""

import numpy as np
import torch
import torch.distributed as dist

from dapo_megatron.actor.actor import Actor
from dapo_megatron.actor.precision import pad_multiple
from dapo_megatron.batching.batch import MicroBatch
from dapo_megatron.errors import DapoError
from dapo_megatron.resharding.push import Pusher


def verify_logprobs(actor: Actor, pusher: Pusher, prompts: list[list[int]], tolerance: float) -> float:
    """Largest |log-prob difference| over the prompts' tokens; collective over all ranks.

    Raises:
        DapoError: it exceeds `tolerance`; names the engine, the prompt and the token.
    """
    layout = actor.layout
    shard = [prompt_micro_batch(prompt, pad_multiple(actor.config)) for prompt in prompts]
    ours = actor.logprobs(shard, temperature=1.0)
    # The engines are asked by rank 0, the log-probs are on the last stage: ship them as one padded tensor.
    longest = max(map(len, prompts))
    table = torch.zeros(len(prompts), longest, dtype=torch.float64)
    if layout.is_last_stage and layout.dp_rank == 0 and layout.tp_rank == 0:
        for row, values in zip(table, ours, strict=True):
            row[: len(values)] = values.double().cpu()
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


def prompt_micro_batch(prompt: list[int], pad_multiple: int) -> MicroBatch:
    """One prompt whose every next token is scored."""
    n = len(prompt)
    padded = -(-n // pad_multiple) * pad_multiple
    tokens = np.zeros(padded, dtype=np.int64)
    tokens[:n] = prompt
    labels = np.zeros(padded, dtype=np.int64)
    labels[: n - 1] = prompt[1:]
    zeros = np.zeros(padded, dtype=np.float32)
    boundaries = [0, n] if padded == n else [0, n, padded]
    return MicroBatch(
        tokens=tokens,
        labels=labels,
        position_ids=np.concatenate([np.arange(n), np.arange(padded - n)]),
        cu_seqlens=np.array(boundaries, dtype=np.int32),
        weights=zeros,
        advantages=zeros,
        rollout_logprobs=zeros,
        active=np.arange(padded) < n - 1,
        sequences=[("verify", 0)],
    )
