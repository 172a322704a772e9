"""The documentation of every option, for `dapo-megatron config --explain` and for errors."""

from typing import Any

from pydantic import BaseModel

from dapo_megatron.config.run import RunConfig


def fields(section: type[BaseModel] = RunConfig, prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted name, type, documentation) of every option, in the order of RunConfig."""
    rows: list[tuple[str, str, str]] = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            rows += fields(kind, f"{prefix}{name}.")
        else:
            text = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
            rows.append((prefix + name, text, field.description or ""))
    return rows


def value_of(config: RunConfig, dotted: str) -> Any:
    """The value of one option by its dotted name."""
    value: Any = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value
