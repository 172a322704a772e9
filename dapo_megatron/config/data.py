"""Where prompts come from and how they are worded."""

from typing import Literal

from pydantic import Field

from dapo_megatron.config.base import Section


class DataConfig(Section):
    train: str = Field(min_length=1)
    """Training prompts: a .jsonl or .parquet file or a Hugging Face dataset folder."""
    eval: str | None = Field(None, min_length=1)
    """Held-out prompts for the periodic evaluation; null switches it off."""
    prompt_field: str = "prompt"
    """Field with the question (dotted path; a list of chat messages is accepted)."""
    answer_field: str = "answer"
    """Field with the ground truth (dotted path)."""
    answer_pattern: str | None = None
    """Regular expression with one group that cuts the ground truth out of the field (GSM8K: '#### (.+)')."""
    template: str = "dapo"
    """Name of a ready template (dapo, boxed, plain) or a string with {prompt}; with boxed, only a box is an answer."""
    chat: bool = True
    """Wrap the prompt in the tokenizer's chat template."""
    max_prompt_tokens: int = Field(2048, ge=1)
    """Longest prompt in tokens."""
    too_long: Literal["drop", "error"] = "drop"
    """What happens to a longer prompt: dropped and counted, or an error."""
    shuffle: bool = True
    """Shuffle the prompts anew every epoch (by run.seed)."""
    eval_limit: int | None = Field(None, ge=1)
    """Use only the first eval_limit held-out prompts."""
