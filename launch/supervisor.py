"""Watch a run, and do what launch/states.py decides.

each look           what ended, what gives no sign of life, which hosts are gone, who asked for a stop -> events
each event          launch.states.decide -> actions
StartEngine         the engine's process is ended and started; the engine set's next generation is written, which
                    controller and trainer follow
End/StartTraining   controller and trainer ranks are ended; started from the newest checkpoint, beside the same engines
AskToStop           the file `stop` in the run folder; the trainer saves and ends
"""

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import closing

from dapo_megatron.checkpoint.published import published, step_of
from dapo_megatron.config import RunConfig
from dapo_megatron.engines.engine_set import EngineSet, Member, write_engine_set
from dapo_megatron.keys import read_keys
from dapo_megatron.observe.catalog import PHASES
from dapo_megatron.observe.display import ProgressDisplay
from dapo_megatron.observe.metrics import read_metrics
from dapo_megatron.observe.pace import is_complete
from dapo_megatron.process import Reporter, read_statuses
from dapo_megatron.run_folder import RunFolder
from launch.attempts import final_phase, note_attempt, told_restarts
from launch.backend import Backend
from launch.commands import command_of_controller, command_of_engine, command_of_rank
from launch.engine_watch import EngineWatch
from launch.failures import failed, failure, hang, unheard_of
from launch.heartbeats import Heartbeats
from launch.job import Job, prepare_restart
from launch.journal import Journal
from launch.processes import Child
from launch.states import (
    Action,
    AskToStop,
    End,
    EndTraining,
    EngineLost,
    Event,
    Finished,
    GraceOver,
    HostLost,
    Limits,
    Phase,
    Progress,
    Requeue,
    StartEngine,
    StartTraining,
    State,
    StopAsked,
    TrainingEnded,
    TrainingFailed,
    decide,
)
from launch.topology import Placement

POLL_S = 0.25
LOOK_S = 1.0
"""Between two looks for processes that hang and for checkpoints."""
LAST_WORDS_S = 1.5
"""After a first failure, for what fails with it to say why."""


