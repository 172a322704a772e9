"""End tokens: of the tokenizer and of generation_config.json, or one line."""

import json
from types import SimpleNamespace

import pytest

from dapo_megatron.errors import DapoError
from dapo_megatron.engines.stop_tokens import stop_token_ids


def stops(folder, tokenizer_eos=None, **generation):
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return stop_token_ids(str(folder), SimpleNamespace(eos_token_id=tokenizer_eos))


def test_all_end_tokens_are_taken(tmp_path):
    assert stops(tmp_path, 7) == [7]
    assert stops(tmp_path, 7, eos_token_id=[9, 3, 7]) == [3, 7, 9]
    assert stops(tmp_path, 2, eos_token_id=[1, 7]) == [1, 2, 7]
    assert stops(tmp_path, None, eos_token_id=0) == [0]
    assert stops(tmp_path, 7, eos_token_id=None) == [7]


@pytest.mark.parametrize("eos", ["</s>", ["</s>"], True, [True], [[3]], -1, [5, -1], 2.0, {"id": 3}])
def test_anything_else_is_refused(tmp_path, eos):
    with pytest.raises(DapoError, match="eos_token_id must be a token id or a list of them") as e:
        stops(tmp_path, 7, eos_token_id=eos)
    assert "\n" not in str(e.value)


def test_none_at_all_and_a_broken_file(tmp_path):
    with pytest.raises(DapoError, match="names an end token"):
        stops(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(DapoError, match="cannot be read as JSON"):
        stops(tmp_path, 7)
