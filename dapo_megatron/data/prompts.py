"""Prompt files -> prompts: the question through template and tokenizer, the ground truths out of their field."""

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from dapo_megatron.config import DataConfig
from dapo_megatron.data.numbers import plain
from dapo_megatron.data.rows import Row, load_rows
from dapo_megatron.data.templates import Message, question_in, resolve_template
from dapo_megatron.errors import ConfigError, DataError
from dapo_megatron.records import Prompt


class LoadedPrompts(NamedTuple):
    """What the files hold."""

    prompts: list[Prompt]
    dropped: int
    """Prompts that were too long."""
    longest: int
    """Tokens of the longest prompt, dropped ones included."""


def load_prompts(
    paths: str | Path | Sequence[str | Path],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LoadedPrompts:
    """Prompts of files and folders (see `rows.load_rows`), in their order.

    Args:
        data: fields, template and limits; its own paths are not looked at.
        limit: read only the first rows.
        progress: called with rows done and rows in all after each row.

    Raises:
        DataError: a bad file, row or field, with its place; or nothing is left.
        ConfigError: a template, variable or pattern that cannot work.
    """
    template = resolve_template(data, tokenizer)
    pattern = _compile(data.answer_pattern)
    rows = load_rows(paths, limit)
    prompts: list[Prompt] = []
    longest = 0
    for done, row in enumerate(rows, 1):
        question = _question(row, data.prompt_field)
        truth, *alternatives = _ground_truths(row, data.answer_field, pattern)
        try:
            ids = template.encode(question, tokenizer)
        except DataError as error:
            raise DataError(f"{row.place}, field {data.prompt_field!r}: {error}") from None
        longest = max(longest, len(ids))
        if len(ids) <= data.max_prompt_tokens:
            prompts.append(Prompt(row.id, ids, truth, question_in(question), row.number, alternatives))
        elif data.too_long == "error":
            raise DataError(
                f"{row.place}: the prompt has {len(ids)} tokens, more than data.max_prompt_tokens="
                f"{data.max_prompt_tokens}; raise it, or set data.too_long=drop"
            )
        progress(done, len(rows))
    if not prompts:
        raise DataError(
            f"{rows[0].path}: each of the {len(rows)} prompts is longer than data.max_prompt_tokens="
            f"{data.max_prompt_tokens}; raise it"
        )
    return LoadedPrompts(prompts, len(rows) - len(prompts), longest)


def _question(row: Row, field: str) -> str | list[Message]:
    value = row.value(field)
    is_question = isinstance(value, str) or (isinstance(value, list) and value and all(map(_is_message, value)))
    if is_question and question_in(value).strip():
        return value
    raise DataError(
        f"{row.place}, field {field!r}: expected text or a list of chat messages "
        f"{{role, content}}, found {_describe(value)}"
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _ground_truths(row: Row, field: str, pattern: re.Pattern[str] | None) -> list[str]:
    """The ground truth of a row and, if its field is a list, the others that are right too, each once."""
    value = row.value(field)
    if not isinstance(value, list):
        return [_ground_truth(value, f"{row.place}, field {field!r}", pattern)]
    if not value:
        raise DataError(f"{row.place}, field {field!r}: expected at least one answer, found list []")
    truths = (_ground_truth(v, f"{row.place}, field '{field}.{i}'", pattern) for i, v in enumerate(value))
    return list(dict.fromkeys(truths))


def _ground_truth(value: Any, place: str, pattern: re.Pattern[str] | None) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise DataError(f"{place}: expected text or a number, found {_describe(value)}")
    try:
        truth = value if isinstance(value, str) else plain(value)
    except ValueError as error:
        raise DataError(f"{place}: expected text or a number, found {_describe(value)}: {error}") from None
    if pattern is not None:
        match = pattern.search(truth)
        if match is None:
            raise DataError(f"{place}: nothing matches data.answer_pattern={pattern.pattern!r}")
        truth = match[1] or ""
    if not truth.strip():
        raise DataError(f"{place}: the answer is empty")
    return truth.strip()


def _compile(answer_pattern: str | None) -> re.Pattern[str] | None:
    if answer_pattern is None:
        return None
    try:
        pattern = re.compile(answer_pattern)
    except re.error as error:
        raise ConfigError(f"data.answer_pattern={answer_pattern!r} is not a regular expression: {error}") from None
    if pattern.groups != 1:
        raise ConfigError(f"data.answer_pattern={answer_pattern!r} has {pattern.groups} groups, exactly one is needed")
    return pattern


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
