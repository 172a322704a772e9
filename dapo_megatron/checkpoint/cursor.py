"""What the controller's state says of the data, for the audit; the rest of it belongs to the controller."""

import msgspec

from dapo_megatron.checkpoint.manifest import DataCursor
from dapo_megatron.data.sampler import SamplerState
from dapo_megatron.errors import StorageError


class _Cursor(msgspec.Struct):
    sampler: SamplerState
    next_order: int
    carried: list[msgspec.Raw]


def cursor_of(controller: bytes) -> DataCursor:
    """The data cursor in the controller's state (rollout.buffer.BufferState, JSON).

    Raises:
        StorageError: it is no such state.
    """
    try:
        state = msgspec.json.decode(controller, type=_Cursor)
    except msgspec.MsgspecError as e:
        raise StorageError(f"the controller's state cannot be read ({e})") from None
    return DataCursor(state.sampler.epoch, state.sampler.position, state.next_order, len(state.carried))
