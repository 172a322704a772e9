"""What every section of the config has in common."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

EvaluationMetric = Literal["eval/accuracy", "eval/greedy_accuracy"]
"""What an evaluation measures (observe.catalog); the larger the better."""


class Section(BaseModel):
    """Frozen and strict: an unknown option, true for a number or an infinite number is a mistake, never converted."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
