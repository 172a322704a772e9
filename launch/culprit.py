"""Who holds a run up: from one look at it to its condition and the one component that the others wait for. Pure.

looked for, in this order       the culprit
no launcher                     nobody: the run has ended, or waits to be started again
a launcher without heartbeat    the launcher
silence of SUSPECT_S            whoever is silent for longest; after the timeout the run hangs
a process that failed           it, until the launcher has acted
restarting                      the launcher
a process that said nothing     it: it is being started
ranks in different phases       the one that is in its phase for longest: the others are further
connecting to engines           the one that was started again; all of them, if several were or none
its data, groups, evaluation    the controller
any other phase                 the trainer; nobody while the controller generates ahead of it
"""

from dataclasses import dataclass
from enum import StrEnum

from dapo_megatron.observe.pace import clock
from dapo_megatron.process import BEAT_S, FOLLOWS_ENGINES, GREETS_CONTROLLER, Exit
from launch.attempts import REQUEUED
from launch.lock import Holder
from launch.look import Process, Snapshot
from launch.states import Phase

SUSPECT_S = 10 * BEAT_S
"""Silence from which a process is named."""
PREPARE_S = 600.0
"""For a launcher to look at the nodes and the checkpoint, before its first heartbeat."""


class Condition(StrEnum):
    """What a script wants to know."""

    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    HANGS = "hangs"
    NOT_RUNNING = "not running"


@dataclass(frozen=True)
class Verdict:
    """The condition of a run."""

    condition: Condition
    culprit: str | None
    """A process, "trainer" for all its ranks, an engine or "engines"; None: nobody is waited for."""
    line: str


DOES = {
    "load": "loads its weights",
    "start": "starts",
    "step": "begins a step",
    "old_logprobs": "scores old log-probs",
    "update": "updates",
    "push": "pushes weights",
    "verify": "compares log-probs with the engines'",
    "checkpoint": "saves",
    "generate": "generates",
    "evaluate": "evaluates",
    "idle": "is idle",
}
"""What a process does in a phase, in words."""


def judge(seen: Snapshot) -> Verdict:
    """The condition of a run, and whom the others wait for."""
    if seen.holder is None:
        return _without_launcher(seen)
    running = [p for p in seen.processes if p.exit is None]
    holder = (seen.holder.host, seen.holder.pid)
    if seen.launcher is None or (seen.launcher.host, seen.launcher.pid) != holder:
        return _prepares(seen, seen.holder)  # what an earlier launcher left is not its word
    if seen.launcher.silence_s >= seen.timeout_s:
        silence = clock(seen.launcher.silence_s)
        return _launcher_is_gone(seen.holder, f"{seen.launcher.place} has not beaten for {silence}")
    if silent := [p for p in (seen.launcher, *running) if p.silence_s >= SUSPECT_S]:
        return _silent(max(silent, key=lambda p: p.silence_s), seen.timeout_s)
    if failed := [p for p in seen.processes if p.exit is not None and p.exit.kind is not None]:
        return _failed(min(failed, key=lambda p: p.exit.time if p.exit else 0))
    if seen.launcher.phase == Phase.RESTARTING:
        return _runs("launcher", "the launcher ends controller and trainer, to start them again")
    verdict = _of_training(seen)
    if seen.launcher.phase == Phase.STOPPING:
        return Verdict(verdict.condition, verdict.culprit, f"a stop was asked for; {verdict.line}")
    return verdict


def _runs(culprit: str | None, line: str) -> Verdict:
    return Verdict(Condition.RUNNING, culprit, line)


def _prepares(seen: Snapshot, holder: Holder) -> Verdict:
    """A launcher that has not beaten yet."""
    if seen.held_s < PREPARE_S:
        return _runs("launcher", "the launcher prepares the run")
    who = f"launcher (pid {holder.pid} on {holder.host})"
    return _launcher_is_gone(holder, f"{who} has prepared the run for {clock(seen.held_s)}")


