r"""The default grader: the last box or `Answer:` of a response against the ground truth.

Extraction and the comparison of numbers and words take microseconds and need no library; everything else is asked
of math-verify, which may run for ever on a hostile answer: call `grade` in a worker (see `pool`).
"""

from dapo_megatron.grading.extraction import extract_answer
from dapo_megatron.grading.markup import stated_value
from dapo_megatron.grading.notation import compare


def compare_quickly(answer: str, truth: str) -> bool | None:
    """Verdict where it is cheap, by notation alone. None: ask `equivalence.equivalent`."""
    return compare(answer, stated_value(truth))


def grade(text: str, truth: str) -> bool:
    """Whether the final answer of the response `text` equals `truth`; a missing answer is wrong."""
    answer = extract_answer(text)
    if answer is None:
        return False
    quick = compare_quickly(answer, truth)
    if quick is not None:
        return quick
    # Imported here: the caller of the workers, who only extracts and compares notation, does without sympy.
    from dapo_megatron.grading.equivalence import equivalent

    return equivalent(answer, truth)
