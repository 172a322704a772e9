"""Send the sharded policy to the engines, pipeline stage by pipeline stage.

    all engines      pause (retract, or in_place: keep_kv); the transport begins    trainer rank 0
    each stage       gather over TP, EP -> bucket -> the transport sends it    its dp0/cp0/tp0 rank (the sender)
                     a bucket is gathered while the one before is on its way
    all engines      the transport commits: they have the weights, and no keys and values of the old ones, unless those
                     are kept; set the version, go on, report the version back    trainer rank 0

Every phase ends in an exchange of verdicts among all ranks, so that a failure on one of them stops the step on all with
the same message instead of a hang. When the launcher has replaced the engine that failed, all get the weights anew.
"""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from dapo_megatron.actor.actor import Actor
from dapo_megatron.config import RunConfig
from dapo_megatron.distributed.agreement import all_agree, on_first_rank, sum_over_ranks
from dapo_megatron.engines.all_engines import AllEngines
from dapo_megatron.engines.control import EngineControl
from dapo_megatron.engines.engine_set import EngineSet, Member
from dapo_megatron.errors import ConfigError, DapoError, EngineError
from dapo_megatron.observe import catalog as m
from dapo_megatron.resharding.broadcast import BroadcastTransport
from dapo_megatron.resharding.disk import DiskTransport
from dapo_megatron.resharding.fill import fill
from dapo_megatron.resharding.following import FollowedEngines
from dapo_megatron.resharding.plan import GATHER_BYTES, plan_buckets
from dapo_megatron.resharding.transport import Sending, WeightTransport
from dapo_megatron.weights.exporter import export_names, export_stage, is_sender

T = TypeVar("T")
SETTLE_S = 5.0
"""For an engine that has just died to be seen as dead."""
LOOK_S = 0.25


