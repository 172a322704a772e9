"""How buckets come from the pipeline stages' senders to the engines: what a push needs of it, however it is done.

             who                              broadcast                           disk
    connect  each stage's sender, in turn     opens its group with all engines    -
    begin    rank 0: all engines have paused  opens their sessions                -
    send     each stage's sender, in turn,    one collective, and a call to each  a thread writes one file
             bucket by bucket                 engine, which receives and loads
    commit   rank 0: all stages are sent      closes the sessions                 publishes the folder of files, has the
                                                                                  engines load it, removes older ones
    close    every rank, before each connect  ends its group                      rank 0: removes the folders, a killed
             and at the end                                                       run's too

Rank 0 is the sender of stage 0. A push that failed is tried again only after `close` and `connect`.
"""

from typing import Protocol

import torch

from dapo_megatron.engines.all_engines import AllEngines
from dapo_megatron.resharding.plan import Bucket


class Sending(Protocol):
    """A bucket on its way."""

    def wait(self) -> None:
        """Wait until it is where `commit` needs it.

        Raises:
            DapoError: it did not get there, or not within the deadline; names the bucket, and who did not take it.
        """


class WeightTransport(Protocol):
    """The table above; none of the calls is collective."""

    def connect(self, engines: AllEngines) -> None:
        """Get ready to send to these.

        Raises:
            DapoError: an engine refused.
        """

    def begin(self) -> None:
        """Get the engines, which have paused, ready to receive."""

    def send(self, bucket: Bucket, flat: torch.Tensor, *, version: int, is_last: bool) -> Sending:
        """Set a bucket on its way; only when the one before has arrived.

        Args:
            flat: its tensors one behind the other, [bucket.bytes] uint8, not to be changed before it has arrived.
            is_last: of the whole push.
        """

    def commit(self, version: int) -> None:
        """Return when every engine has loaded all that was sent, and has dropped the old weights' keys and values if it
        is asked to.

        Raises:
            DapoError: names the engine that has not.
        """

    def close(self) -> None:
        """Let go of what `connect` and `send` took."""
