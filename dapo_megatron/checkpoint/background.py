"""A call in a thread of its own, for what a slow disk must not hold up."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from dapo_megatron.errors import StorageError

T = TypeVar("T")


class BackgroundCall(Generic[T]):
    """Runs from the moment that it is made; `result` waits for it."""

    def __init__(self, what: str, call: Callable[[], T]):
        """
        Args:
            what: is done, for errors: "writing the checkpoint".
        """
        self._what, self._call = what, call
        self._result: list[T] = []
        self._error: Exception | None = None
        # A daemon: when the process has to go, it does not wait for a slow disk.
        self._thread = threading.Thread(target=self._run, name=what, daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def result(self, timeout_s: float) -> T:
        """What the call returned.

        Raises:
            StorageError: it takes more than `timeout_s` from now.
            Exception: the call's own.
        """
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise StorageError(
                f"{self._what} takes more than checkpoint.timeout_s={timeout_s:g} s: look at the disk of the run, or "
                "allow more"
            )
        if self._error is not None:
            raise self._error
        return self._result[0]

    def _run(self) -> None:
        try:
            self._result.append(self._call())
        except Exception as e:  # whatever it is, who waits for the result must hear of it
            self._error = e
