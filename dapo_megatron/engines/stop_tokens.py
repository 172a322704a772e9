"""The tokens at which an engine ends a response."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dapo_megatron.errors import ConfigError
from dapo_megatron.weights.hf_config import read_json


def stop_token_ids(model_path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End tokens of the tokenizer and of generation_config.json (chat models have several).

    Raises:
        ConfigError: there is none, or generation_config.json names something else than token ids.
    """
    ids = {tokenizer.eos_token_id} - {None}
    path = Path(model_path) / "generation_config.json"
    if path.exists():
        eos = read_json(path, "").get("eos_token_id")
        listed = [] if eos is None else eos if isinstance(eos, list) else [eos]
        if not all(type(token) is int and token >= 0 for token in listed):
            raise ConfigError(f"{path}: eos_token_id must be a token id or a list of them, it is {json.dumps(eos)}")
        ids |= set(listed)
    if not ids:
        raise ConfigError(f"{model_path}: neither tokenizer nor generation_config.json names an end token")
    return sorted(ids)
