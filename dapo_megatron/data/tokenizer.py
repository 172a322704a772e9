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
