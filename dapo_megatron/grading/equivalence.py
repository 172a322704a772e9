"""Mathematical equality of two answers, as math-verify sees it. Imports sympy: for workers only."""

from math_verify import parse, verify


def equivalent(answer: str, truth: str) -> bool:
    r"""Whether an answer equals the truth, both without markup: \frac{1}{2} and 0.5, 10 cm and 10.

    May need unbounded time and memory; math-verify's own time limits are off, because they need the main
    thread, and the limits of the worker also hold for what does not return to Python.
    """
    gold, target = (parse(rf"\boxed{{{side}}}", parsing_timeout=None) for side in (truth, answer))
    return bool(verify(gold, target, timeout_seconds=None))
