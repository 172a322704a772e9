"""The one error a user is meant to read: a single line that says what, where and what to do."""

import sys
from collections.abc import Callable


class DapoError(Exception):
    """A mistake in the input or a failure of a part, told in one line; entry points print it without a traceback."""


def exit_code(program: Callable[[], object]) -> int:
    """Run a program: 0, or 1 after a DapoError, which goes to stderr as `error: ...` (the launcher looks for it)."""
    try:
        program()
    except DapoError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        return 1
    return 0
