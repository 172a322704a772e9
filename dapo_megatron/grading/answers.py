r"""The default grader: the last `Answer:` line, otherwise the last \boxed{}, against the ground truth.

Extraction and the comparison of integers take microseconds and need no library; everything else is asked of
math-verify, which may run for ever on a hostile answer: call `grade` in a worker (see `pool`).
"""

import re

MAX_TEXT_CHARS = 200_000
"""Only the end of a longer response is read: the last answer is there, and the work is bounded."""
MAX_ANSWER_CHARS = 10_000
"""What is longer is no final answer."""

# As the DAPO recipe (verl, utils/reward_score/math_dapo.py), anywhere in a line; but in lower case only where
# it begins one, because solutions go on with "we check our answer: ...". Opening markup is skipped even over
# a line break, for answers that are displayed below their `Answer:`.
_ANSWER = re.compile(
    r"(?:(?i:^[ \t>#*_]*(?:the )?(?:final )?answer)|\bA(?:nswer|NSWER))[\s*_]*[:：](?:[\s*_`$]|\\[\[(])*",
    re.MULTILINE,
)
_BRACE = re.compile(r"\\[{}]|(?P<boxed>\\boxed\s*\{)|(?P<open>\{)|(?P<close>\})")
_INTEGER = re.compile(r"(?P<sign>[+-]?)(?:\\?\$)?(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.0*)?")
_WRAPPERS = (("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


def extract_answer(text: str) -> str | None:
    r"""The final answer of a response without its markup, or None if it gives none.

    The last `Answer:` that is followed by something counts, and within its line the last \boxed{}; without
    one, the last balanced \boxed{} of the text. Linear in the length of the text.
    """
    text = text[-MAX_TEXT_CHARS:]
    for match in reversed(list(_ANSWER.finditer(text))):
        line_end = text.find("\n", match.end())
        line = text[match.end() : line_end if line_end >= 0 else len(text)]
        answer = strip_markup(_last_boxed(line) or line)
        if answer:
            return answer
    return strip_markup(_last_boxed(text) or "") or None


def strip_markup(answer: str) -> str:
    r"""The answer without surrounding Markdown, quotes, $, \( \), \[ \], \boxed{} and final period.

    Empty if nothing is left, or if it is longer than `MAX_ANSWER_CHARS`.
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return ""
    stripped = None
    while stripped != answer:
        stripped = answer
        answer = answer.strip().strip("*_`\"'“”").removesuffix(".").strip()
        for opening, closing in _WRAPPERS:
            # Each half by itself: the opening one may be skipped already, the closing one on the next line.
            answer = answer.removeprefix(opening).removesuffix(closing)
        if answer.startswith(r"\boxed") and answer.endswith("}"):
            inside = _last_boxed(answer)
            answer = inside if inside is not None and answer.endswith(f"{{{inside}}}") else answer
    return answer


def _last_boxed(text: str) -> str | None:
    r"""Inside of the balanced \boxed{} that ends last, in one pass: unclosed ones are passed over."""
    last = None
    open_braces: list[int | None] = []  # where the inside of a \boxed{ begins, None for other braces
    for token in _BRACE.finditer(text):
        if token["boxed"]:
            open_braces.append(token.end())
        elif token["open"]:
            open_braces.append(None)
        elif token["close"] and open_braces:
            begin = open_braces.pop()
            if begin is not None:
                last = (begin, token.start())
    return text[slice(*last)] if last else None


def compare_quickly(answer: str, truth: str) -> bool | None:
    """Verdict where it is cheap: the same text, or two integers. None: ask
    `equivalence.equivalent`."""
    truth = strip_markup(truth)
    return True if answer == truth else grade_integers(answer, truth)


def grade_integers(answer: str, truth: str) -> bool | None:
    """Whether two integers (34, +34, 34.0, $34$, 1,234) are equal; None unless both are integers."""
    left, right = _integer(answer), _integer(truth)
    return None if left is None or right is None else left == right


def _integer(answer: str) -> str | None:
    """Canonical decimal digits. Not an int: a million digits would take quadratic time (or raise)."""
    plain = strip_markup(answer).replace("{,}", ",").replace(r"\!", "").replace("−", "-")
    match = _INTEGER.fullmatch(plain)
    if match is None:
        return None
    digits = match["digits"].replace(",", "").lstrip("0") or "0"
    return f"-{digits}" if match["sign"] == "-" and digits != "0" else digits


def grade(text: str, truth: str) -> bool:
    """Whether the final answer of the response `text` equals `truth`; a missing answer is wrong."""
    answer = extract_answer(text)
    if answer is None:
        return False
    quick = compare_quickly(answer, truth)
    if quick is not None:
        return quick
    # Imported here: the caller of the workers, who only extracts and compares integers, does without sympy.
    from dapo_megatron.grading.equivalence import equivalent

    return equivalent(answer, strip_markup(truth))
