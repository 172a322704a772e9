"""Sampled responses kept for a person to read: samples.jsonl, one group a line.

A line is {step, prompt_id, prompt, ground_truth, outcome: mixed | all_right | all_wrong, responses: [{text,
verdict, accuracy_reward, overlong_penalty, advantage, tokens, finish_reason, versions}]}, where `versions` are
the policy versions that sampled the response.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from dapo_megatron.algorithm.dynamic_sampling import group_outcome
from dapo_megatron.observe.jsonl import append_line, cut_after, read_lines
from dapo_megatron.records import Group, Response
from dapo_megatron.run_folder import RunFolder


class SampleWriter:
    """Writes the sampled responses of one run; one process of the run owns it."""

    def __init__(self, folder: RunFolder, *, resume_step: int | None):
        """Open the history at `resume_step`, as `MetricsWriter` does."""
        self._path = folder.samples
        self._path.parent.mkdir(parents=True, exist_ok=True)
        cut_after(self._path, resume_step)

    def write(self, step: int, groups: Sequence[Group]) -> None:
        """Append the groups of one step; their verdicts, rewards and advantages are as they are now."""
        for group in groups:
            append_line(self._path, group_row(step, group))


def group_row(step: int, group: Group) -> dict[str, Any]:
    """The line of one group."""
    return {
        "step": step,
        "prompt_id": group.prompt.id,
        "prompt": group.prompt.text,
        "ground_truth": group.prompt.ground_truth,
        "outcome": group_outcome([response.verdict for response in group.responses]),
        "responses": [_row(response) for response in group.responses],
    }


def read_samples(folder: RunFolder) -> Iterator[dict[str, Any]]:
    """Groups in the order they were written, one at a time (the file may be larger than memory)."""
    return read_lines(folder.samples)


def _row(response: Response) -> dict[str, Any]:
    return {
        "text": response.text,
        "verdict": response.verdict,
        "accuracy_reward": response.accuracy_reward,
        "overlong_penalty": response.overlong_penalty,
        "advantage": response.advantage if math.isfinite(response.advantage) else None,
        "tokens": len(response.token_ids),
        "finish_reason": response.finish_reason,
        "versions": sorted({span.version for span in response.version_spans}),
    }