class Pusher:
    """Every trainer rank holds one; `connect`, `push` and `close` are collective over all of them."""

    def __init__(
        self,
        config: RunConfig,
        actor: Actor,
        read_set: Callable[[], EngineSet],
        api_key: str | None = None,
        ports: Sequence[int] | None = None,
    ):
        """
        Args:
            read_set: who serves now.
            ports: where senders and engines meet to broadcast, of each pipeline stage's first group, of the second
                ones, and so on, then from the first again; None takes free ones.
        """
        self.actor, self.layout, self.config = actor, actor.layout, config
        self.dtype = config.engine_dtype
        self.is_sender = is_sender()
        self.timeout_s = config.deadlines.engine_call
        self._all = AllEngines()
        """On the senders, which talk to them; rank 0 is one."""
        self._transport: WeightTransport
        if config.resharding.transport == "disk":
            self._transport = DiskTransport(config, actor.shape, self.layout)
        else:
            self._transport = BroadcastTransport(config, self.layout, ports)
        self._api_key = api_key
        self._followed = FollowedEngines(read_set, self._is_up, config.engine.start_timeout_s)
        self.has_reconnected = False
        """Whether the last push went to other engines than the one before."""
        self._live: dict[Member, int] = {}
        """Version that each engine was given."""

    @property
    def engines(self) -> list[EngineControl]:
        """Those that are connected; on the senders only."""
        return self._all.engines

    def can_follow(self) -> bool:
        """Whether an engine is up that is not connected; for rank 0 alone."""
        return self._followed.can_follow()

    def connect(self) -> None:
        """Connect each pipeline stage's sender to all engines that are up.

        At first all are waited for; later those that load join when they are up (`can_follow`).

        Raises:
            DapoError: an engine did not answer or could not join.
        """
        while True:
            try:
                return self._connect()
            except EngineError as e:
                self.wait_until_replaced(e)

    def _connect(self) -> None:
        self.close()
        self._followed.connect(
            on_first_rank("finding the engines", self.layout, self._followed.find, may_take_long=True)
        )
        if self.is_sender:
            self._all = AllEngines([self._control(member) for member in self._followed.connected.members])
        with all_agree("connecting to the engines", self.layout, may_take_long=True):
            for engine in self.engines:
                engine.wait_ready(self.config.engine.start_timeout_s, self._followed.is_outdated)
                if self.config.keeps_kv and not engine.has_sessions:
                    raise ConfigError(f"engine {engine.url} is too old for resharding.in_flight=keep_kv")
            if self.layout.rank == 0:
                self.on_all(EngineControl.freeze_gc)
                self.on_all(EngineControl.abandon_update)
        for stage in range(self.layout.pp_size):
            with all_agree(f"connecting pipeline stage {stage} to the engines", self.layout):
                if self.is_sender and self.layout.pp_rank == stage:
                    self._transport.connect(self._all)

    def _control(self, member: Member) -> EngineControl:
        return EngineControl(member.url, self.timeout_s, self._api_key)

    def _is_up(self, member: Member) -> bool:
        engine = self._control(member)
        try:
            return engine.is_up()
        finally:
            engine.close()

    def push(self, version: int) -> dict[str, float]:
        """Make `version` live on every engine, also on those that replace others meanwhile.

        Returns:
            sync/seconds and sync/bytes.

        Raises:
            DapoError: names the server and the bucket that failed.
        """
        began = time.monotonic()
        self.has_reconnected = on_first_rank("looking for lost engines", self.layout, self._followed.has_lost)
        if self.has_reconnected:
            self.connect()
        while True:
            try:
                sent = self._push(version)
            except EngineError as e:
                self.wait_until_replaced(e)
                self._live = {}
                self.has_reconnected = True
                self.connect()
            else:
                return {m.SYNC_SECONDS: time.monotonic() - began, m.SYNC_BYTES: sent}

    def wait_until_replaced(self, error: EngineError) -> None:
        """Wait until other engines serve, after one has failed; collective over all ranks.

        Raises:
            EngineError: the error again, if all engines answer (nobody replaces them then), or none has been replaced
                within the deadline of engines that hang.
        """

        def wait() -> None:
            began = time.monotonic()
            limit = self.config.deadlines.engine + SETTLE_S
            while not self._followed.is_outdated():
                waited = time.monotonic() - began
                if waited > limit or (waited > SETTLE_S and all(self.on_all(_answers))):
                    raise error
                time.sleep(LOOK_S)

        on_first_rank("waiting for another engine", self.layout, wait, may_take_long=True)

    def _push(self, version: int) -> float:
        """Bytes sent by all stages."""
        sent = 0
        with all_agree("pausing the engines", self.layout):
            if self.layout.rank == 0:
                self._pause_all()
                self._transport.begin()
        for stage in range(self.layout.pp_size):
            with all_agree(f"sending the weights of pipeline stage {stage}", self.layout):
                if self.layout.pp_rank == stage:
                    sent = self._send_stage(version)
        with all_agree(f"making version {version} live", self.layout):
            if self.layout.rank == 0:
                self._transport.commit(version)
                self.on_all(lambda e: self._make_live(e, version))
        self._live = dict.fromkeys(self._followed.connected.members, version)
        total = torch.tensor(float(sent if self.is_sender else 0), dtype=torch.float64)
        sum_over_ranks("counting bytes", total, self.layout)
        return float(total)

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()
        self._all.close()
        self._all = AllEngines()

    def _send_stage(self, version: int) -> int:
        """Collective over the stage's ranks; returns the bytes sent."""
        modules, shape = self.actor.modules, self.actor.shape
        buckets = plan_buckets(export_names(modules, shape), self.dtype, self.config.resharding.bucket_mib << 20)
        tensors = export_stage(modules, shape, GATHER_BYTES)
        if not self.is_sender:
            for _ in tensors:
                pass
            return 0
        under_way: Sending | None = None
        for bucket in buckets:
            flat = fill(bucket, tensors, self.actor.device)  # while the one before is under way
            if under_way is not None:
                under_way.wait()
            last = self.layout.is_last_stage and bucket is buckets[-1]
            under_way = self._transport.send(bucket, flat, version=version, is_last=last)
        if next(tensors, None) is not None:
            raise DapoError("the push plan does not name every tensor of the stage")
        if under_way is not None:
            under_way.wait()
        return sum(b.bytes for b in buckets)

    def _pause_all(self) -> None:
        given = {m.url: self._live[m] for m in self._followed.connected.members if m in self._live}
        self.on_all(lambda engine: self._pause(engine, given.get(engine.url)))

    def _pause(self, engine: EngineControl, given: int | None) -> None:
        if given is not None and (served := engine.version()) != str(given):
            raise EngineError(
                f"engine {engine.url} serves version {served}, the trainer had pushed {given}: somebody else has "
                "changed its weights"
            )
        engine.pause(keep_kv=self.config.keeps_kv)

    def _make_live(self, engine: EngineControl, version: int) -> None:
        if not self.config.keeps_kv:
            engine.flush_cache()
        engine.set_version(version)
        engine.resume()
        served = engine.version()
        if served != str(version):
            raise EngineError(f"engine {engine.url} serves version {served} after version {version} was pushed")

    def on_all(self, call: Callable[[EngineControl], T]) -> list[T]:
        """Results of a call to every engine, made at once, in their order; on the senders only."""
        return self._all.on_all(call)


def _answers(engine: EngineControl) -> bool:
    try:
        engine.require_answer()
    except EngineError:
        return False
    return True
