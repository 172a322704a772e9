"""What the launcher decided, and why: one line each, in logs/launcher.log and on the screen."""

from collections.abc import Sequence
from datetime import datetime

from dapo_megatron.run_folder import RunFolder
from launch.states import (
    Action,
    AskToStop,
    End,
    EndTraining,
    EngineLost,
    Event,
    GraceOver,
    HostLost,
    Requeue,
    StartEngine,
    StartTraining,
    StopAsked,
    TrainingFailed,
)


class Journal:
    """Appends to the log of one run."""

    def __init__(self, folder: RunFolder):
        self._path = folder.journal

    def note(self, text: str) -> None:
        """Write one line, with the time."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n")

    def decided(self, event: Event, actions: Sequence[Action]) -> None:
        """Write down what an event led to; nothing where it led to nothing, unless others look for it there."""
        reason, *_ = _reason(event).splitlines()
        if not actions:
            if isinstance(event, HostLost | StopAsked):
                self.note(reason)
            return
        line = f"{reason} -> {', '.join(map(_told, actions))}"
        self.note(line)
        if not isinstance(actions[-1], End):  # an end is told by whoever asked for the run
            print(line, flush=True)


def _reason(event: Event) -> str:
    match event:
        case EngineLost(_, why) | TrainingFailed(_, why) | StopAsked(why):
            return why
        case HostLost(host):
            return f"{host} is lost"
        case GraceOver():
            return "the time for a stop is over"
    return type(event).__name__


def _told(action: Action) -> str:
    match action:
        case StartEngine(name):
            return f"start {name}"
        case EndTraining():
            return "end controller and trainer"
        case StartTraining():
            return "start controller and trainer from the newest checkpoint"
        case AskToStop():
            return "ask for a checkpoint and the end"
        case Requeue(exclude=exclude):
            return " ".join(["back into the queue", *(["without", ", ".join(exclude)] if exclude else [])])
        case End(kind, _):
            return "the end" if kind is None else f"the end ({kind})"