def _without_launcher(seen: Snapshot) -> Verdict:
    if seen.launcher is not None and seen.launcher.phase == REQUEUED:
        job = f"SLURM job {seen.started.slurm_job}" if seen.started and seen.started.slurm_job else "the job"
        return Verdict(Condition.NOT_RUNNING, None, f"{job} is back in the queue: {seen.launcher.detail}")
    if seen.ended is None:
        return Verdict(Condition.NOT_RUNNING, None, "nothing runs: start it, with --resume to go on")
    if seen.ended.kind is None and not seen.is_complete:
        what = f"stopped at step {seen.step} of {seen.total_steps}, as the file `stop` asked"
        return Verdict(Condition.NOT_RUNNING, None, f"{what}: --resume goes on")
    if seen.ended.kind is None:
        return Verdict(Condition.FINISHED, None, f"finished at step {seen.step} of {seen.total_steps}")
    said = _first_line(seen.ended)
    if seen.ended.kind == "preempted":
        return Verdict(Condition.NOT_RUNNING, None, f"{said}: --resume goes on")
    return Verdict(Condition.FAILED, None, said)


def _launcher_is_gone(holder: Holder, line: str) -> Verdict:
    line = f"{line}: it was killed, or its host is lost"
    if holder.slurm_job is not None:
        return Verdict(Condition.NOT_RUNNING, "launcher", f"{line}; SLURM may start job {holder.slurm_job} once more")
    return Verdict(Condition.FAILED, "launcher", f"{line}; --resume goes on")


def _silent(process: Process, timeout_s: float) -> Verdict:
    detail = f" ({process.detail})" if process.detail else ""
    line = f"{process.place} has not beaten for {clock(process.silence_s)}, in phase {process.phase}{detail}"
    return Verdict(Condition.HANGS if process.silence_s >= timeout_s else Condition.RUNNING, process.name, line)


def _failed(process: Process) -> Verdict:
    assert process.exit is not None
    return _runs(process.name, f"{process.place} stopped ({process.exit.kind}): {_first_line(process.exit)}")


def _of_training(seen: Snapshot) -> Verdict:
    there = {p.name: p for p in seen.processes}
    names = ["controller", *(f"trainer-{rank}" for rank in range(seen.ranks))]
    if missing := [name for name in names if name not in there]:
        return _runs(missing[0], f"{missing[0]} is being started")
    controller, ranks = there["controller"], [there[name] for name in names[1:]]
    first, others = ranks[0], {rank.phase for rank in ranks}
    if len(others) > 1:
        last = max(ranks, key=lambda rank: rank.phase_s)
        further = ", ".join(sorted(others - {last.phase}))
        return _runs(last.name, f"trainer waits for {last.name}, which {_does(last)}; others are in {further}")
    if first.phase == "done":
        return _runs(None, "the training has ended")
    return _of_phase(seen, controller, first)


def _of_phase(seen: Snapshot, controller: Process, trainer: Process) -> Verdict:
    """All ranks are in one phase."""
    is_pushing = trainer.phase == "push" and seen.engines is not None and seen.engines_s < trainer.phase_s
    if trainer.detail == FOLLOWS_ENGINES or is_pushing:
        who, verb = _to_be_ready(seen)
        return _runs(who, f"trainer and controller wait for {who}, which {verb} being started, {clock(seen.engines_s)}")
    if trainer.phase in ("generate", "evaluate") or trainer.detail == GREETS_CONTROLLER:
        return _runs("controller", f"trainer waits for the controller, which {_does(controller)}")
    if controller.phase == "generate":
        return _runs(None, f"nobody waits: trainer {_does(trainer)}; controller {_does(controller)}")
    return _runs("trainer", f"controller waits for the trainer, which {_does(trainer)}")


def _to_be_ready(seen: Snapshot) -> tuple[str, str]:
    """The only engine, or the only one that was started again, with its verb; or all of them."""
    members = seen.engines.members if seen.engines else ()
    of_interest = [member.name for member in members if member.start > 1] or [member.name for member in members]
    return (of_interest[0], "is") if len(of_interest) == 1 else ("engines", "are")


def _first_line(ended: Exit) -> str:
    return next(iter(ended.message.splitlines()), "without a word")


def _does(process: Process) -> str:
    what = DOES.get(process.phase, f"is in phase {process.phase}")
    return f"{what}{f': {process.detail}' if process.detail else ''}, {clock(process.phase_s)}"
