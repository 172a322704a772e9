"""Headers and indexes of safetensors files, by hand."""

import json

import pytest
import torch

from dapo_megatron.weights import hf_writer
from dapo_megatron.weights.hf_writer import index_text, make_header, parse_header, plain_layout


@pytest.mark.parametrize("made_by", ["", *("x" * n for n in range(1, 9)), "müller", "ä" * 5])
def test_the_bytes_of_the_tensors_begin_at_a_multiple_of_eight(made_by):
    header = make_header({"größe": (torch.bfloat16, (3, 5)), "b": (torch.float32, (2,))}, {"made by": made_by})
    assert len(header.encode()) % 8 == 0 and json.loads(header)["__metadata__"] == {"made by": made_by}
    assert [(name, e.begin, e.size) for name, e in parse_header(header).items()] == [("größe", 0, 30), ("b", 30, 8)]


def test_an_index_counts_parameters_and_bytes():
    layout = {
        "model-1.safetensors": make_header({"a": (torch.bfloat16, (3, 5)), "c": (torch.float32, (2,))}, {}),
        "model-2.safetensors": make_header({"b": (torch.float32, (4, 1))}, {}),
    }
    assert json.loads(index_text(layout)) == {
        "metadata": {"total_parameters": 15 + 2 + 4, "total_size": 30 + 8 + 16},
        "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"},
    }


@pytest.mark.parametrize(
    ("most", "files"), [(94, ["abcd"]), (93, ["abc", "d"]), (30, ["a", "bcd"]), (29, ["a", "bc", "d"]), (1, [*"abcd"])]
)
def test_files_are_filled_up_to_the_limit_and_a_larger_tensor_stands_alone(monkeypatch, most, files):
    monkeypatch.setattr(hf_writer, "MAX_FILE_BYTES", most)
    rows = dict(zip("abcd", (64, 2, 24, 4), strict=True))  # bytes
    layout = plain_layout({name: (torch.bfloat16, (n // 2,)) for name, n in rows.items()})
    assert ["".join(parse_header(header)) for header in layout.values()] == files
    n = len(files)
    names = [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    assert list(layout) == (names if n > 1 else ["model.safetensors"])
