"""Numbers of data files as text: in plain decimal notation, digit for digit as they were written."""

from decimal import Decimal, InvalidOperation

MAX_DIGITS = 1000
"""Digits before or after the point that a number may need: 1e999999999 would fill the memory."""


class WrittenFloat(float):
    """A number of a JSON file that knows how it stands there."""

    written: str

    def __new__(cls, text: str) -> "WrittenFloat":
        number = super().__new__(cls, text)
        number.written = text
        return number


def plain(number: int | float | Decimal) -> str:
    """1e-05 -> "0.00001", 1e3 -> "1000", 2.0 -> "2.0"; a float that was not written is its shortest decimal.

    Raises:
        ValueError: not finite, or of more than MAX_DIGITS digits; says which.
    """
    written = getattr(number, "written", repr(number)) if isinstance(number, float) else number
    try:
        exact = Decimal(written)
    except InvalidOperation:  # an exponent beyond those of the decimal module
        raise ValueError(f"a number of more than {MAX_DIGITS} digits") from None
    if not exact.is_finite():
        raise ValueError("not a finite number")
    if abs(exact.adjusted()) > MAX_DIGITS:
        raise ValueError(f"a number of more than {MAX_DIGITS} digits")
    return f"{exact:f}"
