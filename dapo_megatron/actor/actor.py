"""The Megatron policy: log-probs of given tokens, and one optimizer update on one mini-batch.

Every token's weight already contains its denominator (batching/), so the loss is sum(weight * loss) over micro-batches
and over all ranks, each of which evaluates its own rows (slices.own_rows), and nothing here divides. megatron-core's
per-token mode divides the gradients by the token count summed over data and context parallelism; `_count` makes that
sum exactly 1.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

from dapo_megatron.actor.model import PolicyModel, build_model
from dapo_megatron.actor.optimizer import build_optimizer, build_schedule
from dapo_megatron.actor.slices import OwnRows, context_rows, own_rows
from dapo_megatron.actor.token_loss import token_logprobs
from dapo_megatron.actor.training_objective import Objective, TrainedTokens
from dapo_megatron.batching.batch import MicroBatch
from dapo_megatron.config import RunConfig
from dapo_megatron.distributed.layout import Layout
from dapo_megatron.errors import DapoError
from dapo_megatron.observe import catalog as m
from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.importer import load_hf_weights

Scored = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
"""What megatron-core's schedules take from a loss function: loss, token count, and what is to be kept."""


class Actor:
    """One rank of the policy under training."""

    def __init__(self, config: RunConfig, shape: ModelShape, layout: Layout):
        self.config, self.shape, self.layout = config, shape, layout
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        self.model = build_model(config, shape)
        self.modules: list[PolicyModel] = [chunk.module for chunk in self.model]
        self.optimizer = build_optimizer(config, self.model)
        self.schedule = build_schedule(config, self.optimizer)
        self.temperature = config.rollout.temperature

    def load_hf(self, path: str | Path) -> None:
        """Set the weights from a Hugging Face folder."""
        exact = load_hf_weights(path, self.modules, self.shape)
        self.optimizer.reload_model_params(exact)

    def logprobs(self, shard: list[MicroBatch]) -> list[torch.Tensor]:
        """Log-probs, under the current weights and at the rollout's temperature, of the labels that this rank evaluates
        (see `own`).

        Args:
            shard: this data-parallel rank's micro-batches.

        Returns:
            One float32 tensor [n] a micro-batch on the last pipeline stage, an empty list elsewhere.
        """
        with torch.no_grad():
            stored = self._run(shard, self._score, forward_only=True)
        return [entry["logprobs"] for entry in stored]

    def update(
        self, shard: list[MicroBatch], objective: Objective, old_logprobs: list[torch.Tensor] | None
    ) -> dict[str, float]:
        """One optimizer update; a non-finite gradient skips it.

        Args and returns: as for `gradients`, with optimizer/skipped counted.
        """
        metrics = self.gradients(shard, objective, old_logprobs)
        self.schedule.step(1)
        finite = math.isfinite(metrics[m.GRAD_NORM])
        if finite:
            self.optimizer.step()
        return metrics | {m.LR: self.optimizer.param_groups[0]["lr"], m.SKIPPED: float(not finite)}

    def gradients(
        self, shard: list[MicroBatch], objective: Objective, old_logprobs: list[torch.Tensor] | None
    ) -> dict[str, float]:
        """Loss and gradients of one mini-batch, for the optimizer; the weights stay as they are.

        Args:
            shard: this data-parallel rank's micro-batches of the mini-batch.
            old_logprobs: of this rank's own labels, from logprobs() on the same micro-batches; None takes the
                update's own (the ratio is 1).

        Returns:
            The objective's metrics with policy/loss, policy/tokens (trained) and optimizer/grad_norm, equal on all
            ranks.
        """
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        stored = self._run(shard, partial(self._loss, objective=objective, old=old_logprobs), forward_only=False)
        metrics = self._reduce(objective, stored)
        self.optimizer.prepare_grads()
        return metrics | {m.GRAD_NORM: float(self.optimizer.get_grad_norm())}

    def own(self, micro_batch: MicroBatch) -> np.ndarray:
        """Positions of the trained labels that this rank evaluates; disjoint over the ranks of a stage. [n] int64."""
        rows = self._rows(micro_batch)
        return rows.positions[rows.real]

    def own_column(self, micro_batch: MicroBatch, values: np.ndarray) -> torch.Tensor:
        """The entries of a per-token array that belong to this rank's own labels; [n] on its device."""
        return torch.from_numpy(values[self.own(micro_batch)]).to(self.device)

    def _rows(self, micro_batch: MicroBatch) -> OwnRows:
        layout = self.layout
        return own_rows(
            micro_batch,
            cp_size=layout.cp_size,
            cp_rank=layout.cp_rank,
            tp_size=layout.tp_size,
            tp_rank=layout.tp_rank,
            sequence_parallel=self.modules[0].config.sequence_parallel,
        )

    def _run(
        self, shard: list[MicroBatch], loss_func: Callable[..., Any], *, forward_only: bool
    ) -> list[dict[str, torch.Tensor]]:
        for micro_batch in shard:
            self._check_tokens(micro_batch)

        def forward_step(
            iterator: Iterator[tuple[int, MicroBatch]], model: Any
        ) -> tuple[torch.Tensor, Callable[..., Any]]:
            index, micro_batch = next(iterator)
            held = context_rows(micro_batch.cu_seqlens, self.layout.cp_size, self.layout.cp_rank)
            tokens = torch.from_numpy(micro_batch.tokens[held]).to(self.device)[None]
            positions = torch.from_numpy(micro_batch.position_ids[held]).to(self.device)[None]
            hidden = model(tokens, positions, None, packed_seq_params=_packed(micro_batch, self.device))
            return hidden, partial(loss_func, index, micro_batch)

        iterators = [iter(enumerate(shard)) for _ in self.model]
        one = len(self.model) == 1
        stored: list[dict[str, torch.Tensor]] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators[0] if one else iterators,
            model=self.model[0] if one else self.model,
            num_microbatches=len(shard),
            seq_length=len(shard[0].tokens),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return stored

    def _check_tokens(self, micro_batch: MicroBatch) -> None:
        # Outside the vocabulary, tensor parallelism would embed it as zero and train on: megatron-core masks what a
        # rank does not hold.
        vocab = self.shape.vocab
        outside = micro_batch.tokens[(micro_batch.tokens < 0) | (micro_batch.tokens >= vocab)]
        if outside.size:
            prompts = ", ".join(sorted({prompt for prompt, _ in micro_batch.sequences})[:3])
            raise DapoError(
                f"token id {outside[0]} in a sequence of prompts {prompts}: the model's vocabulary has {vocab} "
                "entries. Does the tokenizer fit the model? Did rollout.function make it?"
            )

    def _own_logprobs(
        self, micro_batch: MicroBatch, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """(log-probs, entropies, positions) of this rank's own labels, from the last stage's hidden [s, 1, h]."""
        rows, group = self._rows(micro_batch), mpu.get_tensor_model_parallel_group()
        hidden = hidden[torch.from_numpy(rows.hidden).to(self.device), 0]
        if self.layout.tp_size > 1 and not self.modules[-1].config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden, group=group)
        logprobs, entropy = token_logprobs(
            hidden,
            self.modules[-1].output_weight,
            torch.from_numpy(rows.labels).to(self.device),
            self.temperature,
            self.config.actor.loss_chunk_tokens,
            group,
            self.shape.vocab,
        )
        real = torch.from_numpy(rows.real).to(self.device)
        return logprobs[real], entropy[real], rows.positions[rows.real]

    def _score(self, index: int, micro_batch: MicroBatch, hidden: torch.Tensor) -> Scored:
        logprobs, _, _ = self._own_logprobs(micro_batch, hidden)
        return logprobs.sum(), _count(index, self.layout), {"logprobs": logprobs}

    def _loss(
        self,
        index: int,
        micro_batch: MicroBatch,
        hidden: torch.Tensor,
        *,
        objective: Objective,
        old: list[torch.Tensor] | None,
    ) -> Scored:
        logprobs, entropy, positions = self._own_logprobs(micro_batch, hidden)

        def column(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values[positions]).to(self.device)

        tokens = TrainedTokens(
            logprobs=logprobs,
            entropy=entropy,
            old_logprobs=logprobs.detach() if old is None else old[index],
            rollout_logprobs=column(micro_batch.rollout_logprobs),
            advantages=column(micro_batch.advantages),
        )
        losses = objective(tokens)
        loss = (column(micro_batch.weights) * losses.loss).sum()
        own = [loss.detach().double(), loss.new_tensor(logprobs.numel(), dtype=torch.float64)]
        sums = torch.stack([*own, *(losses.means[name].double().sum() for name in objective.means)])
        maxima = [_largest(losses.maxima[name].double()) for name in objective.maxima]
        return loss, _count(index, self.layout), {"sums": sums, "maxima": torch.stack(maxima) if maxima else sums[:0]}

    def _reduce(self, objective: Objective, stored: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        sums = torch.zeros(2 + len(objective.means), dtype=torch.float64, device=self.device)
        maxima = sums.new_zeros(len(objective.maxima))
        for entry in stored:  # empty but on the last stage
            sums += entry["sums"]
            maxima = torch.maximum(maxima, entry["maxima"])
        dist.all_reduce(sums)  # every trained label was evaluated by exactly one rank
        if objective.maxima:
            dist.all_reduce(maxima, dist.ReduceOp.MAX)
        loss, tokens, *totals = sums.tolist()
        means = {name: total / max(tokens, 1.0) for name, total in zip(objective.means, totals, strict=True)}
        largest = dict(zip(objective.maxima, maxima.tolist(), strict=True))
        return {m.LOSS: loss, m.TRAINED_TOKENS: tokens} | means | largest


def _largest(values: torch.Tensor) -> torch.Tensor:
    return values.max() if len(values) else values.new_zeros(())


def _count(index: int, layout: Layout) -> torch.Tensor:
    # 1 on the first micro-batch of the first replica, else 0: megatron-core divides by the sum, which is 1.
    return torch.tensor(int(index == 0 and layout.is_first_replica), dtype=torch.int)


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
