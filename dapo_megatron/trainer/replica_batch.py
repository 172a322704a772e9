"""What one replica trains in a step, update by update; and the thread that fetches it from the controller ahead of use.

    first rank of the replica    a thread fetches part after part       the controller, collective_timeout_s / 2
    all ranks                    agree that the next update is there    each other, collective_timeout_s
    first rank -> the others     the parts' bytes                       each other, collective_timeout_s
    every rank                   keeps the sequences, and packs an update's micro-batches when it is its turn

Kept as sequences, a token takes 8 bytes; packed, 37.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from dapo_megatron.batching.batch import MicroBatch, Shard
from dapo_megatron.batching.packing import pack_shard
from dapo_megatron.batching.packing_rules import PackingRules
from dapo_megatron.batching.wire import decode_part
from dapo_megatron.distributed.agreement import all_agree, share_in_replica
from dapo_megatron.distributed.layout import Layout
from dapo_megatron.errors import DapoError
from dapo_megatron.messages import FetchPart, FetchState, Part
from dapo_megatron.rpc import RpcClient


class ReplicaBatch:
    """The updates of one step; collective over all ranks, which ask for the same updates in the same order."""

    def __init__(self, step: int, version: int, updates: int, receive: Callable[[int], Shard], rules: PackingRules):
        """
        Args:
            version: policy version that is trained.
            receive: gives this replica's shard of an update; called once for each, in order.
            rules: those that the batch was spread by.
        """
        self.step, self.version = step, version
        self._updates, self._receive, self._rules = updates, receive, rules
        self._shards: list[Shard] = []

    def __len__(self) -> int:
        return self._updates

    def __getitem__(self, update: int) -> list[MicroBatch]:
        """The packed micro-batches of an update."""
        return pack_shard(self.shard(update), self._rules)

    def shard(self, update: int) -> Shard:
        """The sequences of an update."""
        while len(self._shards) <= update:
            self._shards.append(self._receive(len(self._shards)))
        return self._shards[update]


class PartFetcher:
    """Fetches the parts of a replica's batch in a thread of its own; its first rank holds one."""

    def __init__(self, rpc: RpcClient, deadline_s: float):
        """`deadline_s` is for one part."""
        self._rpc, self._deadline_s = rpc, deadline_s
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="parts")

    def begin(self, step: int, replica: int, parts: list[int]) -> list[Future[list[bytes]]]:
        """Fetch all parts of a step; what is given are those of each update."""
        return [self._pool.submit(self._fetch, step, update, replica, count) for update, count in enumerate(parts)]

    def begin_state(self, step: int, parts: int) -> Future[bytes]:
        """Fetch the controller's state that belongs to the batch of a step."""
        return self._pool.submit(lambda: b"".join(self._part(FetchState(step, part)) for part in range(parts)))

    def close(self) -> None:
        """End the thread; what is not fetched yet is given up."""
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)
        self._rpc.close()

    def _fetch(self, step: int, update: int, replica: int, count: int) -> list[bytes]:
        return [self._part(FetchPart(step, update, replica, part)) for part in range(count)]

    def _part(self, request: FetchPart | FetchState) -> bytes:
        self._rpc.send(request, deadline_s=self._deadline_s)
        reply = self._rpc.receive(self._closed.is_set)
        if not isinstance(reply, Part):
            raise DapoError(f"the controller answered {type(request).__name__} with {type(reply).__name__}")
        return reply.payload


def fetched_batch(
    fetcher: PartFetcher | None, layout: Layout, rules: PackingRules, step: int, version: int, parts: list[list[int]]
) -> ReplicaBatch:
    """This replica's batch of a step, which begins to be fetched; collective over all ranks.

    Args:
        fetcher: on the first rank of the replica; None elsewhere.
        parts: [update][replica]: parts to fetch.
    """
    own = [update[layout.dp_rank] for update in parts]
    coming = fetcher.begin(step, layout.dp_rank, own) if fetcher is not None else []

    def receive(update: int) -> Shard:
        payloads: list[bytes] = [b""] * own[update]
        with all_agree(f"fetching update {update + 1} of step {step} from the controller", layout):
            if fetcher is not None:
                payloads = coming.pop(0).result()  # the bytes go when they are unpacked
        shared = [share_in_replica(payload, layout) for payload in payloads]
        return [micro_batch for payload in shared for micro_batch in decode_part(payload)[1]]

    return ReplicaBatch(step, version, len(parts), receive, rules)
