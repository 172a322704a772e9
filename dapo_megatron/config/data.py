"""Where prompts come from and how they are worded."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dapo_megatron.config.base import Section

Paths = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    Field(min_length=1),
]
"""One path or a list of them; a list once it is read."""


class DataConfig(Section):
    train: Paths
    """Training prompts, a path or a list: .jsonl, .json (also .gz), .parquet, a folder of shards, a saved dataset."""
    eval: Paths | None = None
    """Held-out prompts for the periodic evaluation, as for training; null switches it off."""
    prompt_field: str = "prompt"
    """Field with the question (dotted path; a list of chat messages is accepted)."""
    answer_field: str = "answer"
    """Field with the ground truth (dotted path): text, a number, or a list of which any is right."""
    answer_pattern: str | None = None
    """Regular expression with one group that cuts the ground truth out of the field (GSM8K: '#### (.+)')."""
    template: str = "dapo"
    """Name of a ready template (dapo, boxed, plain) or a string with {prompt}; with boxed, only a box is an answer."""
    chat: bool = True
    """Wrap the prompt in the tokenizer's chat template."""
    system_prompt: str | None = Field(None, min_length=1)
    """System message that goes before every question; null: none but the chat template's own."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables of the tokenizer's chat template, such as {enable_thinking: false} for Qwen3."""
    max_prompt_tokens: int = Field(2048, ge=1)
    """Longest prompt in tokens."""
    too_long: Literal["drop", "error"] = "drop"
    """What happens to a longer prompt: dropped and counted, or an error."""
    shuffle: bool = True
    """Shuffle the prompts anew every epoch (by run.seed)."""
    eval_limit: int | None = Field(None, ge=1)
    """Use only the first eval_limit held-out prompts."""
