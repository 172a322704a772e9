"""The tokens at which an engine ends a response."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dapo_megatron.errors import ConfigError


def stop_token_ids(model_path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End tokens of the tokenizer and of generation_config.json (chat models have several).

    Raises:
        ConfigError: neither names one.
    """
    ids = {tokenizer.eos_token_id} - {None}
    path = Path(model_path) / "generation_config.json"
    if path.exists():
        eos = json.loads(path.read_text()).get("eos_token_id") or []
        ids |= {eos} if isinstance(eos, int) else set(eos)
    if not ids:
        raise ConfigError(f"{model_path}: neither tokenizer nor generation_config.json names an end token")
    return sorted(ids)
