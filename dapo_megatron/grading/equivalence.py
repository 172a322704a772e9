"""Mathematical equality of two answers, as math-verify sees it. Imports sympy: for workers only."""

import re
from typing import TypeAlias

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, Equality, Expr, FiniteSet, Float, Interval, MatrixBase, N, Tuple, solve

from dapo_megatron.grading.extraction import extract_answer
from dapo_megatron.grading.latex import to_latex
from dapo_megatron.grading.markup import stated_value
from dapo_megatron.grading.notation import compare, plain, without_label
from dapo_megatron.grading.units import conflict, split_unit

_TURNED = re.compile(r"\A([^=<>]*[0-9][^=<>]*)=\s*([A-Za-z])\s*\Z")
_SEPARATOR = re.compile(r"[(\[{]|[)\]}]|;|,(?![0-9]{3}(?![0-9]))|(?:\\text\s*\{\s*|\b)and(?:\s*\}|\b)")
_SET = re.compile(r"\s*[{(]|.*\\{", re.DOTALL)
_PERCENT = re.compile(r"\\?%")
# Only what is in the box, as LaTeX: the library's other readings pick a number out of a text ("12 (or 34)").
# Its units are off because they include the letters c, d, g, h, l, m, o, s, t: 2h would be 2.
_WHOLE = [
    LatexExtractionConfig(
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="last"),
    )
]
_ABSOLUTE, _RELATIVE = 1e-6, 1e-14

Value: TypeAlias = Basic | MatrixBase | str


def equivalent(answer: str, truth: str) -> bool:
    r"""Whether an answer equals the truth: \frac{1}{2} and 0.5, 10 cm and 10, {1, 2} and 2, 1.

    Either may stand in a sentence or in a whole solution, as in `extraction.extract_answer`.

    May need unbounded time and memory; math-verify's own time limits are off, because they need the main
    thread, and the limits of the worker also hold for what does not return to Python.
    """
    answer, truth = (extract_answer(side) or stated_value(side) for side in (answer, truth))
    verdict = compare(answer, truth)
    if verdict is not None:
        return verdict
    answer = without_label(answer, truth)
    (answer, answer_unit), (truth, truth_unit) = _split(answer), _split(truth)
    if conflict(answer_unit, truth_unit):
        return False
    answer, truth = to_latex(_TURNED.sub(r"\2=\1", answer)), to_latex(_TURNED.sub(r"\2=\1", truth))
    repeated = _same_repeated(answer, truth)
    if repeated is not None:
        return repeated
    if ("%" in answer) != ("%" in truth) and _same(_PERCENT.sub("", answer), _PERCENT.sub("", truth)):
        return True  # 12.5% and 12.5; the library sees that it is 0.125 too
    return _same(answer, truth)


def _split(text: str) -> tuple[str, str]:
    """Without its unit, if it has one; the value keeps its font commands where there is none."""
    value, unit = split_unit(plain(text))
    return (value, unit) if unit else (text, "")


def _same(answer: str, truth: str) -> bool:
    gold, target = (
        parse(rf"\boxed{{{side}}}", _WHOLE, extraction_mode="first_match", parsing_timeout=None)
        for side in (truth, answer)
    )
    if not gold or not target:
        return False
    left, right = _numbers(gold[0]), _numbers(target[0])
    if isinstance(target[0], Equality) and not target[0].free_symbols and not _close(*map(_numbers, target[0].args)):
        return False  # of 35 = 34, the library would take the right side
    if len(left) == len(right) == 1 and any(
        isinstance(side, Expr) and side.has(Float) for side in (gold[0], target[0])
    ):
        return _close(left, right)
    if not verify(gold, target, timeout_seconds=None):
        return False
    if _is_equation(gold[0]) and _is_equation(target[0]) and gold[0] != target[0] and solve(gold[0]) == []:
        return False  # to the library, all equations without a solution are equal
    return len(left) != len(right) or _close(left, right)  # other lengths: other notations of the same


def _same_repeated(answer: str, truth: str) -> bool | None:
    """Whether lists, outside of braces, agree with multiplicity; None where nothing is repeated.

    To the library a list is a set: 1, 2, 2 would be 1, 2. But 34 or 34 is 34.
    """
    left, right = _listed(answer), _listed(truth)
    if _SET.match(answer) or _SET.match(truth) or all(len(set(parts)) == len(parts) for parts in (left, right)):
        return None
    if len(left) != len(right):
        return False
    for part in left:
        found = part if part in right else next((other for other in right if _same(part, other)), None)
        if found is None:
            return False
        right.remove(found)
    return True


def _listed(text: str) -> list[str]:
    """The parts between commas, semicolons and "and" that stand in no brackets, without spaces."""
    parts, depth, begin = [], 0, 0
    for token in _SEPARATOR.finditer(text):
        if token[0] in "([{":
            depth += 1
        elif token[0] in ")]}":
            depth -= 1
        elif depth == 0:
            parts.append(text[begin : token.start()])
            begin = token.end()
    parts.append(text[begin:])
    return ["".join(part.split()) for part in parts if part.strip()]


def _is_equation(value: Value) -> bool:
    return isinstance(value, Equality) and bool(value.free_symbols)


def _numbers(value: Value) -> list[Float]:
    """The real numbers that a value is, or is a set, tuple, interval or matrix of, in order of size."""
    if isinstance(value, MatrixBase):
        parts = value.flat()
    else:
        parts = value.args if isinstance(value, FiniteSet | Tuple | Interval) else [value]
    return sorted(N(part, 30) for part in parts if isinstance(part, Expr) and part.is_comparable and part.is_finite)


def _close(left: list[Float], right: list[Float]) -> bool:
    """Whether numbers agree to 6 decimals, below 0.1 to 5 digits, and as floats can where they are huge.

    The library compares 6 decimals: 2e-19, 1.6e-19 and 0 are the same to it, 6.02e23 and its digits are not.
    """
    if len(left) != len(right):
        return False
    pairs = [(a, b, max(abs(a), abs(b))) for a, b in zip(left, right, strict=True)]
    return all(abs(a - b) <= max(_ABSOLUTE * min(1, 10 * size), _RELATIVE * size) for a, b, size in pairs)
