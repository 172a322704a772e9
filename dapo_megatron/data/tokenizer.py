"""The tokenizer of a model folder."""

import transformers
from transformers import PreTrainedTokenizerBase

from dapo_megatron.errors import ConfigError


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a Hugging Face folder; code that lies there is not run.

    Raises:
        ConfigError: there is none that transformers can read.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception for a file that it cannot read
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"model.path={model}: no readable tokenizer ({reason}); copy the model's own there") from None


def check_tags(tokenizer: PreTrainedTokenizerBase, tags: list[str] | None) -> None:
    """Raise ConfigError if a tag of grading.thinking is a special token: it is not part of a response's text."""
    for tag in tags or []:
        if tag not in tokenizer.decode(tokenizer(tag, add_special_tokens=False)["input_ids"], skip_special_tokens=True):
            raise ConfigError(
                f"grading.thinking: {tag} is a special token of this tokenizer and not part of a response's text: set "
                "grading.thinking to null and let grading.grader look for the answer"
            )
