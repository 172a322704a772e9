"""What a resume may change."""

import pytest

from dapo_megatron.config import RunConfig
from dapo_megatron.config.changes import changes, config_digest
from dapo_megatron.errors import ConfigError


def config(**sections):
    tree = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}}
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section if isinstance(section, dict) else section
    return RunConfig.model_validate(tree)


def test_what_changed_is_named_with_both_values():
    now = config(optimizer={"lr": 5e-7}, trainer={"steps": 7}, data={"eval": "e.jsonl"})
    assert [str(c) for c in changes(config(), now)] == [
        "data.eval: None -> ['e.jsonl']",
        "optimizer.lr: 1e-06 -> 5e-07",
        "trainer.steps: 100 -> 7",
    ]
    assert changes(config(), config()) == []


@pytest.mark.parametrize(
    ("section", "value", "name"),
    [
        ("seed", 3, "seed"),
        ("model", {"path": "other"}, "model.path"),
        ("model", {"dtype": "float32"}, "model.dtype"),
        ("data", {"train": "u.jsonl"}, "data.train"),
        ("data", {"shuffle": False}, "data.shuffle"),
        ("data", {"max_prompt_tokens": 9}, "data.max_prompt_tokens"),
        ("data", {"template": "plain"}, "data.template"),
    ],
)
def test_what_must_not_change_is_refused_by_name(section, value, name):
    with pytest.raises(ConfigError, match=f"cannot change {name} from"):
        changes(config(), config(**{section: value}))


def test_another_spelling_of_a_path_is_no_change():
    assert changes(config(), config(data={"train": "./x/../t.jsonl"}, model={"path": "./m"})) == []


def test_the_digest_follows_every_option():
    digests = {config_digest(c) for c in (config(), config(seed=1), config(optimizer={"lr": 2e-6}))}
    assert len(digests) == 3 and config_digest(config()) == config_digest(config())


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"trainer": {"stop_at": {"eval/accuracy": 0.5}}}, "trainer.stop_at needs held-out prompts"),
        ({"checkpoint": {"keep_best": 1}}, "checkpoint.keep_best needs held-out prompts"),
        (
            {"data": {"eval": "e"}, "checkpoint": {"keep_best": 1, "every": 15}},
            "make checkpoint.every=15 a multiple of evaluation.every=10",
        ),
        (
            {"data": {"eval": "e"}, "trainer": {"stop_at": {"eval/greedy_accuracy": 0.5}}},
            "trainer.stop_at names eval/greedy_accuracy: set evaluation.greedy=true",
        ),
        (
            {"data": {"eval": "e"}, "checkpoint": {"keep_best": 1, "best_metric": "eval/greedy_accuracy"}},
            "checkpoint.keep_best names eval/greedy_accuracy",
        ),
    ],
)
def test_goals_need_what_they_are_measured_by(sections, says):
    with pytest.raises(ValueError, match=says):
        config(**sections)
