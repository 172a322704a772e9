"""The one error a user is meant to read: a single line that says what, where and what to do."""


class DapoError(Exception):
    """A mistake in the input or a failure of a part, told in one line; entry points print it without a traceback."""
