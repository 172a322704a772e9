r"""One value in many notations: numbers, units, number bases, words, letters of choices. Strings only, no library.

`compare` decides what needs no algebra, in microseconds.
"""

import re
from typing import NamedTuple

from dapo_megatron.grading.units import conflict, split_unit

MAX_CHARS = 300
"""What is longer is compared as mathematics, where time is limited."""

_FONT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|texttt|textsf|mathrm|mathbf|mathcal|mathit|mathsf|mathtt|mbox|hbox|"
    r"operatorname|rm|bf|it)\s*\{([^{}]*)\}"
)
MATH_SIGN = re.compile(r"(?<!\\)(?:\$|\\[()\[\]])")
SPACE = re.compile(r"(?<!\\)\\[,;: ]|(?<=[^\s])~|\\q?quad(?![A-Za-z])|[\u00a0\u2002-\u200a\u202f]")
GROUPED = re.compile(r"(?<=[0-9])\s*,?\s*\\!\s*(?=[0-9])")
BRACED_COMMA = re.compile(r"\s*\{\s*,\s*\}\s*")
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s*(?:\\?\$|[€£¥₹])?\s*"
    r"(?:(?P<groups>[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]{0,2}(?: [0-9]{3})+|[0-9]+)(?:\.(?P<part>[0-9]*))?"
    r"|\.(?P<only>[0-9]+))"
)
_DIGITS = re.compile(r"[-+]?[0-9]+")
_DECIMAL_COMMA = re.compile(r"[-+]?[0-9]+,[0-9]+")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"(?<=[0-9])\s*\b({'|'.join(_SCALES)})(?=$|\s[A-Za-z])", re.IGNORECASE)
_PERCENT = re.compile(r"\s*(?:\\?%|\b(?:percent|per cent|percentage|pct)\b\.?)$")
_BASED = re.compile(
    r"\(?(?P<digits>[0-9A-F]+)\)?\s*"
    r"(?:_\s*\{?\s*\(?(?P<below>[0-9]+|[a-z]+)\)?\s*\}?|(?:in )?base[ -]?(?P<word>[0-9]+|[a-z]+))"
)
_BASE_NAMES = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_WORDS = re.compile(r"[A-Za-z][A-Za-z .'’\-]*")
_NO_WORDS = re.compile(r"\b(?:and|or|pi|infinity|inf|sqrt|percent|sin|cos|tan|ln|log|exp)\b", re.IGNORECASE)
_CHOICE = re.compile(
    r"(?:(?i:option|choice)\s+)?(?:\((?P<round>[A-J])\)|(?P<letter>[A-J])(?:[.:)]+|$))(?:\s*(?P<rest>.*))", re.DOTALL
)
_LABELLED = re.compile(r"(?:\\\w+\{)?\([A-J]\)\}?(?:\\?\s)+(?=\S)")
_LONE_LETTER = re.compile(r"\([a-j]\)|[a-j][.)]")
_OTHER_CHOICE = re.compile(r"(?:\b(?:or|and)\b|[,/&])\s*\(?[A-J]\b")


class Quantity(NamedTuple):
    """A decimal number with its unit."""

    digits: str
    """Canonical: a minus sign or none, no superfluous zeros. Not a float or int: answers have a thousand digits."""
    unit: str
    """As `units.split_unit` names it."""
    percent: bool


def compare(answer: str, truth: str) -> bool | None:
    """Verdict where notation decides: the same text, numbers, number bases, words, choices. None: ask the algebra."""
    if answer == truth:
        return True
    if len(answer) > MAX_CHARS or len(truth) > MAX_CHARS:
        return _compare_numbers(answer, truth) if _DIGITS.fullmatch(answer) and _DIGITS.fullmatch(truth) else None
    answer, truth = plain(answer), plain(truth)
    answer = without_label(answer, truth)
    if answer == truth:
        return True
    for rule in (_compare_bases, _compare_numbers, _compare_words, _compare_choices):
        verdict = rule(answer, truth)
        if verdict is not None:
            return verdict
    return None


def plain(text: str) -> str:
    r"""The text without math signs and font commands, spaces as spaces: 10{,}000\text{ cm} is 10,000 cm."""
    text = BRACED_COMMA.sub(",", GROUPED.sub("", text.replace("−", "-").replace("–", "-")))
    text = SPACE.sub(" ", MATH_SIGN.sub("", text.replace("US$", "\\$")).replace("\\$", "$"))
    unwrapped = None
    while unwrapped != text:
        unwrapped, text = text, _FONT.sub(lambda font: f" {font[1]} " if font[1] else "", text)
    return " ".join(text.rstrip("\\ ").split())


