"""The ladder of deadlines: whoever waits gives up before those that wait for it, and so says what it waited for.

request         the controller, for a response from its slot on                               < function
function        the controller, for one call of a rollout function, but for waits for slots
engine_call     a trainer rank, for one control call to an engine or one bucket of a push     < collective, <= engine
batch_part      a replica's first rank, for a part of its batch                               < collective
heartbeat       the launcher, for a sign of life of every process                             <= collective
collective      the trainer ranks, for each other                                             < waiting
engine          the launcher, for an answer of every engine that serves
engine_start    the launcher and trainer rank 0, for the first one                            < waiting
                the launcher, for the first sign of life of every other process
batch           trainer rank 0, for the controller's next batch                               < waiting
waiting         the other ranks, while rank 0 waits for these
saving          the threads that write a checkpoint, for the disk and each other

A request and a function have no order with `batch`: a step takes as long as its slots and reissued groups need, and
with a lag no single response holds a batch up.
"""

import math
from dataclasses import dataclass

from dapo_megatron.config.checkpoint import CheckpointConfig
from dapo_megatron.config.engines import EngineConfig
from dapo_megatron.config.launch import LaunchConfig
from dapo_megatron.config.rollout import RolloutConfig
from dapo_megatron.config.trainer import TrainerConfig


@dataclass(frozen=True)
class Deadlines:
    """All in seconds; the table above says who has each, and which comes first."""

    request: float
    function: float
    engine_call: float
    batch_part: float
    heartbeat: float
    collective: float
    engine: float
    engine_start: float
    batch: float
    waiting: float
    saving: float

    @classmethod
    def of(
        cls,
        rollout: RolloutConfig,
        engine: EngineConfig,
        trainer: TrainerConfig,
        checkpoint: CheckpointConfig,
        launch: LaunchConfig,
    ) -> "Deadlines":
        """What the sections say, and what follows from it where they say nothing.

        Raises:
            ValueError: one that must come first does not.
        """
        if rollout.request_timeout_s >= rollout.function_timeout_s:
            raise ValueError(
                f"rollout.request_timeout_s={rollout.request_timeout_s:g} must be less than rollout.function_timeout_s="
                f"{rollout.function_timeout_s:g}: a request that is not answered is issued again, a function that does "
                "not return ends the run"
            )
        collective = trainer.collective_timeout_s
        engine_call = engine.call_timeout_s or min(collective / 2, launch.engine_timeout_s or math.inf)
        if engine_call >= collective:
            raise ValueError(
                f"engine.call_timeout_s={engine_call:g} must be less than trainer.collective_timeout_s={collective:g}: "
                "the ranks wait for each other's calls"
            )
        heartbeat = launch.heartbeat_timeout_s or min(60.0, collective)
        if heartbeat > collective:
            raise ValueError(
                f"launch.heartbeat_timeout_s={heartbeat:g} must not exceed trainer.collective_timeout_s="
                f"{collective:g}: the launcher names a process that hangs before the ranks that wait for it give up"
            )
        answer = launch.engine_timeout_s or max(heartbeat, engine_call)
        if answer < engine_call:
            raise ValueError(
                f"launch.engine_timeout_s={answer:g} must not be less than engine.call_timeout_s={engine_call:g}: an "
                "engine answers nobody else during a call, and would be ended in it; lower both"
            )
        return cls(
            request=rollout.request_timeout_s,
            function=rollout.function_timeout_s,
            engine_call=engine_call,
            batch_part=collective / 2,
            heartbeat=heartbeat,
            collective=collective,
            engine=answer,
            engine_start=engine.start_timeout_s,
            batch=trainer.batch_timeout_s,
            waiting=max(trainer.batch_timeout_s, engine.start_timeout_s) + collective,
            saving=checkpoint.timeout_s,
        )
