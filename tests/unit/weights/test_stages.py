"""Which stage sends which parameters, by hand; and which of them one collective gathers."""

import pytest

from dapo_megatron.weights.families import FAMILIES, Experts, ModelShape
from dapo_megatron.weights.stages import expert_copies, gathered_together, stage_mappings
from dapo_megatron.weights.table import parameter_mappings

EIGHT_EXPERTS = Experts(8, 2, 32, True)


def model(layers=8, tied=False):
    family = FAMILIES["Qwen3MoeForCausalLM"]
    return ModelShape(family, layers, 64, 96, 8, 4, 8, 128, tied, 1e-6, 1e4, None, 512, EIGHT_EXPERTS)


@pytest.mark.parametrize(
    ("stages", "chunks", "layers"),
    [
        (1, 1, ["01234567"]),
        (2, 1, ["0123", "4567"]),
        (4, 1, ["01", "23", "45", "67"]),
        (2, 2, ["0145", "2367"]),
        (2, 4, ["0246", "1357"]),
        (4, 2, ["04", "15", "26", "37"]),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_layers_of_each_stage(stages, chunks, layers, tied):
    found = stage_mappings(model(tied=tied), stages, chunks)
    names = [[m.megatron for m in mappings] for mappings in found]
    assert ["".join(dict.fromkeys(n.split(".")[2] for n in own if ".layers." in n)) for own in names] == layers
    ends = [[n for n in own if ".layers." not in n] for own in names]
    head = [] if tied else ["output_layer.weight"]
    assert ends[0][0] == "embedding.word_embeddings.weight"
    assert ends[-1][-1 - len(head) :] == ["decoder.final_layernorm.weight", *head]
    assert sum(map(len, ends)) == 2 + len(head)


@pytest.mark.parametrize(
    ("ep", "expert", "experts"),
    [(1, 5, [5]), (2, 0, [0, 4]), (2, 3, [3, 7]), (4, 1, [1, 3, 5, 7]), (8, 0, [0, 1, 2, 3, 4, 5, 6, 7])],
)
def test_experts_that_stand_at_one_place_of_their_ranks(ep, expert, experts):
    """Of 8 experts on 2 ranks the first holds 0 to 3: what it has for 3, the other has for 7."""
    shape = model(layers=1)
    table = parameter_mappings(shape)
    rule = f"decoder.layers.0.mlp.experts.local_experts.{expert}.linear_fc1.weight"
    assert [m.expert for m in expert_copies(table[rule], shape, table, ep)] == experts
    router = table["decoder.layers.0.mlp.router.weight"]
    assert expert_copies(router, shape, table, ep) == [router]


PARAMETERS = [("a", 0, 40), ("b", 0, 60), ("c", 0, 1), ("d", 1, 10), ("e", 1, 10), ("f", 0, 500), ("g", 0, 5)]


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (0, ["a", "b", "c", "d", "e", "f", "g"]),
        (100, ["ab", "c", "de", "f", "g"]),
        (101, ["abc", "de", "f", "g"]),
        (10_000, ["abc", "de", "fg"]),
    ],
)
def test_neighbours_of_one_kind_up_to_a_size(most, expected):
    assert ["".join(together) for together in gathered_together(PARAMETERS, most)] == expected


def test_nothing_is_gathered_of_nothing():
    assert list(gathered_together([], 10)) == []
