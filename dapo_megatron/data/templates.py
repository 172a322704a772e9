"""From a question to the text that is tokenised: a prompt template, then the tokenizer's chat template."""

import difflib
import inspect
import re
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from dapo_megatron.config import DataConfig
from dapo_megatron.errors import ConfigError, DataError

Message = dict[str, Any]
"""{"role": ..., "content": ...}, as chat templates take it."""

PLACEHOLDER = "{prompt}"

TEMPLATES = {
    # Wording of the authors' data set BytedTsinghua-SIA/DAPO-Math-17k.
    "dapo": (
        "Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
        "{prompt}\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    ),
    # Wording of Qwen2.5-Math's evaluation.
    "boxed": "{prompt}\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "plain": PLACEHOLDER,
}


class Template(NamedTuple):
    """How a question becomes token ids."""

    text: str
    """Contains {prompt}; nothing else in it is special."""
    chat: bool
    """Wrap the result in the tokenizer's chat template, as one user message."""
    system_prompt: str | None
    """Goes before the question as a system message."""
    variables: dict[str, Any]
    """For the chat template."""

    def encode(self, question: str | list[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of the prompt.

        Args:
            question: text; or chat messages, which go through the chat template without `text`. Where the last one
                is the assistant's, the response continues it.

        Raises:
            DataError: messages that the chat template refuses or leaves out, or with a second system message.
            ConfigError: the tokenizer has no chat template, and one is needed.
        """
        if isinstance(question, str):
            question = self.text.replace(PLACEHOLDER, question)
            if not self.chat:
                if self.system_prompt is not None or self.variables:
                    raise ConfigError(
                        "data.system_prompt and data.chat_template_kwargs need data.chat=true where prompts are text"
                    )
                return list(tokenizer(question)["input_ids"])
            question = [{"role": "user", "content": question}]
        _require_chat_template(tokenizer)
        if self.system_prompt is not None:
            if any(message["role"] == "system" for message in question):
                raise DataError("the messages have a system message of their own: unset data.system_prompt")
            question = [{"role": "system", "content": self.system_prompt}, *question]
        # The chat template has written the special tokens.
        return list(tokenizer(_render(question, tokenizer, self.variables), add_special_tokens=False)["input_ids"])


def question_in(question: str | list[Message]) -> str:
    """What is asked: the text, or the last message of the user (of anybody, where there is none)."""
    if isinstance(question, str):
        return question
    asked = [message["content"] for message in question if message["role"] == "user"]
    return (asked or [question[-1]["content"]])[-1]


def resolve_template(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template that `data.template` names, or that string itself if it contains {prompt}.

    Raises:
        ConfigError: neither, or variables that the tokenizer's chat template does not know.
    """
    text = data.template if PLACEHOLDER in data.template else TEMPLATES.get(data.template)
    if text is None:
        near = difflib.get_close_matches(data.template, TEMPLATES, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"unknown template {data.template!r}, did you mean {near!r}? It is one of {', '.join(TEMPLATES)}, "
            f"or a string that contains {PLACEHOLDER}"
        )
    _check_variables(data.chat_template_kwargs, tokenizer)
    return Template(text, data.chat, data.system_prompt, data.chat_template_kwargs)


def _check_variables(variables: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Jinja takes a variable that no template reads without a word."""
    if not variables:
        return
    _require_chat_template(tokenizer)
    taken = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters} - {"tools", "documents"}
    words = set(re.findall(r"[A-Za-z_]\w*", tokenizer.get_chat_template(tools=variables.get("tools"))))
    for name in variables:
        if name in taken:
            raise ConfigError(f"data.chat_template_kwargs: {name!r} is not for the config to set; remove it")
        if name not in words:
            near = difflib.get_close_matches(name, sorted(words - taken), n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"data.chat_template_kwargs: the chat template reads no {name!r}, did you mean {near!r}? (tokenizer "
                f"{tokenizer.name_or_path!r})"
            )


def _require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise ConfigError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template: use a chat model, or set "
            "data.chat=false with prompts that are text"
        )


def _render(messages: list[Message], tokenizer: PreTrainedTokenizerBase, variables: dict[str, Any]) -> str:
    continued = messages[-1]["role"] == "assistant"
    try:
        rendered: str = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not continued,
            continue_final_message=continued,
            **variables,
        )
    except Exception as error:  # a chat template is a program of the model's authors, and may raise anything
        roles = ", ".join(message["role"] for message in messages)
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"the chat template refuses messages of the roles {roles} ({reason}); change them") from None
    for message in messages:
        # The assistant's earlier thoughts are rightly left out; a role that a template does not know is, silently.
        if message["role"] != "assistant" and message["content"].strip() not in rendered:
            raise DataError(f"the chat template leaves out the message of role {message['role']!r}: rename the role")
    return rendered
