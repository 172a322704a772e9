"""One tree of options: overrides, cross-checks, and errors that a person can act on."""

import math
from pathlib import Path
from typing import get_args

import pytest

from dapo_megatron.cli import _find_recipe
from dapo_megatron.config import RunConfig, TrainerConfig, load_config
from dapo_megatron.config.base import EvaluationMetric
from dapo_megatron.config.explain import fields, value_of
from dapo_megatron.errors import DapoError
from dapo_megatron.observe.catalog import CATALOG
from launch.recipes import recipe_path

RECIPE = "model: {path: m}\ndata: {train: t.jsonl}\n"


def load(tmp_path, *overrides, text=RECIPE):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def test_defaults_are_the_papers(tmp_path):
    c = load(tmp_path)
    assert (c.rollout.prompts_per_step, c.rollout.group_size, c.trainer.mini_batch_prompts) == (512, 16, 32)
    assert (c.updates_per_step, c.warmup_updates) == (16, 320)
    assert (c.algorithm.clip_low, c.algorithm.clip_high) == (0.2, 0.28)
    assert (c.rollout.max_response_tokens, c.algorithm.overlong_cache) == (20480, 4096)
    assert (c.optimizer.lr, c.optimizer.weight_decay, c.optimizer.clip_grad) == (1e-6, 0.1, 1.0)
    assert (c.evaluation.samples, c.evaluation.temperature, c.evaluation.top_p) == (32, 1.0, 0.7)


def test_overrides_are_yaml(tmp_path):
    c = load(tmp_path, "optimizer.lr=1e-5", "data.eval=null", "engine.extra_args=[--a, b]", "data.shuffle=false")
    assert math.isclose(c.optimizer.lr, 1e-5)
    assert (c.data.eval, c.engine.extra_args, c.data.shuffle) == (None, ["--a", "b"], False)


def test_data_may_be_one_path_or_several(tmp_path):
    c = load(tmp_path, "data.eval=[a, b]", "data.chat_template_kwargs.enable_thinking=false")
    assert (c.data.train, c.data.eval) == (["t.jsonl"], ["a", "b"])
    assert c.data.chat_template_kwargs == {"enable_thinking": False}
    assert RunConfig.model_validate(c.model_dump()) == c


