"""The training loop: one rollout step is batch, old log-probs, updates, push.

link.next_batch(k)      groups of step k, sampled by version k - 1 (older with max_policy_lag 1 and carried groups)
old log-probs           of all mini-batches but the first, before its update, on the updates' own micro-batches
update                  one for each mini-batch
push                    version k goes live on the engines, and a fixed prompt's log-probs are compared
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dapo_megatron.actor.actor import Actor
from dapo_megatron.actor.training_objective import PolicyObjective
from dapo_megatron.batching.batch import MicroBatch
from dapo_megatron.checkpoint.distributed import load_checkpoint, save_checkpoint
from dapo_megatron.config import RunConfig
from dapo_megatron.errors import DapoError
from dapo_megatron.resharding.push import Pusher
from dapo_megatron.resharding.verify import verify_logprobs
from dapo_megatron.trainer.run_link import RunLink


def train(config: RunConfig, actor: Actor, link: RunLink, pusher: Pusher, resume: Path | None) -> None:
    """Run all steps, from the checkpoint `resume` if there is one; every rank runs this.

    Raises:
        DapoError: any part failed; the message says which and what to do.
    """
    if resume is None:
        actor.load_hf(config.model.path)
        done = 0
    else:
        done = load_checkpoint(actor, resume).step
    prompts = link.hello(done, resume)
    pusher.connect()
    pusher.push(done)
    if config.resharding.verify_every:
        verify_logprobs(actor, pusher, prompts, config.resharding.verify_tolerance)
    if done == 0:
        link.record({"step": 0, "version": 0} | link.evaluate(0))

    objective, clock, skipped = PolicyObjective(config.algorithm), Clock(link), 0
    for step in range(done + 1, config.trainer.steps + 1):
        with clock("step"):
            batch, metrics, snapshot = link.next_batch(step, version=step - 1)
            shards = [m.shards[actor.layout.dp_rank] for m in batch.mini_batches]
            with clock("old_logprobs"):
                old = old_logprobs(config, actor, shards)
            with clock("update"):
                updates = [actor.update(s, objective, o) for s, o in zip(shards, old, strict=True)]
            skipped = count_skipped(updates, skipped, config.trainer.max_skipped_updates)
            metrics |= merge_updates(updates)
            with clock("push"):
                metrics |= pusher.push(step)
            if config.resharding.verify_every and step % config.resharding.verify_every == 0:
                with clock("verify"):
                    metrics["sync/logprob_difference"] = verify_logprobs(
                        actor, pusher, prompts, config.resharding.verify_tolerance
                    )
        last = step == config.trainer.steps
        if last or step % config.evaluation.every == 0:
            metrics |= link.evaluate(step)
        # Before the checkpoint, so that whoever goes on from it has the record of its step.
        link.record({"step": step, "version": step} | metrics | clock.metrics(metrics))
        if last or step % config.trainer.checkpoint_every == 0:
            with clock("checkpoint"):
                save_checkpoint(config, actor, step, step, snapshot)
    link.goodbye()


def old_logprobs(config: RunConfig, actor: Actor, shards: list[list[MicroBatch]]) -> list[list[torch.Tensor] | None]:
    """The ratio's denominators, one entry an update; None lets the update use its own log-probs (the ratio is 1).

    For the first update that is exact: the weights are still those of the step's beginning.
    """
    if config.algorithm.old_logprobs == "rollout":
        return [[actor.own_column(m, m.rollout_logprobs) for m in shard] for shard in shards]
    return [None, *(actor.logprobs(shard) for shard in shards[1:])]


def count_skipped(updates: list[dict[str, float]], before: int, limit: int) -> int:
    """Non-finite updates in a row up to now.

    Raises:
        DapoError: more than `limit`.
    """
    for update in updates:
        before = before + 1 if update["optimizer/skipped"] else 0
        if before > limit:
            raise DapoError(
                f"{before} updates in a row had a non-finite gradient: lower optimizer.lr, or look at the last batch "
                "(observe.dump_batches=true keeps them)"
            )
    return before


def merge_updates(updates: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of a step from those of its updates: means (of maxima, the largest), the smallest gradient norm, the last
    learning rate, and the number of skipped ones."""
    merged = {name: sum(u[name] for u in updates) / len(updates) for name in updates[0]}
    merged |= {name: max(u[name] for u in updates) for name in merged if name.endswith("_max")}
    merged["optimizer/grad_norm_min"] = min(u["optimizer/grad_norm"] for u in updates)
    merged["optimizer/lr"] = updates[-1]["optimizer/lr"]
    merged["optimizer/skipped"] = sum(u["optimizer/skipped"] for u in updates)
    return merged


class Clock:
    """Seconds of each phase since the last record, shown as the current phase while it lasts."""

    def __init__(self, link: RunLink):
        self._link, self._seconds = link, defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a phase."""
        self._link.status(phase)
        began = time.monotonic()
        yield
        self._seconds[phase] += time.monotonic() - began

    def metrics(self, rollout: dict[str, float]) -> dict[str, float]:
        """time/* of a step, of the checkpoint before it if there was one, and the step's speed; begins anew."""
        seconds, self._seconds = self._seconds, defaultdict(float)
        step = seconds["step"]
        return {f"time/{phase}": s for phase, s in seconds.items()} | {
            "speed/response_tokens_per_second": rollout["rollout/response_tokens"] / step,
            "speed/trained_tokens_per_second": rollout["batch/tokens"] / step,
        }
