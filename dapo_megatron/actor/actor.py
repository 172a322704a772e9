"""The Megatron policy: log-probs of given tokens, and one optimizer update on one mini-batch.

Every token's weight already contains its denominator (batching/), so the loss is sum(weight * loss) over micro-batches,
pipeline and data parallelism, and nothing here divides. megatron-core's per-token mode divides the gradients by the
token count summed over data parallelism; `_count` makes that sum exactly 1.
"""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from dapo_megatron.actor.logprobs import vocab_parallel_logprobs
from dapo_megatron.actor.model import build_model
from dapo_megatron.actor.objectives import Objective, TrainedTokens
from dapo_megatron.actor.optimizer import build_optimizer, build_schedule
from dapo_megatron.actor.parallel import Layout
from dapo_megatron.batching.batch import MicroBatch
from dapo_megatron.config import RunConfig
from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.importer import load_hf_weights


class Actor:
    """One rank of the policy under training."""

    def __init__(self, config: RunConfig, shape: ModelShape, layout: Layout):
        self.config, self.shape, self.layout = config, shape, layout
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        self.model = build_model(config, shape)
        self.optimizer = build_optimizer(config, self.model)
        self.schedule = build_schedule(config, self.optimizer)
        self.temperature = config.rollout.temperature

    def load_hf(self, path: str | Path) -> None:
        """Set the weights from a Hugging Face folder."""
        exact = load_hf_weights(path, self.model.module, self.shape, self.layout.tp_size, self.layout.tp_rank)
        self.optimizer.reload_model_params(exact)

    def logprobs(self, shard: list[MicroBatch], temperature: float | None = None) -> list[torch.Tensor]:
        """Log-probs of the active labels of each micro-batch under the current weights.

        Args:
            shard: this data-parallel rank's micro-batches.
            temperature: divides the logits; the rollout's by default.

        Returns:
            One float32 tensor [active] a micro-batch on the last pipeline stage, an empty list elsewhere.
        """
        with torch.no_grad():
            stored = self._run(
                shard, partial(self._score, temperature=temperature or self.temperature), forward_only=True
            )
        return [entry["logprobs"] for entry in stored]

    def update(
        self, shard: list[MicroBatch], objective: Objective, old_logprobs: list[torch.Tensor] | None
    ) -> dict[str, float]:
        """One optimizer update.

        Args:
            shard: this data-parallel rank's micro-batches of the mini-batch.
            old_logprobs: from logprobs() on the same micro-batches; None takes the update's own (the ratio is 1).

        Returns:
            The objective's metrics with policy/loss, optimizer/grad_norm, optimizer/lr and optimizer/skipped, equal on
            all ranks. A non-finite gradient skips the update and is counted.
        """
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        old = old_logprobs if self.layout.is_last_stage else None
        stored = self._run(shard, partial(self._loss, objective=objective, old=old), forward_only=False)
        metrics = self._reduce(objective, stored)

        self.schedule.step(1)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        finite = math.isfinite(grad_norm)
        if finite:
            self.optimizer.step()
        return metrics | {
            "optimizer/grad_norm": grad_norm,
            "optimizer/lr": self.optimizer.param_groups[0]["lr"],
            "optimizer/skipped": float(not finite),
        }

    def _run(self, shard: list[MicroBatch], loss_func, *, forward_only: bool) -> list[dict]:
        def forward_step(iterator: Iterator[tuple[int, MicroBatch]], model):
            index, micro_batch = next(iterator)
            tokens = torch.from_numpy(micro_batch.tokens).to(self.device)[None]
            positions = torch.from_numpy(micro_batch.position_ids).to(self.device)[None]
            logits = model(tokens, positions, None, packed_seq_params=_packed(micro_batch, self.device))
            return logits, partial(loss_func, index, micro_batch)

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(enumerate(shard)),
            model=self.model,
            num_microbatches=len(shard),
            seq_length=len(shard[0].tokens),
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _active(self, micro_batch: MicroBatch, logits: torch.Tensor, temperature: float):
        rows = torch.from_numpy(micro_batch.active.nonzero()[0]).to(self.device)
        labels = torch.from_numpy(micro_batch.labels).to(self.device)[rows]
        group = mpu.get_tensor_model_parallel_group()
        return rows, *vocab_parallel_logprobs(logits[0, rows], labels, temperature, group)

    def _score(self, index: int, micro_batch: MicroBatch, logits: torch.Tensor, *, temperature: float):
        _, logprobs, _ = self._active(micro_batch, logits, temperature)
        return logprobs.sum(), _count(index, self.layout), {"logprobs": logprobs}

    def _loss(self, index: int, micro_batch: MicroBatch, logits: torch.Tensor, *, objective: Objective, old):
        rows, logprobs, entropy = self._active(micro_batch, logits, self.temperature)

        def column(values):
            return torch.from_numpy(values).to(self.device)[rows]

        tokens = TrainedTokens(
            logprobs=logprobs,
            entropy=entropy,
            old_logprobs=logprobs.detach() if old is None else old[index],
            rollout_logprobs=column(micro_batch.rollout_logprobs),
            advantages=column(micro_batch.advantages),
        )
        token_loss, sums = objective(tokens)
        loss = (column(micro_batch.weights) * token_loss).sum()
        own = torch.stack([loss.detach().double(), torch.tensor(len(rows), device=self.device, dtype=torch.float64)])
        return loss, _count(index, self.layout), {"sums": torch.cat([own, sums])}

    def _reduce(self, objective: Objective, stored: list[dict]) -> dict[str, float]:
        total = torch.zeros(2 + len(objective.sums), dtype=torch.float64, device=self.device)
        for entry in stored:  # empty but on the last stage
            total += entry["sums"]
        dist.all_reduce(total, group=mpu.get_pipeline_model_parallel_group())
        dist.all_reduce(total, group=mpu.get_data_parallel_group())
        loss, tokens, *sums = total.tolist()
        named = dict(zip(objective.sums, sums, strict=True))
        return {"policy/loss": loss} | objective.metrics(named, tokens)


def _count(index: int, layout: Layout) -> torch.Tensor:
    # 1 on the first micro-batch of data-parallel rank 0, else 0: megatron-core divides by the sum, which is 1.
    return torch.tensor(int(index == 0 and layout.dp_rank == 0), dtype=torch.int)


def _packed(micro_batch: MicroBatch, device: torch.device) -> PackedSeqParams:
    cu_seqlens = torch.from_numpy(micro_batch.cu_seqlens).to(device)
    longest = int((micro_batch.cu_seqlens[1:] - micro_batch.cu_seqlens[:-1]).max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
