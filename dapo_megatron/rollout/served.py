"""The batch of the step that is trained, and the state that belongs to it, as the controller hands them out: in parts.

A part of the batch is encoded when it is asked for: a step is held once, as arrays.
"""

from collections.abc import Iterator, Sequence

from dapo_megatron.batching.batch import Shard, StepBatch
from dapo_megatron.batching.wire import PART_TOKENS, Place, cut, encode_part
from dapo_megatron.errors import DapoError


class ServedBatch:
    """A step's batch, cut into parts."""

    def __init__(self, batch: StepBatch, state: Sequence[memoryview] = (), part_tokens: int = PART_TOKENS):
        """`state` is the controller's, in parts."""
        self.step, self._version, self._state = batch.step, batch.version, state
        self._parts: list[list[list[Shard]]] = [
            [cut(shard, part_tokens) for shard in mini_batch.shards] for mini_batch in batch.mini_batches
        ]
        self.counts = [[len(parts) for parts in update] for update in self._parts]
        """[update][replica]: parts."""

    def encoded(self, update: int, replica: int, part: int) -> bytes:
        """One part; takes some milliseconds, so not on an event loop.

        Raises:
            DapoError: there is no such part.
        """
        if not (
            0 <= update < len(self.counts)
            and 0 <= replica < len(self.counts[update])
            and 0 <= part < self.counts[update][replica]
        ):
            raise DapoError(
                f"the batch of step {self.step} has no part {part} of update {update} for replica {replica}: "
                "do trainer and controller run with the same config?"
            )
        replicas, parts = len(self.counts[update]), self.counts[update][replica]
        place = Place(self.step, self._version, update, len(self.counts), replica, replicas, part, parts)
        return encode_part(place, self._parts[update][replica][part])

    @property
    def state_parts(self) -> int:
        """Of the controller's state."""
        return len(self._state)

    def state_part(self, part: int) -> bytes:
        """One part of the controller's state.

        Raises:
            DapoError: there is no such part.
        """
        if not 0 <= part < len(self._state):
            raise DapoError(f"the controller's state at step {self.step} has no part {part}")
        return bytes(self._state[part])

    def all_encoded(self) -> Iterator[bytes]:
        """Every part, in order."""
        for update, counts in enumerate(self.counts):
            for replica, parts in enumerate(counts):
                for part in range(parts):
                    yield self.encoded(update, replica, part)
