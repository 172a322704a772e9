"""A rank's random states, as tensors of a distributed checkpoint: restored where the number of ranks is the same."""

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from dapo_megatron.distributed.layout import Layout

PREFIX = "random"


def random_states() -> dict[str, torch.Tensor]:
    """torch's generators and megatron-core's tracked ones, by name; [n] uint8 each, on the CPU."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states | {f"tracked.{name}": state.cpu() for name, state in get_cuda_rng_tracker().get_states().items()}


def set_random_states(states: dict[str, torch.Tensor]) -> None:
    """Put back what random_states gave."""
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    tracked = {name: state for name, state in states.items() if name.startswith("tracked.")}
    get_cuda_rng_tracker().set_states({name.removeprefix("tracked."): state for name, state in tracked.items()})


def sharded(states: dict[str, torch.Tensor], layout: Layout, world: int) -> dict[str, ShardedTensor]:
    """The states of all ranks as tensors [world, n] of which this rank holds one row."""
    return {
        name: ShardedTensor.from_rank_offsets(f"{PREFIX}.{name}", state[None], (0, layout.rank, world))
        for name, state in states.items()
    }