def test_every_option_is_documented_and_readable():
    c = RunConfig.model_validate({"model": {"path": "m"}, "data": {"train": "t"}})
    for name, kind, doc in fields():
        value_of(c, name)
        assert doc and kind, name


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rollout.promts_per_step=4", "did you mean 'rollout.prompts_per_step'"),
        ("rolout.group_size=4", "unknown option 'rolout'"),
        ("rollout.group_size=1", "rollout.group_size"),
        ("algorithm.overlong_cache=20480", "must be less than rollout.max_response_tokens=20480"),
        ("engine.context_length=100", "exceed engine.context_length=100"),
        ("trainer.mini_batch_prompts=33", "must divide rollout.prompts_per_step=512"),
        ("actor.virtual_pipeline_model_parallel_size=2", "needs actor.pipeline_model_parallel_size of at least 2"),
        ("engine={deterministic: true, replicas: 2}", "engine.deterministic needs engine.replicas=1"),
        ("grading.thinking=[<think>, '']", "grading.thinking.1"),
        ("grading.thinking=[<think>]", "grading.thinking"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("optimizer.lr", "section.key=value"),
        ("model.path.x=1", "'path' is a value"),
        ("trainer.steps=true", "trainer.steps"),
        ("optimizer.lr=true", "optimizer.lr"),
        ("rollout.max_policy_lag=true", "rollout.max_policy_lag"),
        ("optimizer.lr=.inf", "finite"),
        ("optimizer.lr=.nan", "finite"),
        ("trainer.batch_timeout_s=.inf", "finite"),
        ("rollout.request_timeout_s=-1", "greater than 0"),
        ("run_dir=''", "run_dir"),
        ("model.path=''", "model.path"),
        ("data.eval=''", "option 'data.eval.0'"),
        ("data.train=[]", "option 'data.train'"),
        ("data.train=[a, '']", "option 'data.train.1'"),
        ("data.train=5", "option 'data.train'"),
        ("data.train=null", "option 'data.train'"),
        ("data.train=[5]", "option 'data.train.0'"),
        ("data.system_prompt=''", "data.system_prompt"),
        ("data.chat_template_kwargs=[a]", "data.chat_template_kwargs"),
        ("seed=-1", "seed"),
        ("seed=99999999999", "seed"),
        ("trainer.steps=99999999999999999999999", "trainer.steps"),
        ("trainer.steps=2.5", "trainer.steps"),
        ("trainer.steps=1:30", "trainer.steps"),
        ("trainer.steps=0x10", "trainer.steps"),
        ("launch.heartbeat_timeout_s=0.1", "heartbeat_timeout_s"),
        ("launch.heartbeat_timeout_s=600.5", "must not exceed trainer.collective_timeout_s=600: the launcher names"),
        ("engine.call_timeout_s=600", "must be less than trainer.collective_timeout_s=600: the ranks wait"),
        ("trainer.steps=" + "[" * 3000, "nested too deeply"),
        ("engine.extra_args=[5]", "engine.extra_args.0"),
        ("trainer=", "option 'trainer'"),
        ("trainer.steps=[", "not valid YAML"),
    ],
)
def test_mistakes_are_one_line(tmp_path, override, says):
    with pytest.raises(DapoError) as e:
        load(tmp_path, override)
    assert says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'model' is required"),
        ("[1]", "found list"),
        ("a: [", "not valid YAML"),
        ("model: {path: m}", "'data' is required"),
        (RECIPE + "model: {path: n}\n", "'model' stands twice"),
        ("model: {path: m, path: n}\ndata: {train: t}\n", "'path' stands twice"),
        ("? [a]\n: 1\n", "a key must be a name"),
        ("a: 2024-99-99", "not valid YAML"),
        ("\x00", "not valid YAML"),
        ("model: 5\ndata: {train: t}", "option 'model'"),
    ],
)
def test_bad_recipes_are_one_line(tmp_path, text, says):
    with pytest.raises(DapoError) as e:
        load(tmp_path, text=text)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_what_is_no_readable_text_is_one_line(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"model: \xff\xfe")
    for name, says in (("none.yaml", "no recipe at"), (".", "cannot be read"), ("bytes.yaml", "not UTF-8")):
        with pytest.raises(DapoError, match=says) as e:
            load_config(tmp_path / name)
        assert "\n" not in str(e.value)


def test_merged_sections_and_plain_numbers(tmp_path):
    base = "x: &b {temperature: 0.5, group_size: 4}\n"
    with pytest.raises(DapoError, match="unknown option 'x'"):
        load(tmp_path, text=base + RECIPE + "rollout: {<<: *b}\n")
    text = RECIPE + "rollout: &r {temperature: 0.5, group_size: 4}\n"
    assert load(tmp_path, text=text).rollout.temperature == 0.5
    merged = "data: {train: t.jsonl}\nmodel: {<<: {path: m}, dtype: float32}\n"
    assert load(tmp_path, text=merged).model.dtype == "float32"
    for value in ("1e-3", "1.0E-3", ".001", "0.001"):
        assert load(tmp_path, f"optimizer.lr={value}").optimizer.lr == 1e-3


def test_sections_may_share_text_and_be_empty(tmp_path):
    text = "model: &m {path: m}\ndata: {train: t}\ntrainer:\n"
    assert load(tmp_path, "trainer.steps=3", text=text).trainer.steps == 3


def test_a_run_ends_early_when_the_evaluation_has_reached_every_goal():
    goals = {"eval/accuracy": 0.5, "eval/greedy_accuracy": 0.8}
    config = TrainerConfig(stop_at=goals)
    assert config.goals_reached({"eval/accuracy": 0.5, "eval/greedy_accuracy": 0.9})
    assert not config.goals_reached({"eval/accuracy": 0.5, "eval/greedy_accuracy": 0.7})
    assert not config.goals_reached({"eval/accuracy": 0.6})
    assert not config.goals_reached({}) and not TrainerConfig().goals_reached({"eval/accuracy": 1.0})
    assert set(get_args(EvaluationMetric)) <= CATALOG.keys()


@pytest.mark.parametrize("name", ["demo", "dapo_qwen2.5_32b", "dapo_qwen2.5_7b"])
def test_recipes_that_come_along_are_found_by_their_names(name):
    assert _find_recipe(name) == recipe_path(name) and recipe_path(name).is_file()
    assert _find_recipe(f"{name}.yaml") == Path(f"{name}.yaml")
