"""Mathematical equality of two answers, as math-verify sees it. Imports sympy: for workers only."""

from math_verify import parse, verify

from dapo_megatron.grading.answers import strip_markup


def equivalent(answer: str, truth: str) -> bool:
    r"""Whether an extracted answer equals the truth: \frac{1}{2} and 0.5, (x+1)^2 and x^2+2x+1, 10 cm and 10.

    May need unbounded time and memory; math-verify's own time limits are off, because they need the main
    thread, and the limits of the worker also hold for what does not return to Python.
    """
    gold, target = (parse(rf"\boxed{{{side}}}", parsing_timeout=None) for side in (strip_markup(truth), answer))
    return bool(verify(gold, target, timeout_seconds=None))
