"""Prompt files -> prompts: the question through template and tokenizer, the ground truth out of its field."""

import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from dapo_megatron.data.rows import Row, load_rows
from dapo_megatron.data.templates import Message, resolve_template
from dapo_megatron.errors import DapoError
from dapo_megatron.records import Prompt


class LoadedPrompts(NamedTuple):
    """What a file holds."""

    prompts: list[Prompt]
    dropped: int
    """Prompts that were too long."""


def load_prompts(
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    prompt_field: str,
    answer_field: str,
    template: str,
    chat: bool = True,
    answer_pattern: str | None = None,
    max_prompt_tokens: int,
    too_long: Literal["drop", "error"],
    limit: int | None = None,
) -> LoadedPrompts:
    """Prompts of a jsonl or parquet file or a Hugging Face dataset folder, in the order of the file.

    Args:
        prompt_field: dotted path of the question: text, or a list of chat messages {role, content}, which
            goes through the tokenizer's chat template without `template`.
        answer_field: dotted path of the ground truth, text or a number.
        template: name of a ready template or a string with {prompt}, see `templates`.
        chat: wrap questions that are text in the chat template; otherwise the text is tokenised as it is,
            with the special tokens that the tokenizer adds to plain text.
        answer_pattern: regular expression with one group that is searched in the ground truth.
        max_prompt_tokens: longest prompt, in tokens, everything included.
        too_long: longer prompts are dropped and counted, or are an error.
        limit: read only the first rows.

    Raises:
        DapoError: a bad file, row, field or pattern, with its place; or nothing is left.
    """
    wording = resolve_template(template, chat)
    pattern = _compile(answer_pattern)
    rows = load_rows(path)[:limit]
    prompts: list[Prompt] = []
    for row in rows:
        question = _question(row, prompt_field)
        truth = _ground_truth(row, answer_field, pattern)
        ids = wording.encode(question, tokenizer)
        if len(ids) <= max_prompt_tokens:
            text = question if isinstance(question, str) else question[-1]["content"]
            prompts.append(Prompt(f"{row.path.name}:{row.number}", ids, truth, text, row.number))
        elif too_long == "error":
            raise DapoError(
                f"{row.place}: the prompt has {len(ids)} tokens, more than data.max_prompt_tokens="
                f"{max_prompt_tokens}; raise it, or set data.too_long=drop"
            )
    if not prompts:
        raise DapoError(
            f"{path}: each of the {len(rows)} prompts is longer than data.max_prompt_tokens="
            f"{max_prompt_tokens}; raise it"
        )
    return LoadedPrompts(prompts, len(rows) - len(prompts))


def _question(row: Row, field: str) -> str | list[Message]:
    value = row.value(field)
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and all(map(_is_message, value)):
        return value
    raise DapoError(
        f"{row.place}, field {field!r}: expected text or a list of chat messages "
        f"{{role, content}}, found {_describe(value)}"
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _ground_truth(row: Row, field: str, pattern: re.Pattern[str] | None) -> str:
    value = row.value(field)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DapoError(f"{row.place}, field {field!r}: expected text or a number, found {_describe(value)}")
    truth = str(value)
    if pattern is not None:
        match = pattern.search(truth)
        if match is None:
            raise DapoError(f"{row.place}, field {field!r}: nothing matches data.answer_pattern={pattern.pattern!r}")
        truth = match[1] or ""
    if not truth.strip():
        raise DapoError(f"{row.place}, field {field!r}: the answer is empty")
    return truth.strip()


def _compile(answer_pattern: str | None) -> re.Pattern[str] | None:
    if answer_pattern is None:
        return None
    try:
        pattern = re.compile(answer_pattern)
    except re.error as error:
        raise DapoError(f"data.answer_pattern={answer_pattern!r} is not a regular expression: {error}") from None
    if pattern.groups != 1:
        raise DapoError(f"data.answer_pattern={answer_pattern!r} has {pattern.groups} groups, exactly one is needed")
    return pattern


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
