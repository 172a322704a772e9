"""Which prompt comes next: endless epochs, each its own permutation; the state resumes exactly."""

import random

import msgspec

from dapo_megatron.errors import DapoError


class SamplerState(msgspec.Struct, frozen=True):
    """Data-loader state: where the sampler stands in which epoch's permutation."""

    seed: int
    epoch: int
    """From 0."""
    position: int
    """Prompts of this epoch that were given out."""
    size: int
    """Prompts in the data set."""
    shuffle: bool


class PromptSampler:
    """Indices 0 .. size - 1 without end, each exactly once an epoch."""

    def __init__(self, size: int, seed: int, shuffle: bool = True) -> None:
        """
        Args:
            size: prompts in the data set.
            seed: with the number of the epoch, it determines the order of that epoch.
            shuffle: False gives the order of the file.

        Raises:
            DapoError: size is not positive.
        """
        if size < 1:
            raise DapoError(f"cannot sample from {size} prompts")
        self._state = SamplerState(seed, 0, 0, size, shuffle)
        self._order = _order_of_epoch(self._state)

    def next(self) -> int:
        """Index of the next prompt."""
        state = self._state
        if state.position == state.size:
            state = msgspec.structs.replace(state, epoch=state.epoch + 1, position=0)
            self._order = _order_of_epoch(state)
        self._state = msgspec.structs.replace(state, position=state.position + 1)
        return self._order[state.position]

    def state(self) -> SamplerState:
        """What `restore` continues from."""
        return self._state

    @classmethod
    def restore(cls, state: SamplerState, size: int, seed: int | None = None) -> "PromptSampler":
        """A sampler that gives what the saved one would have given next.

        Args:
            size: prompts in the data set now.
            seed: of the run now; None: not compared.

        Raises:
            DapoError: the data set or the seed is another one, or the state is impossible.
        """
        if state.size != size:
            raise DapoError(
                f"cannot resume: the data set has {size} prompts, the checkpoint was made with {state.size}; "
                "use the same data, or start a new run"
            )
        if seed is not None and state.seed != seed:
            raise DapoError(f"cannot resume: seed={seed}, the checkpoint was made with seed={state.seed}; use that one")
        if state.epoch < 0 or not 0 <= state.position <= size:
            raise DapoError(f"cannot resume: impossible sampler state {state}; use an older checkpoint")
        sampler = cls(size, state.seed, state.shuffle)
        sampler._state = state
        sampler._order = _order_of_epoch(state)
        return sampler


def _order_of_epoch(state: SamplerState) -> list[int]:
    order = list(range(state.size))
    if state.shuffle:
        # Seeded by a string: hashed with SHA-512, so neighbouring seeds and epochs are unrelated.
        random.Random(f"{state.seed}/{state.epoch}").shuffle(order)
    return order
