r"""From a stretch of a response to the value it states: boxes, surrounding markup, and sentences around a value."""

import re

MAX_ANSWER_CHARS = 10_000
"""What is longer is no final answer."""

DOLLARS = r"\$[0-9][0-9.,]*+(?![^\n]{0,100}\$)[^\S\n]*(?:[A-Za-z*.\n]|$)"
"""A dollar sign before a number that is no math sign, as none follows that would close it."""

_DOLLARS = re.compile(DOLLARS)
_BRACE = re.compile(
    r"\\[{}]|\\(?:boxed|fbox)(?![A-Za-z]{2})\s*(?:(?P<boxed>\{)|(?P<bare>[-+]?[0-9][0-9.,/]*|[A-Z]\b))"
    r"|(?P<open>\{)|(?P<close>\})"
)
_BOX = re.compile(r"\\(?:boxed|fbox)")
_BETWEEN_BOXES = re.compile(r"\\[,;:! ()\[\]]|\\q?quad|\\text|[\s$~{}.&\\]")
_JOINED = {",", ";", "and", "or", ",and", ",or"}
_WRAPPERS = (("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_BOLD = re.compile(r"(?<!\S)\*\*(?=[^\s*])([^*]*[^\s*])\*\*(?![\w*])")
_BOLD_END = re.compile(r"(?<=[\w}$])\*\*(?=\s+[A-Za-z]|[.,]|$)")

# A sentence around a value: "The largest value is 34", "Hence $x \geq 5$ is the solution", "34. I hope it is correct".
_MATH = re.compile(
    r"\$\$([^$]+)\$\$|(?<![\\$])\$((?:[^$\n\\]|\\[^\n])+)\$|\\\(((?:[^\n\\]|\\(?![()\n]))+)\\\)"
    r"|\\\[((?:[^\\]|\\(?![\[\]]))+)\\\]"
)
_COPULA = re.compile(
    r"\b(?:is|are|be|equals?|it's|becomes|gives|yields|we (?:have|get|obtain|find))\b(?: equal to\b)?"
    r"(?: (?:therefore|thus|then|hence|simply|just|indeed|exactly)\b)?:?\s*",
    re.IGNORECASE,
)
_REMARK = re.compile(r"\$?[,;]\s+(?=[a-z]{2})")
_SUBJECT = re.compile(r"(?:the|our|my) ", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[^\s.])[.。]\**\s+(?=[A-Z])")
_COMMAND = re.compile(r"\\[A-Za-z]+(?:\s*\{[A-Za-z ]*\})?")
_WORD = re.compile(r"[A-Za-z]{2,}")
_VALUE_BEGINS = re.compile(r"[-+−]?\s*[0-9.$\\(\[{√π€£¥₹]|[B-Zb-z]\b")
_FEW_WORDS = re.compile(r"[A-Za-z]+(?: [A-Za-z]+){0,2}")
_NO_VALUE = re.compile(r"(?:the|an|in|to|of|as|our|my|this|that|these|correct|found|obtained|given)\b", re.IGNORECASE)
# What makes a statement no single one: nothing must be picked out of it.
_HEDGE = re.compile(r"\b(?:or|either|maybe|perhaps|possibly|probably|alternatively|unless)\b", re.IGNORECASE)
_MAY = re.compile(r"\b(?:may|might|could|must not|cannot) $", re.IGNORECASE)
_NOT = re.compile(r"\b(?:not|wrong|incorrect|false|and|but)\b|n't\b", re.IGNORECASE)
_LINK = re.compile(r"\b(?:and|but)\b", re.IGNORECASE)
_RETRACTION = re.compile(r"(?:or|but|no|not|wait|actually|alternatively|maybe|perhaps|however)\b", re.IGNORECASE)


def strip_markup(answer: str) -> str:
    r"""The answer without surrounding Markdown, quotes, $, \( \), \[ \], \boxed{} and final period.

    Empty if nothing is left, or if it is longer than `MAX_ANSWER_CHARS`.
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return ""
    stripped = None
    while stripped != answer:
        stripped = answer
        answer = _without_quotes(
            answer.strip().strip('*_`"“”').rstrip(",;").removesuffix(".").removesuffix("。").strip()
        )
        if _DOLLARS.match(answer):
            answer = "\\" + answer
        for opening, closing in _WRAPPERS:
            # Each half by itself: the opening one may be skipped already, the closing one on the next line. But the
            # closing one of a formula inside of a sentence stays with it.
            begun = answer.removeprefix(opening)
            if begun != answer or opening not in (answer.rstrip("$") if closing == "$" else answer):
                answer = begun if begun.endswith("\\" + closing) else begun.removesuffix(closing)
        if answer.startswith(("\\boxed", "\\fbox")):
            outer = answer
            for begin, end, inside in reversed(boxes(outer)):  # a box in a box in a box, in one pass
                answer = inside if outer[begin:end] == answer else answer
    return answer


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(begin, end, inside) of every balanced \boxed{} or \fbox{} that is not empty, by their end.

    Also \boxed 7, which boxes a number or a capital. One pass: unclosed ones are passed over.
    """
    first = _BOX.search(text)
    if first is None:
        return []
    found: list[tuple[int, int, str]] = []
    opened: list[tuple[int, int] | None] = []  # begin of a \boxed{ and of its inside, None for other braces
    for token in _BRACE.finditer(text, first.start()):
        if token["boxed"]:
            opened.append((token.start(), token.end()))
        elif token["bare"]:
            found.append((token.start(), token.end(), token["bare"]))
        elif token["open"]:
            opened.append(None)
        elif token["close"] and opened:
            begin = opened.pop()
            # The inside of a box of boxes would be copied once for every level.
            if begin is not None and token.start() - begin[1] <= MAX_ANSWER_CHARS:
                found.append((begin[0], token.end(), text[begin[1] : token.start()].strip()))
    return [box for box in found if box[2]]


def last_box(text: str) -> tuple[int, str] | None:
    r"""Where the last box begins, and what it says. Boxes joined by "and", "or" or commas are one list of answers."""
    found = boxes(text)
    if not found:
        return None
    begin, end, inside = found.pop()
    parts = [inside]
    for box in reversed(found):
        if box[0] >= begin:
            continue  # inside the one that was taken
        between = text[box[1] : begin]
        if len(between) > 40 or _BETWEEN_BOXES.sub("", between) not in _JOINED:
            break
        begin = box[0]
        parts.insert(0, box[2])
    return begin, ", ".join(parts)


def stated_value(sentence: str) -> str:
    """The value that a sentence states; the sentence itself if it is a value, states none, or hedges ("34 or 35")."""
    formulas = list(_MATH.finditer(sentence[:MAX_ANSWER_CHARS]))
    before = sentence[: formulas[0].start()] if len(formulas) == 1 else ""
    formula = next(filter(None, formulas[0].groups())) if formulas else ""
    sentence = strip_markup(_BOLD_END.sub("", _BOLD.sub(r"\1", sentence)))
    if not _has_words(sentence):
        return sentence
    first, *others = _SENTENCE_END.split(sentence, maxsplit=1)
    if _HEDGE.search(first) or (others and _RETRACTION.match(others[0])):
        return sentence
    if others and not _has_words(first):
        return strip_markup(first)
    said = ""
    copulas = list(_COPULA.finditer(first))
    if copulas and not (len(copulas) > 1 and _LINK.search(first)) and not _MAY.search(first[: copulas[-1].start()]):
        said = strip_markup(first[copulas[-1].end() :])
        if _VALUE_BEGINS.match(said) and not _NOT.search(said):
            return strip_markup(_REMARK.split(said, maxsplit=1)[0])
        subject = first[: copulas[0].start()].strip()
        if len(copulas) == 1 and _SUBJECT.match(said) and not _has_words(subject) and not _NOT.search(said):
            return strip_markup(subject)
    if _has_words(before) and not _NOT.search(first):
        return strip_markup(formula)
    if _FEW_WORDS.fullmatch(said) and not _NO_VALUE.match(said) and not _NOT.search(said):
        return said
    return sentence


def _has_words(text: str) -> bool:
    return _WORD.search(_COMMAND.sub(" ", text)) is not None


def _without_quotes(answer: str) -> str:
    """Single quotes only in pairs: the one of f' is a prime."""
    return answer[1:-1] if len(answer) > 1 and answer[0] == answer[-1] == "'" else answer
