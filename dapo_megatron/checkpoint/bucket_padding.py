"""A fully_reshardable state that holds every parameter's own values, where the optimizer's buffer has several buckets.

megatron-core 0.16.1 gathers a buffer without the padding at the end of its buckets (get_parameter_state_dp_zero), and
then takes each parameter from where it stands with that padding (sharded_param_state_fully_reshardable warns of "data
corruption"). A buffer has several buckets where the embedding is tied and stages share it: it gets one of its own
(param_and_grad_buffer.py, _does_param_require_new_bucket). Whatever follows padding would be saved displaced.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.optimizer import MegatronOptimizer


@contextmanager
def padding_gathered(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Buckets count their padding as content in this block, so that it is gathered too."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    buffers = [buffer for part in parts for buffer in part.buffers]
    counted = [(holder, holder.numel_unpadded) for buffer in buffers for holder in (buffer, *buffer.buckets)]
    try:
        for buffer in buffers:
            buffer.numel_unpadded = buffer.numel
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()
        yield
    finally:
        for holder, numel in counted:
            holder.numel_unpadded = numel
