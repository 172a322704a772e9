"""The training loop: one rollout step is batch, old log-probs, updates, push.

controller.next_batch   groups of step k, sampled by the live version (older with max_policy_lag and carried groups)
old log-probs           of all mini-batches but the first, before its update, on the updates' own micro-batches
update                  one for each mini-batch
push                    the next version goes live on the engines, and its log-probs are compared
evaluation              after some steps; with max_policy_lag, beside the next one (trainer.evaluations)
checkpoint              after some steps; written while the next ones run, published by a later one

While the controller is waited for, an engine that the launcher has replaced gets the live version; a request to stop
ends the run at once, with a checkpoint of the last step, and an evaluation that was under way is made anew by whoever
goes on from that.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dapo_megatron.actor.actor import Actor
from dapo_megatron.actor.training_objective import PolicyObjective
from dapo_megatron.checkpoint.distributed import Checkpointer
from dapo_megatron.checkpoint.load import load_checkpoint, load_weights
from dapo_megatron.checkpoint.manifest import Format, read_manifest
from dapo_megatron.checkpoint.train_state import TrainState
from dapo_megatron.config import CheckpointConfig, RunConfig
from dapo_megatron.distributed.agreement import on_first_rank
from dapo_megatron.distributed.layout import Layout
from dapo_megatron.errors import EngineError
from dapo_megatron.observe import catalog as m
from dapo_megatron.process import FOLLOWS_ENGINES, GREETS_CONTROLLER
from dapo_megatron.resharding.push import Pusher
from dapo_megatron.resharding.verify import Verifier
from dapo_megatron.run_folder import RunFolder
from dapo_megatron.trainer.controller_client import ControllerClient, Meanwhile, StopAsked
from dapo_megatron.trainer.evaluations import Evaluations
from dapo_megatron.trainer.recorder import Recorder
from dapo_megatron.trainer.replica_batch import ReplicaBatch
from dapo_megatron.trainer.skipped import count_skipped, dump_skipped


@dataclass(frozen=True)
class Start:
    """What a run begins with; neither: the model folder of the config."""

    resume: Path | None = None
    """Checkpoint to go on from."""
    weights: Path | None = None
    """Checkpoint of which only the weights are taken."""


def train(
    config: RunConfig,
    actor: Actor,
    controller: ControllerClient,
    pusher: Pusher,
    recorder: Recorder,
    start: Start,
) -> None:
    """Run all steps; every rank runs this.

    Raises:
        DapoError: any part failed; the message says which and what to do.
    """
    with recorder.phase("load"):
        state, snapshot = load(config, actor, start)
    with recorder.phase("start"):
        with recorder.detail(GREETS_CONTROLLER):
            verifier = Verifier(config, actor, pusher, controller.hello(state, snapshot))
        recorder.open(None if start.resume is None else state.step)
        with recorder.detail(FOLLOWS_ENGINES):
            go_live(config, pusher, verifier, state.version, is_start=True)
    objective, checkpointer = PolicyObjective(config.algorithm), Checkpointer(config, actor)

    def follow_engines() -> None:
        if on_first_rank("looking for other engines", actor.layout, pusher.can_follow):
            with recorder.detail(FOLLOWS_ENGINES):
                go_live(config, pusher, verifier, state.version, is_start=False)

    def stop_or_follow_engines() -> None:
        if asked_to_stop(config, actor.layout):
            raise StopAsked
        follow_engines()

    waiting = Meanwhile(lambda: stop_request(config).exists() or pusher.can_follow(), stop_or_follow_engines)
    evaluations = Evaluations(config, controller, recorder, checkpointer, waiting)

    manifest = None if start.resume is None else read_manifest(start.resume)
    evaluation = {} if manifest is None else manifest.metrics
    saved = (0, "weights") if manifest is None else (state.step, manifest.format)
    unrecorded: dict[str, float] = {}
    published: dict[str, float] = {}
    try:
        evaluation = evaluations.first(state) if manifest is None else evaluations.resumed(state, evaluation)
        is_over = state.step >= config.trainer.steps or config.trainer.goals_reached(evaluation)
        while not is_over:
            with recorder.phase("step"):
                with recorder.phase("generate"):
                    batch, metrics = controller.next_batch(state.step + 1, state.version, waiting)
                state, trained = train_step(config, actor, pusher, verifier, recorder, objective, state, batch)
            unrecorded, evaluation = {m.STEP: state.step, m.VERSION: state.version} | metrics | trained, {}
            before = evaluations.collect()
            is_over = state.step == config.trainer.steps
            evaluation = evaluations.after(state, waits=is_over or config.trainer.goals_reached(before))
            is_over = is_over or config.trainer.goals_reached(evaluation) or asked_to_stop(config, actor.layout)
            with recorder.phase("checkpoint"):
                published |= checkpointer.poll()
            # Before the checkpoint, so that whoever goes on from it has the record of its step.
            recorder.record(unrecorded | evaluation | published)
            unrecorded, published = {}, {}
            is_wanted = is_over or asked_to_save(config, actor.layout)
            if is_wanted or state.step % config.checkpoint.every == 0:
                with recorder.phase("checkpoint"):
                    format = format_of(state.step, config.checkpoint, is_wanted=is_wanted)
                    published = checkpointer.save(state, controller.state(), format=format, metrics=evaluation)
                    saved = (state.step, format)
    except StopAsked:
        if unrecorded:
            recorder.record(unrecorded | published)
        if state.step and saved != (state.step, "fully_reshardable"):
            checkpointer.save(state, controller.state(), format="fully_reshardable", metrics=evaluation)
        checkpointer.finish()
        return
    checkpointer.finish()
    controller.goodbye()


def go_live(config: RunConfig, pusher: Pusher, verifier: Verifier, version: int, *, is_start: bool) -> None:
    """Give the engines that serve now the weights as `version`, and compare; collective over all ranks.

    Args:
        is_start: of the training: nobody generates yet.
    """
    verify = bool(config.resharding.verify_every)
    while True:
        pusher.connect()
        try:
            if is_start and verify:
                verifier.prime()
            pusher.push(version)
            if verify:
                verifier.verify(version)
        except EngineError as e:
            pusher.wait_until_replaced(e)
        else:
            return


def load(config: RunConfig, actor: Actor, start: Start) -> tuple[TrainState, bytes | None]:
    """The actor's weights (and what else the checkpoint holds), where training stands, and the controller's state."""
    if start.resume is not None:
        return load_checkpoint(actor, start.resume)
    if start.weights is not None:
        load_weights(actor, start.weights)
    else:
        actor.load_hf(config.model.path)
    return TrainState(), None


def asked_to_stop(config: RunConfig, layout: Layout) -> bool:
    """Whether somebody (the launcher, at SIGTERM) has asked the run to save and end; rank 0 looks."""
    return on_first_rank("looking for a request to stop", layout, stop_request(config).exists)


def stop_request(config: RunConfig) -> Path:
    """The file that asks for a stop."""
    return RunFolder(Path(config.run_dir)).stop_request


def asked_to_save(config: RunConfig, layout: Layout) -> bool:
    """Whether somebody has asked for a checkpoint since the last look; rank 0 looks, and takes the request away."""
    request = RunFolder(Path(config.run_dir)).save_request

    def take() -> bool:
        is_there = request.exists()
        request.unlink(missing_ok=True)
        return is_there

    return on_first_rank("looking for a request to save", layout, take)


def format_of(step: int, config: CheckpointConfig, *, is_wanted: bool) -> Format:
    """Whether the checkpoint after a step is loadable in any layout, or sooner written.

    Args:
        is_wanted: it is the last, or somebody has asked for it.
    """
    is_nth = step % config.every == 0 and step // config.every % config.reshardable_every == 0
    return "fully_reshardable" if is_wanted or is_nth else "dp_reshardable"


def train_step(
    config: RunConfig,
    actor: Actor,
    pusher: Pusher,
    verifier: Verifier,
    recorder: Recorder,
    objective: PolicyObjective,
    state: TrainState,
    batch: ReplicaBatch,
) -> tuple[TrainState, dict[str, float]]:
    """What follows the batch of a rollout step: where training stands after it, and its metrics."""
    state, metrics = train_batch(config, actor, recorder.phase, objective, state, batch)
    step, version = state.step + 1, state.version + 1
    with recorder.phase("push"):
        metrics |= pusher.push(version)
    every = config.resharding.verify_every
    if every and (step % every == 0 or pusher.has_reconnected):
        with recorder.phase("verify"):
            metrics |= verified(config, pusher, verifier, version)
    return replace(state, step=step, version=version), metrics


def train_batch(
    config: RunConfig,
    actor: Actor,
    phase: Callable[[str], AbstractContextManager[None]],
    objective: PolicyObjective,
    state: TrainState,
    batch: ReplicaBatch,
) -> tuple[TrainState, dict[str, float]]:
    """Old log-probs and updates: the state with its skipped updates counted, and the updates' metrics.

    Args:
        phase: what goes on inside "old_logprobs" and "update".
    """
    with phase("old_logprobs"):
        old = old_logprobs(config, actor, batch)
    with phase("update"):
        updates, skipped = [], state.skipped
        for update, own in enumerate(old):
            updates.append(actor.update(batch[update], objective, own))
            skipped = count_skipped(skipped, updates[-1])
            if skipped > config.trainer.max_skipped_updates:
                raise dump_skipped(config, actor, batch, updates, replace(state, skipped=skipped))
    metrics = m.reduce_updates([u | {m.GRAD_NORM_MIN: u[m.GRAD_NORM]} for u in updates])
    return replace(state, skipped=skipped), metrics


def verified(config: RunConfig, pusher: Pusher, verifier: Verifier, version: int) -> dict[str, float]:
    """The verification's metrics; where an engine is lost in it, once more when it has been replaced."""
    while True:
        try:
            return verifier.verify(version)
        except EngineError as e:
            pusher.wait_until_replaced(e)
        go_live(config, pusher, verifier, version, is_start=False)


def old_logprobs(config: RunConfig, actor: Actor, batch: ReplicaBatch) -> list[list[torch.Tensor] | None]:
    """The ratio's denominators, one entry an update; None lets the update use its own log-probs (the ratio is 1).

    For the first update that is exact: the weights are still those of the step's beginning.
    """
    if config.algorithm.old_logprobs == "rollout":
        return [[actor.own_column(mb, mb.rollout_logprobs) for mb in batch[i]] for i in range(len(batch))]
    return [None, *(actor.logprobs(batch[i]) for i in range(1, len(batch)))]
