"""What a launcher does when something happens: decide(state, event) -> (state, actions). Pure.

A run has engines, each its own to be started again, and the training: controller and trainer ranks, which live and end
together. They run in slots, the places that the placement plans. Each slot is on a host, which a spare one can replace.

    phase       event                     next        actions
    running     EngineLost                running     StartEngine, elsewhere if its host failed twice
                ... too often             over        Requeue if the run got further, or the engines of other hosts
                                                      never failed, and the job may; or else End
                TrainingFailed            restarting  EndTraining
                ... too often             over        Requeue if the run got further and the job may, or else End
                ... again at that step    over        End: no progress, unless a spare host takes over
                ... configuration, data   over        End: a person must mend it (a full disk too)
                HostLost                  running     a spare host takes over: StartEngine, EndTraining, as needed
                ... no spare host         over        Requeue without that host if the job may, or else End
                StopAsked                 stopping    AskToStop
                Finished                  over        End
    restarting  TrainingEnded             running     StartTraining
                EngineLost, HostLost      restarting  as above
                StopAsked                 over        Requeue or End: the newest checkpoint is what there is
    stopping    Finished                  over        End; Requeue if work is left and whoever asked wants it back
                TrainingFailed, GraceOver over        Requeue or End
                HostLost                  over        Requeue or End, if it is the training's
                EngineLost; engines' host stopping    nothing: a save may not need them, and the grace is short
    any         Progress                  the same    (the steps are remembered)
    over        any                       over
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from dapo_megatron.errors import Kind

OF_A_PERSON: tuple[Kind, ...] = ("configuration", "data", "storage")
"""Kinds of errors that come again after a restart, until a person has mended what is wrong."""
BAD_AFTER = 2
"""Failures after which a host is not used again, if there is another."""


class Phase(StrEnum):
    """Where a run stands."""

    RUNNING = "running"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    OVER = "over"


@dataclass(frozen=True)
class Limits:
    """What a launcher may do."""

    max_restarts: int
    """Restarts of the training, and of each engine, in one attempt of the job."""
    can_requeue: bool = False
    """Whether the job can be put back into a queue."""
    can_fail: bool = True
    """Whether it can after a failure too."""


@dataclass(frozen=True)
class State:
    """All that a decision depends on."""

    limits: Limits
    hosts: tuple[str, ...]
    """The host of each slot; no two slots share one."""
    engines: Mapping[str, int]
    """The slot of each engine."""
    training: frozenset[int]
    """Slots of the controller and the trainer ranks."""
    spares: tuple[str, ...] = ()
    pools: Mapping[str, Hashable] = field(default_factory=dict)
    """Of each host: a spare one replaces hosts of its own pool. Those that are not named are in one pool."""
    phase: Phase = Phase.RUNNING
    step: int = 0
    """The furthest that was recorded."""
    step_at_start: int = 0
    """Of this attempt of the job."""
    saved: int = 0
    """The step of the newest checkpoint."""
    saved_at_start: int = 0
    recorded: int = 0
    """The last step now: a new start of the training goes back to its checkpoint."""
    failed_at: int | None = None
    """What was recorded when the training failed last."""
    restarts: int = 0
    """Of the training."""
    engine_restarts: Mapping[str, int] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)
    """How often something failed on a host."""
    why: str = ""
    """What a stop was asked for."""
    comes_back: bool = False
    """Whether a stop is meant to be followed by another attempt."""


@dataclass(frozen=True)
class EngineLost:
    """An engine ended, or was killed because it hung."""

    name: str
    why: str


@dataclass(frozen=True)
class TrainingFailed:
    """The first of controller and trainer ranks has failed; what the others say later is its consequence."""

    kind: Kind
    message: str
    host: str | None = None
    """Whose fault it may be, as that host calls itself; None: nobody knows."""


@dataclass(frozen=True)
class TrainingEnded:
    """Of controller and trainer no process is left."""


@dataclass(frozen=True)
class Finished:
    """Controller and trainer have ended well."""

    is_complete: bool
    """Whether nothing is left to do."""


@dataclass(frozen=True)
class HostLost:
    """A host is gone, or its network is."""

    host: str


@dataclass(frozen=True)
class Progress:
    """How far the training is."""

    step: int
    """The last that it has finished."""
    saved: int = 0
    """That of its newest checkpoint; 0: there is none."""


@dataclass(frozen=True)
class StopAsked:
    """Somebody wants the run to save and end."""

    why: str
    comes_back: bool


@dataclass(frozen=True)
class GraceOver:
    """A stop took too long."""


Event = EngineLost | TrainingFailed | TrainingEnded | Finished | HostLost | Progress | StopAsked | GraceOver


@dataclass(frozen=True)
class StartEngine:
    """Start an engine, on the host that its slot has now; whatever is left of it is ended first."""

    name: str


@dataclass(frozen=True)
class EndTraining:
    """End controller and trainer, and say TrainingEnded when that is done."""


@dataclass(frozen=True)
class StartTraining:
    """Start controller and trainer from the newest checkpoint, on the hosts that their slots have now."""


@dataclass(frozen=True)
class AskToStop:
    """Ask the training to save and end; say GraceOver when it takes too long."""


@dataclass(frozen=True)
class Requeue:
    """End everything, and put the job back into the queue."""

    why: str
    exclude: tuple[str, ...]
    is_failure: bool
    """Whether the run failed, or saved no further step: the next starts may do no better."""


@dataclass(frozen=True)
class End:
    """End everything; an error unless `kind` is None."""

    kind: Kind | None
    message: str


Action = StartEngine | EndTraining | StartTraining | AskToStop | Requeue | End


def decide(state: State, event: Event) -> tuple[State, list[Action]]:
    """The state after an event, and what must be done, in this order; the table above."""
    if state.phase is Phase.OVER:
        return state, []
    match event:
        case Progress(step, saved):
            return replace(state, step=max(state.step, step), recorded=step, saved=max(state.saved, saved)), []
        case StopAsked(why, comes_back):
            return _asked_to_stop(state, why, comes_back)
        case EngineLost(name, why):
            return _engine_lost(state, name, why)
        case HostLost(host):
            return _host_lost(state, host)
        case TrainingFailed(kind, message, host):
            return _training_failed(state, kind, message, host)
        case TrainingEnded() if state.phase is Phase.RESTARTING:
            return replace(state, phase=Phase.RUNNING, restarts=state.restarts + 1), [StartTraining()]
        case Finished(is_complete):
            return _finished(state, is_complete)
        case GraceOver() if state.phase is Phase.STOPPING:
            return _stopped(state, f"{state.why}; it was not saved in time")
    return state, []


def _asked_to_stop(state: State, why: str, comes_back: bool) -> tuple[State, list[Action]]:
    if state.phase is Phase.STOPPING:
        # Who wants the run to end for good is heard, whoever asked before.
        return replace(state, comes_back=state.comes_back and comes_back), []
    asked = replace(state, why=why, comes_back=comes_back)
    if state.phase is Phase.RESTARTING:
        return _stopped(asked, why)
    return replace(asked, phase=Phase.STOPPING), [AskToStop()]


def _finished(state: State, is_complete: bool) -> tuple[State, list[Action]]:
    if state.phase is Phase.STOPPING and not is_complete:
        return _stopped(state, state.why)
    return _over(state, End(None, "finished"))


def _stopped(state: State, why: str) -> tuple[State, list[Action]]:
    """After a stop, however it went."""
    end = End("preempted", f"stopped: {why}")
    if state.comes_back:
        return _back(state, why, end, is_failure=state.saved <= state.saved_at_start)
    return _over(state, end)


def _engine_lost(state: State, name: str, why: str) -> tuple[State, list[Action]]:
    if state.phase is Phase.STOPPING:  # the step in progress may not need it; the grace is limited
        return state, []
    slot = state.engines[name]
    state = _blamed(state, state.hosts[slot])
    if state.engine_restarts.get(name, 0) >= state.limits.max_restarts:
        limit = state.limits.max_restarts
        message = why if limit == 0 else f"{why} (after {limit} restarts of {name})"
        if _is_fault_of_host(state, state.hosts[slot]):
            return _back(state, message, End("engine", message), is_failure=True)
        return _given_up(state, "engine", message)
    restarts = {**state.engine_restarts, name: state.engine_restarts.get(name, 0) + 1}
    state, moved = _moved_from_bad_hosts(replace(state, engine_restarts=restarts), [slot])
    return _started_anew(state, moved, [name])


def _training_failed(state: State, kind: Kind, message: str, host: str | None) -> tuple[State, list[Action]]:
    if state.phase is Phase.RESTARTING:
        return state, []
    if kind in OF_A_PERSON:
        return _over(state, End(kind, message))
    if host is not None and (known := _host_called(state, host)) is not None:
        state = _blamed(state, known)
    if state.phase is Phase.STOPPING:
        return _stopped(state, f"{state.why}; and then {message}")
    if state.restarts >= state.limits.max_restarts:
        limit = state.limits.max_restarts
        return _given_up(state, kind, message if limit == 0 else f"{message} (after {limit} restarts)")
    state, moved = _moved_from_bad_hosts(state, sorted(state.training))
    if state.failed_at == state.recorded and not moved:
        return _over(state, End(kind, f"{message} (again at step {state.recorded}: no progress)"))
    restarting, actions = _started_anew(replace(state, phase=Phase.RESTARTING, failed_at=state.recorded), moved, [])
    return restarting, [*actions, EndTraining()]


def _host_lost(state: State, host: str) -> tuple[State, list[Action]]:
    if host in state.spares:
        return replace(state, spares=tuple(s for s in state.spares if s != host)), []
    if host not in state.hosts:
        return state, []
    state = replace(state, failures={**state.failures, host: max(BAD_AFTER, state.failures.get(host, 0))})
    slot = state.hosts.index(host)
    if state.phase is Phase.STOPPING:
        why = f"{state.why}; and then {host} was lost"
        return _stopped(state, why) if slot in state.training else (state, [])
    state, moved = _moved_from_bad_hosts(state, [slot])
    if not moved:
        # No fault of the run: how far it got does not matter.
        why = f"{host} is lost, and no spare host is left"
        return _back(state, why, End("crash", why), is_failure=True)
    return _started_anew(state, moved, [])


def _given_up(state: State, kind: Kind, message: str) -> tuple[State, list[Action]]:
    """What this allocation cannot do may be possible in another, if this one got anywhere."""
    if state.step > state.step_at_start:
        return _back(state, message, End(kind, message), is_failure=True)
    return _over(state, End(kind, message))


def _back(state: State, why: str, otherwise: End, *, is_failure: bool) -> tuple[State, list[Action]]:
    """Into the queue, if the job may."""
    if state.limits.can_requeue and (state.limits.can_fail or not is_failure):
        return _over(state, Requeue(why, _bad_hosts(state), is_failure))
    return _over(state, otherwise)


def _over(state: State, action: Action) -> tuple[State, list[Action]]:
    return replace(state, phase=Phase.OVER), [action]


def _blamed(state: State, host: str) -> State:
    return replace(state, failures={**state.failures, host: state.failures.get(host, 0) + 1})


def _is_fault_of_host(state: State, host: str) -> bool:
    """Whether engines failed there too often and nowhere else: then others may do without it what these could not."""
    elsewhere = [name for name, slot in state.engines.items() if state.hosts[slot] != host]
    return host in _bad_hosts(state) and elsewhere != [] and not any(map(state.engine_restarts.get, elsewhere))


def _host_called(state: State, name: str) -> str | None:
    """The host that calls itself so, perhaps with its domain, which SLURM leaves out; None: it is not of the run."""
    if name in state.hosts:
        return name
    return next((host for host in state.hosts if host.partition(".")[0] == name.partition(".")[0]), None)


def _bad_hosts(state: State) -> tuple[str, ...]:
    return tuple(sorted(host for host, count in state.failures.items() if count >= BAD_AFTER))


def _moved_from_bad_hosts(state: State, slots: Sequence[int]) -> tuple[State, list[int]]:
    """Slots whose hosts failed too often go to spare hosts, as long as there are any; also returns those that went."""
    hosts, spares, moved = list(state.hosts), list(state.spares), []
    for slot in slots:
        pool = state.pools.get(hosts[slot])
        fit = [spare for spare in spares if state.pools.get(spare) == pool]
        if state.failures.get(hosts[slot], 0) >= BAD_AFTER and fit:
            hosts[slot] = fit[0]
            spares.remove(fit[0])
            moved.append(slot)
    return replace(state, hosts=tuple(hosts), spares=tuple(spares)), moved


def _started_anew(state: State, moved: Sequence[int], engines: Sequence[str]) -> tuple[State, list[Action]]:
    """Start the engines named, and whatever ran in slots that have moved."""
    actions: list[Action] = [StartEngine(n) for n, slot in state.engines.items() if n in engines or slot in moved]
    if state.phase is Phase.RUNNING and state.training & set(moved):
        return replace(state, phase=Phase.RESTARTING), [*actions, EndTraining()]
    return state, actions