def quantity(text: str) -> Quantity | None:
    """The decimal number that a text is, with its unit; None if it is anything else."""
    scale = _SCALE.search(text)
    value, unit = split_unit(text[: scale.start()] + text[scale.end() :] if scale else text)
    number = _PERCENT.sub("", value)
    match = _NUMBER.fullmatch(number)
    if match is None:
        return None
    whole = (match["groups"] or "").replace(",", "").replace(" ", "").lstrip("0") or "0"
    part = match["part"] or match["only"] or ""
    if scale:
        zeros = _SCALES[scale[1].lower()]
        whole, part = (whole + part.ljust(zeros, "0")[:zeros]).lstrip("0") or "0", part[zeros:]
    part = part.rstrip("0")
    digits = f"{whole}.{part}" if part else whole
    return Quantity(f"-{digits}" if match["sign"] == "-" and digits != "0" else digits, unit, number != value)


def _compare_numbers(answer: str, truth: str) -> bool | None:
    """None if only the algebra can tell: 0.33333333 and 1/3, 10% and 0.1."""
    left, right = quantity(answer), quantity(truth)
    if left is None or right is None:
        return _compare_decimal_commas(answer, truth)
    if conflict(left.unit, right.unit):
        return False
    if left.digits == right.digits:
        return True
    return None if "." in left.digits + right.digits else False


def _compare_decimal_commas(answer: str, truth: str) -> bool | None:
    """1000,99 is 1000.99 where the other side has a decimal point: alone it may be a list of two."""
    for comma, point, digits in ((answer, truth, 1), (truth, answer, 2)):  # a truth such as 2,3 is a list
        if _DECIMAL_COMMA.fullmatch(comma) and len(comma.partition(",")[2]) >= digits and "." in point:
            left, right = quantity(comma.replace(",", ".")), quantity(point)
            return left is not None and right is not None and left.digits == right.digits or None
    return None


def _compare_bases(answer: str, truth: str) -> bool | None:
    """204_5 is neither 204_7 nor 204; decimal numbers may say so: 54_{10} is 54."""
    left, right = _based(answer), _based(truth)
    if left and right:
        return left == right
    based = left or right
    other = quantity(truth if left else answer) if based else None
    return None if based is None or other is None else based == (other.digits, "10")


def _based(text: str) -> tuple[str, str] | None:
    """Digits and base of a number with its base; None for others, such as the variable A_2."""
    match = _BASED.fullmatch(text)
    if match is None:
        return None
    base = match["below"] or match["word"]
    if base in _BASE_NAMES:
        base = str(2 + _BASE_NAMES.index(base))
    digits = match["digits"].lstrip("0") or "0"
    if base.isdigit() and not all(int(digit, 36) < int(base[:9]) for digit in digits):
        return None
    return digits, base


def _compare_words(answer: str, truth: str) -> bool | None:
    """Words are compared as text, for as products of letters team would equal meat. None unless one side is words."""
    left, right = _words(answer), _words(truth)
    if left and right:
        return left == right
    if (left and quantity(truth)) or (right and quantity(answer)):
        return False
    return None


def _words(text: str) -> str:
    """Words in small letters without spaces and punctuation; "" for other texts, single letters and lists of words."""
    letters = re.sub(r"[ .'’\-]", "", text)
    if len(letters) < 2 or "'" in text[-1:] or _WORDS.fullmatch(text) is None or _NO_WORDS.search(text):
        return ""
    return letters.lower()


def _compare_choices(answer: str, truth: str) -> bool | None:
    """Letters of choices: "C", "(C)", "C: twelve apples" are the same choice; two different texts of it are not."""
    if len(answer) == len(truth) == 1 and (answer + truth).isalpha():
        # Choices of either case; but later small letters are variables, and e is a number.
        return answer == truth or (truth in "ABCDEFGHIJabcd" and answer.upper() == truth.upper())
    left, right = _choice(answer), _choice(truth)
    if left is None or right is None:
        return None
    return left[0] == right[0] and (not left[1] or not right[1] or left[1] == right[1])


def without_label(answer: str, truth: str) -> str:
    r"""The answer without the letter of its choice where the truth has none: \textbf{(C)}\ 12 for 12."""
    labelled = _LABELLED.match(answer)
    return answer[labelled.end() :] if labelled and _choice(plain(truth)) is None else answer


def _choice(text: str) -> tuple[str, str] | None:
    match = _CHOICE.fullmatch(text.upper() if _LONE_LETTER.fullmatch(text) else text)
    if match is None or _OTHER_CHOICE.search(match["rest"]):
        return None
    return match["round"] or match["letter"], match["rest"]
