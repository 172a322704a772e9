r"""The final answer of a response: its last box or `Answer:`. Microseconds, and linear in the length of the text."""

import re
from itertools import islice

from dapo_megatron.grading.markup import DOLLARS, MAX_ANSWER_CHARS, last_box, stated_value, strip_markup

MAX_TEXT_CHARS = 200_000
"""Only the end of a longer response is read: the last answer is there, and the work is bounded."""
MAX_MARKERS = 50
"""So many `Answer:` without anything behind them are passed over, from the end."""

# As the DAPO recipe (verl, utils/reward_score/math_dapo.py), anywhere in a line; but in lower case only where
# it begins one, because solutions go on with "we check our answer: ...". Opening markup is skipped even over
# a line break, for answers that are displayed below their `Answer:`.
_MARKER = re.compile(rf"[\s*_]*[:：](?:(?!{DOLLARS})[\s*_`$]|\\[\[(])*")
_WORDS = [re.compile(word) for word in ("Answer", "answer", "ANSWER")]  # literals: patterns would take milliseconds
_LINE_BEGIN = re.compile(r"(?:^|\n)[ \t>#*_]*(?:the )?(?:final )?$", re.IGNORECASE)
_LINE_BEGIN_CHARS = 40
# Without any of those: "the answer is 34", "Answer $34$", and a heading "Final Answer" over the value.
_PHRASE = re.compile(
    r"(?: (?:is|equals|should be|=)(?: (?:therefore|thus|then|hence|simply|just))?(?![a-z])|[*_]*[ \t]*\n"
    r"|(?=[*_]*\s*(?:\$|\\[(\[])))[\s*_`:]*"
    rf"(?:(?:\$\$|\\\[)\s*)?(?:(?!{DOLLARS})[ *_`$]|\\\()*",
    re.IGNORECASE,
)
_SPECIAL_TOKEN = re.compile(r"<\|\w{1,40}\|>|</s>")
_NESTING = re.compile(r"\\[{}]|(?P<open>\\begin\b|\\\[|\{)|(?P<close>\\end\b|\\\]|\})|(?P<line>\n)")


def without_thought(text: str, thinking: tuple[str, str]) -> str | None:
    """What follows the last closing tag; None while a thought is unfinished. The prompt may have opened the first."""
    opening, closing = thinking
    _, closed, said = text.rpartition(closing)
    return said if closed and opening not in said else None


def extract_answer(text: str, boxed_only: bool = False) -> str | None:
    r"""The final answer of a response without its markup, or None if it gives none.

    What comes last counts: the last \boxed{} (with those it is joined to by "and", "or" or commas), or the last
    `Answer:` that is followed by something; without both, the last "the answer is". Linear in the length of the text.

    Args:
        boxed_only: only a box counts.
    """
    text = _SPECIAL_TOKEN.sub("", text[-MAX_TEXT_CHARS:])
    box = last_box(text)
    words: list[re.Match[str]] = []
    if not boxed_only:
        words = sorted((match for word in _WORDS for match in word.finditer(text)), key=re.Match.start, reverse=True)
    for begin in islice(filter(None, (_after_marker(text, word) for word in words)), MAX_MARKERS):
        if box and begin <= box[0]:
            break
        answer = stated_value(_displayed(text, begin))
        if answer:
            return answer
    if box:
        return strip_markup(box[1]) or None
    for begin in islice(filter(None, (_after_phrase(text, word) for word in words)), 1):
        return stated_value(_displayed(text, begin)) or None
    return None


def _after_marker(text: str, word: re.Match[str]) -> int | None:
    """Where the value behind `Answer:` begins; None if that word is no marker."""
    before = text[max(0, word.start() - _LINE_BEGIN_CHARS) : word.start()]
    whole_word = not (before[-1:].isalnum() or before[-1:] == "_")
    begins_line = (len(before) < _LINE_BEGIN_CHARS or "\n" in before) and _LINE_BEGIN.search(before) is not None
    if not begins_line and not (whole_word and word[0] != "answer"):
        return None
    marker = _MARKER.match(text, word.end())
    return marker.end() if marker else None


def _after_phrase(text: str, word: re.Match[str]) -> int | None:
    phrase = _PHRASE.match(text, word.end())
    return phrase.end() if phrase else None


def _displayed(text: str, begin: int) -> str:
    """The line that begins there; with further ones while braces or environments (matrices) are open."""
    depth = 0
    for token in _NESTING.finditer(text, begin, begin + MAX_ANSWER_CHARS + 1):
        if token["open"]:
            depth += 1
        elif token["close"]:
            depth -= 1
        elif token["line"] and depth <= 0:
            return text[begin : token.start()]
    line_end = text.find("\n", begin)
    if depth <= 0 or line_end < 0 or len(text) - begin <= MAX_ANSWER_CHARS:
        return text[begin:]
    return text[begin:line_end]
