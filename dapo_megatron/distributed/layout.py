"""The trainer's process groups: megatron-core's model-parallel groups, and gloo groups for messages.

The three differ in their deadline: an agreement takes a minute at most, a batch may take hours, a disk as long as it is
allowed to.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from dapo_megatron.config import RunConfig
from dapo_megatron.config.deadlines import Deadlines
from dapo_megatron.distributed.sizes import expert_tensor_parallel_size
from dapo_megatron.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """Where this rank stands; sizes and ranks are megatron-core's."""

    rank: int
    tp_size: int
    tp_rank: int
    pp_size: int
    pp_rank: int
    vpp_size: int
    cp_size: int
    cp_rank: int
    ep_size: int
    dp_size: int
    dp_rank: int
    """Without context parallelism: ranks that see different sequences."""
    replica_ranks: tuple[int, ...]
    """The ranks of this rank's data-parallel replica: they see the same sequences. The first one fetches them."""
    replica: dist.ProcessGroup
    """These, gloo: for their batch."""
    control: dist.ProcessGroup
    """All ranks, gloo: for verdicts and small messages; a rank that hangs is noticed after collective_timeout_s."""
    waiting: dist.ProcessGroup
    """All ranks, gloo: only for what waits as long as for a batch, engines that start, or a slow disk."""
    saving: dist.ProcessGroup
    """All ranks, gloo: only for the threads that write checkpoints, beside whatever the ranks do meanwhile."""
    deadlines: Deadlines

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.tp_size * self.pp_size * self.cp_size * self.dp_size

    @property
    def is_first_of_replica(self) -> bool:
        """Whether this rank fetches for its replica."""
        return self.rank == self.replica_ranks[0]

    @property
    def sizes(self) -> dict[str, int]:
        """The parallel sizes by their short names."""
        return {
            "tp": self.tp_size,
            "pp": self.pp_size,
            "vpp": self.vpp_size,
            "cp": self.cp_size,
            "ep": self.ep_size,
            "dp": self.dp_size,
        }

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_first_replica(self) -> bool:
        """Whether this rank holds the stage's parameters first, of all data- and context-parallel copies."""
        return self.dp_rank == 0 and self.cp_rank == 0


def init_parallel(config: RunConfig) -> Layout:
    """Join the default group (rank and address from torchrun's environment) and build megatron-core's groups.

    Raises:
        ConfigError: the number of launched ranks is not what the layout needs.
    """
    deadlines = config.deadlines
    deadline = timedelta(seconds=deadlines.collective)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=deadline)
    if dist.get_world_size() != config.world_size:
        raise ConfigError(
            f"the actor's layout needs {config.world_size} ranks (TP x PP x CP x DP), "
            f"{dist.get_world_size()} were started"
        )
    actor = config.actor
    chunks = actor.virtual_pipeline_model_parallel_size
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=actor.tensor_model_parallel_size,
        pipeline_model_parallel_size=actor.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        context_parallel_size=actor.context_parallel_size,
        expert_model_parallel_size=actor.expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_parallel_size(actor),
        distributed_timeout_minutes=deadlines.collective / 60,  # it makes a timedelta of it, whole or not
    )
    torch.manual_seed(config.seed)
    model_parallel_cuda_manual_seed(config.seed)
    control = dist.new_group(backend="gloo", timeout=deadline)
    replica_ranks, replica = _replica(control, deadline)
    return Layout(
        rank=dist.get_rank(),
        tp_size=mpu.get_tensor_model_parallel_world_size(),
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        pp_size=mpu.get_pipeline_model_parallel_world_size(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        vpp_size=chunks,
        cp_size=mpu.get_context_parallel_world_size(),
        cp_rank=mpu.get_context_parallel_rank(),
        ep_size=mpu.get_expert_model_parallel_world_size(),
        dp_size=mpu.get_data_parallel_world_size(),
        dp_rank=mpu.get_data_parallel_rank(),
        replica_ranks=replica_ranks,
        replica=replica,
        control=control,
        waiting=dist.new_group(backend="gloo", timeout=timedelta(seconds=deadlines.waiting)),
        saving=dist.new_group(backend="gloo", timeout=timedelta(seconds=deadlines.saving)),
        deadlines=deadlines,
    )


def _replica(control: dist.ProcessGroup, deadline: timedelta) -> tuple[tuple[int, ...], dist.ProcessGroup]:
    """The ranks of this rank's replica, and their group; every rank makes the groups of all replicas."""
    replicas = torch.empty(dist.get_world_size(), dtype=torch.int64)
    own = torch.tensor([mpu.get_data_parallel_rank()])
    dist.all_gather_into_tensor(replicas, own, group=control)
    members = [tuple(torch.nonzero(replicas == r).flatten().tolist()) for r in range(int(replicas.max()) + 1)]
    groups = [dist.new_group(list(ranks), backend="gloo", timeout=deadline) for ranks in members]
    return members[int(own)], groups[int(own)]
