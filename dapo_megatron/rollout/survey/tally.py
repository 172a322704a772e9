"""What generated groups amount to, for whoever looks at data and grader before a training. Pure."""

import math
from collections import Counter
from collections.abc import Sequence

from dapo_megatron.config import RunConfig
from dapo_megatron.records import Group
from dapo_megatron.rollout.selection import outcome_of

Row = tuple[str, str]
"""What, and how much of it."""


class Tally:
    """Counts groups, and forgets them."""

    def __init__(self, config: RunConfig):
        self._config = config
        self.lengths: list[int] = []
        """Tokens of each response."""
        self.outcomes: Counter[str] = Counter()
        """Of the groups: mixed, all_right, all_wrong."""
        self.verdicts: Counter[str | None] = Counter()
        self.truncated = 0
        self.rewards = 0.0

    def add(self, group: Group) -> None:
        """Count a graded and scored group."""
        self.outcomes[outcome_of(group, self._config)] += 1
        for response in group.responses:
            self.lengths.append(len(response.token_ids))
            self.verdicts[response.verdict] += 1
            self.truncated += response.finish_reason == "length"
            self.rewards += response.reward

    @property
    def groups(self) -> int:
        """Counted so far."""
        return self.outcomes.total()

    @property
    def tokens(self) -> int:
        """Of all responses."""
        return sum(self.lengths)

    @property
    def accuracy(self) -> float:
        """Share of the responses that are right."""
        return self.verdicts["right"] / len(self.lengths)

    def rows(self, seconds: float) -> list[Row]:
        """The report.

        Args:
            seconds: from the first request to the last verdict.
        """
        n, wanted = len(self.lengths), self._config.rollout.prompts_per_step
        mixed, limit = self.outcomes["mixed"], self._config.rollout.max_response_tokens
        parts = [(f"p{q}", quantile(self.lengths, q / 100)) for q in (50, 90, 99)]
        rows = [
            ("prompts", f"{self.groups}, {self._config.rollout.group_size} responses each"),
            ("accuracy", f"{self.accuracy:.1%} of responses"),
            ("prompts with a right response", self._share(self.groups - self.outcomes["all_wrong"])),
            ("mixed groups (what DAPO trains)", self._share(mixed)),
            ("all right", self._share(self.outcomes["all_right"])),
            ("all wrong", self._share(self.outcomes["all_wrong"])),
            ("mean reward", f"{self.rewards / n:.3f}"),
            ("response length, mean", f"{self.tokens / n:.0f} tokens"),
            ("response length", ", ".join(f"{name} {length}" for name, length in parts) + f", max {max(self.lengths)}"),
            ("truncated", f"{self.truncated / n:.1%} of responses, at {limit} tokens"),
            ("without a verdict", f"{self.verdicts['unknown']} responses"),
            ("generated", f"{self.tokens} tokens in {seconds:.1f} s, {self.tokens / seconds:.0f} tokens/s"),
        ]
        if mixed:
            needed = math.ceil(wanted * self.groups / mixed)
            rows.append(("a step needs", f"about {needed} groups for {wanted} mixed ones"))
        return rows

    def _share(self, groups: int) -> str:
        return f"{groups / self.groups:.1%} ({groups})"


def quantile(values: Sequence[int], share: float) -> int:
    """The smallest value that at least `share` of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
