import json
import math

from dapo_megatron.observe.samples import SampleWriter, read_samples
from dapo_megatron.records import Group, Prompt, VersionSpan
from dapo_megatron.run_folder import RunFolder
from tests.tiny import response


def make_group(verdicts, text="4", advantage=0.5):
    prompt = Prompt(id="file:7", input_ids=[1], ground_truth="4", text="2 + 2?", row=7)
    responses = [
        response(
            "file:7",
            i,
            [1, 2, 3],
            version_spans=[VersionSpan(4, 0, 1), VersionSpan(5, 1, 3)],
            finish_reason="length",
            text=text,
            verdict=verdict,
            accuracy_reward=1.0,
            overlong_penalty=-0.25,
            advantage=advantage,
        )
        for i, verdict in enumerate(verdicts)
    ]
    return Group(order=0, prompt=prompt, responses=responses)


def test_a_group_is_kept_with_all_that_was_decided_about_it(tmp_path):
    SampleWriter(RunFolder(tmp_path), resume_step=None).write(3, [make_group(["right", "unknown"])])

    (group,) = read_samples(RunFolder(tmp_path))
    assert group["step"] == 3 and group["prompt_id"] == "file:7" and group["prompt"] == "2 + 2?"
    assert group["ground_truth"] == "4" and group["outcome"] == "mixed"
    assert group["responses"][1] == {
        "text": "4",
        "verdict": "unknown",
        "accuracy_reward": 1.0,
        "overlong_penalty": -0.25,
        "advantage": 0.5,
        "tokens": 3,
        "finish_reason": "length",
        "versions": [4, 5],
    }


def test_hostile_text_comes_back_unchanged(tmp_path):
    text = "line\nline\r\u2028\x00</script>\ud800 \U0001f600"
    SampleWriter(RunFolder(tmp_path), resume_step=None).write(0, [make_group(["wrong"], text, math.nan)])

    (group,) = read_samples(RunFolder(tmp_path))
    assert group["responses"][0]["text"] == text and group["responses"][0]["advantage"] is None
    assert group["outcome"] == "all_wrong"
    json.loads((tmp_path / "samples.jsonl").read_text())


def test_resume_cuts_later_steps(tmp_path):
    writer = SampleWriter(RunFolder(tmp_path), resume_step=None)
    for step in (1, 2, 3):
        writer.write(step, [make_group(["right"])] * 2)
    SampleWriter(RunFolder(tmp_path), resume_step=2).write(3, [make_group(["right"])])
    assert [group["step"] for group in read_samples(RunFolder(tmp_path))] == [1, 1, 2, 2, 3]
