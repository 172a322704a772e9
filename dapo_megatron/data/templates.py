"""From a question to the text that is tokenised: a prompt template, then the tokenizer's chat template."""

import difflib
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from dapo_megatron.errors import DapoError

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
    """How a question becomes text."""

    text: str
    """Contains {prompt}; nothing else in it is special."""
    chat: bool
    """Wrap the result in the tokenizer's chat template, as one user message."""

    def encode(self, question: str | list[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of the prompt.

        Args:
            question: text; or chat messages, which go through the chat template as they are.

        Raises:
            DapoError: the tokenizer has no chat template, and one is needed.
        """
        if isinstance(question, str):
            question = self.text.replace(PLACEHOLDER, question)
            if not self.chat:
                return list(tokenizer(question)["input_ids"])
            question = [{"role": "user", "content": question}]
        if not tokenizer.chat_template:
            raise DapoError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template: use a chat model, or set "
                "data.chat=false with prompts that are text"
            )
        rendered = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        # The chat template has written the special tokens.
        return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def resolve_template(template: str, chat: bool) -> Template:
    """The template of that name, or the string itself if it contains {prompt}.

    Raises:
        DapoError: neither.
    """
    text = template if PLACEHOLDER in template else TEMPLATES.get(template)
    if text is None:
        near = difflib.get_close_matches(template, TEMPLATES, n=1, cutoff=0.0)[0]
        raise DapoError(
            f"unknown template {template!r}, did you mean {near!r}? It is one of {', '.join(TEMPLATES)}, "
            f"or a string that contains {PLACEHOLDER}"
        )
    return Template(text, chat)
