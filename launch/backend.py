"""What starts and ends processes on hosts: children of the launcher here, steps of a SLURM job there."""

from collections.abc import Sequence
from typing import Protocol

from launch.commands import Command
from launch.processes import Child


class Backend(Protocol):
    """Held open by whoever runs a job; nothing that it started is left when it is closed."""

    def start(self, name: str, commands: Sequence[Command], hosts: Sequence[str], *, grace: bool) -> list[Child]:
        """Start processes that belong together, each on its host.

        Args:
            name: of all of them: an engine's, "controller" or "trainer".
            grace: whether they get time to end; without, they are ended by SIGKILL at once.
        """
        ...

    def end(self, children: Sequence[Child]) -> None:
        """End these, with everything they started, and wait until they have."""
        ...

    def lost_hosts(self, *, look: bool) -> Sequence[str]:
        """Hosts of the job that are gone, each told once; with `look` by what is known now, and not some time ago."""
        ...