class Supervisor:
    """One attempt of a run."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        job: Job,
        backend: Backend,
        plan: Callable[[tuple[str, ...]], Placement],
        hosts: tuple[str, ...],
        spares: tuple[str, ...],
        shared: Mapping[str, str],
        *,
        limits: Limits,
        pools: Mapping[str, Hashable] | None = None,
        ends: float | None = None,
    ):
        """
        Args:
            plan: from the host of each slot to the placement.
            hosts, spares: of the slots, and others.
            pools: of each host, if not all can replace each other.
            shared: environment that all processes have.
            ends: Unix time of the job's time limit.
        """
        self.config, self.folder, self.job, self.backend, self.journal = config, folder, job, backend, Journal(folder)
        self._plan, self._shared, self._ends = plan, shared, ends
        placement = plan(hosts)
        self._recorded: tuple[tuple[int, int], int] = ((0, 0), 0)
        """Size and time of change of the metrics' file, and its last step."""
        begins = self._progress()
        self._state = State(
            limits=limits,
            hosts=hosts,
            spares=spares,
            pools=pools or {},
            engines={e.name: hosts.index(e.node.name) for e in placement.engines},
            training=frozenset(hosts.index(p.node.name) for p in (*placement.ranks, placement.controller)),
            step=begins.step,
            step_at_start=begins.step,
            recorded=begins.step,
            saved=begins.saved,
            saved_at_start=begins.saved,
        )
        self._engines: dict[str, Child] = {}
        self._starts: dict[str, int] = {}
        self._generation = 0
        self._controller: list[Child] = []
        self._trainer: list[Child] = []
        self._training_began = 0.0
        self._heartbeats = Heartbeats(config.deadlines.heartbeat)
        api_key, deadlines = read_keys(folder).engine_api_key, config.deadlines
        self._engine_watch = EngineWatch(api_key, deadlines.engine, deadlines.engine_start)
        self._looked = 0.0
        self._grace_ends: float | None = None
        self._lost: list[str] = []

    def run(self, asked: Callable[[], StopAsked | GraceOver | None]) -> End | Requeue:
        """Start everything, and watch it until it is over; returns how it ended. The caller closes the backend.

        Args:
            asked: what a signal, or the clock, has asked for since the last look.
        """
        note_attempt(self.folder, self._state.step, self._ends)
        with closing(self._engine_watch), Reporter(self.folder, "launcher", essential=False) as reporter:
            for name in self._state.engines:
                self._start_engine(name)
            self._start_training()
            with ProgressDisplay(self.folder, self.config.trainer.steps) as display:
                end = self._watch(asked, reporter, display)
            reporter.phase(*final_phase(end))
            return end

    def _watch(
        self, asked: Callable[[], StopAsked | GraceOver | None], reporter: Reporter, display: ProgressDisplay
    ) -> End | Requeue:
        reporter.phase(self._state.phase)
        while True:
            display.poll()
            for event in self._events(asked):
                self._state, actions = decide(self._state, event)
                self.journal.decided(event, actions)
                if actions:
                    reporter.phase(self._state.phase, told_restarts(self._state))
                for action in actions:
                    if isinstance(action, End | Requeue):
                        display.poll()
                        return action
                    self._perform(action)
                if actions:
                    break  # what was seen before them is no longer so
            time.sleep(POLL_S)

    def _events(self, asked: Callable[[], StopAsked | GraceOver | None]) -> Iterator[Event]:
        now = time.monotonic()
        if (wish := asked()) is not None:
            yield wish
        if self._grace_ends is not None and now > self._grace_ends:
            yield GraceOver()
        # A run that stops goes on without those that fail, which would be told at every look.
        engines = {} if self._state.phase is Phase.STOPPING else dict(self._engines)
        children = [*engines.values(), *self._controller, *self._trainer]
        # Where something ended, its host may be gone: then that is what happened.
        self._lost += self.backend.lost_hosts(look=bool(failed(self.folder, children)))
        # Lost spares first: nothing moves to them.
        self._lost.sort(key=lambda host: host not in self._state.spares)
        while self._lost:
            yield HostLost(self._lost.pop(0))
        if self._state.phase is Phase.RESTARTING:
            yield TrainingEnded()  # EndTraining has waited for it; the next start is on hosts that are there
        for name, child in engines.items():
            if child.process.poll() is not None:
                yield EngineLost(name, str(failure(self.folder, [child])[0]))
        yield from self._of_training()
        if now - self._looked >= LOOK_S:
            self._looked = now
            yield self._progress()
            yield from self._hanging(now, engines)

    def _of_training(self) -> Iterator[Event]:
        if self._trainer and all(c.process.poll() == 0 for c in self._trainer):
            yield self._progress()
            yield Finished(is_complete(self.config, read_metrics(self.folder)))
        elif failed(self.folder, [*self._controller, *self._trainer]):
            time.sleep(LAST_WORDS_S)
            if not failed(self.folder, [*self._controller, *self._trainer]):
                return  # its exit record has come
            error, host = failure(self.folder, [*self._controller, *self._trainer])
            yield self._progress()
            yield TrainingFailed(error.kind, str(error), host)

    def _hanging(self, now: float, engines: Mapping[str, Child]) -> Iterator[Event]:
        children = [*self._controller, *self._trainer]
        running = {name for c in children if c.process.poll() is None for name in c.processes}
        statuses = [s for s in read_statuses(self.folder) if s.process in running]
        for status, silence_s in self._heartbeats.silent(statuses, now)[:1]:
            yield TrainingFailed("crash", str(hang(status, silence_s)), status.host)
        # An srun waits for its step for ever, and a process for a file system.
        started_s, unheard = now - self._training_began, sorted(running - {s.process for s in statuses})
        if unheard and started_s >= self.config.deadlines.engine_start:
            yield TrainingFailed("crash", str(unheard_of(unheard[0], started_s)))
        for member, message in [(m, text) for m, text in self._engine_watch.silent() if m.name in engines][:1]:
            child = engines[member.name]
            self.backend.end([child])
            yield EngineLost(member.name, f"{message}; see {child.log}")

    def _perform(self, action: Action) -> None:
        match action:
            case StartEngine(name):
                self._start_engine(name)
            case EndTraining():
                self.backend.end([*self._controller, *self._trainer])
                self._controller, self._trainer = [], []
            case StartTraining():
                self.job = prepare_restart(self.folder, self.job)
                self._start_training()
            case AskToStop():
                self._ask_to_stop()

    def _placement(self) -> Placement:
        return self._plan(self._state.hosts)

    def _start_engine(self, name: str) -> None:
        if name in self._engines:
            self.backend.end([self._engines[name]])
        placement = self._placement()
        (place,) = [e for e in placement.engines if e.name == name]
        command = command_of_engine(self.config, self.folder, place, self._shared)
        # An SGLang server waits five seconds after SIGTERM, and has nothing to lose.
        (self._engines[name],) = self.backend.start(name, [command], [place.node.name], grace=False)
        self.journal.note(f"{name} starts on {place.node.name} ({place.url})")
        self._starts[name] = self._starts.get(name, 0) + 1
        if self._starts.keys() == self._state.engines.keys():
            self._generation += 1
            members = tuple(Member(e.name, e.url, self._starts[e.name]) for e in placement.engines)
            write_engine_set(self.folder, EngineSet(self._generation, members))
            self._engine_watch.follow(members)

    def _start_training(self) -> None:
        placement = self._placement()
        head = placement.controller.node.name
        controller = command_of_controller(self.job, placement, self._shared)
        self._controller = self.backend.start("controller", [controller], [head], grace=True)
        ranks = [command_of_rank(self.job, placement, place.rank, self._shared) for place in placement.ranks]
        hosts = [p.node.name for p in placement.ranks]
        self._training_began = time.monotonic()
        self._trainer = self.backend.start("trainer", ranks, hosts, grace=True)
        self.journal.note(f"controller starts on {head}, trainer ranks on {', '.join(dict.fromkeys(hosts))}")

    def _ask_to_stop(self) -> None:
        if not any(s.process == "trainer-0" and s.phase in PHASES for s in read_statuses(self.folder)):
            self._grace_ends = time.monotonic()  # before the first step there is nothing to save
            return
        self.folder.stop_request.touch()
        self._grace_ends = time.monotonic() + self.config.launch.stop_grace_s

    def _progress(self) -> Progress:
        checkpoints = published(self.folder)
        return Progress(self._step(), step_of(checkpoints[-1]) if checkpoints else 0)

    def _step(self) -> int:
        """The last step that is recorded; the file is read when it has changed."""
        if not self.folder.metrics.exists():
            return 0
        stat = self.folder.metrics.stat()
        seen = (stat.st_size, stat.st_mtime_ns)
        if seen != self._recorded[0]:
            records = read_metrics(self.folder)
            self._recorded = (seen, int(records[-1]["step"]) if records else 0)
        return self._recorded[1]
