"""What becomes of a graded group, where some of its responses have no verdict."""

import pytest

from dapo_megatron.records import Group, Prompt
from dapo_megatron.rollout.selection import fate_of
from tests.tiny import response, run_config

PROMPT = Prompt(id="p", input_ids=[1], ground_truth="", text="", row=0)


def group(*verdicts):
    responses = [response("p", i, [1], verdict=verdict) for i, verdict in enumerate(verdicts)]
    return Group(0, PROMPT, responses)


@pytest.mark.parametrize(
    ("verdicts", "as_wrong", "masked"),
    [
        (("right", "wrong"), "kept", "kept"),
        (("right", "right"), "all_right", "all_right"),
        (("wrong", "wrong"), "all_wrong", "all_wrong"),
        (("right", "unknown"), "kept", "all_right"),
        (("unknown", "right", "right"), "kept", "all_right"),
        (("wrong", "unknown"), "all_wrong", "all_wrong"),
        (("unknown", "unknown"), "all_wrong", "all_wrong"),
        (("right", "unknown", "wrong"), "kept", "kept"),
    ],
)
def test_an_answer_without_a_verdict_is_wrong_or_does_not_count(tmp_path, verdicts, as_wrong, masked):
    assert fate_of(group(*verdicts), run_config(tmp_path)) == as_wrong
    assert fate_of(group(*verdicts), run_config(tmp_path, grading={"unknown": "mask"})) == masked
    assert fate_of(group(*verdicts), run_config(tmp_path, algorithm={"dynamic_sampling": False})) == "kept"
