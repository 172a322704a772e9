"""The demo learns to add, and does not where the rewards are shuffled within each group."""

import pytest

from dapo_megatron.observe.metrics import read_metrics
from dapo_megatron.run_folder import RunFolder
from launch.demo import prepare
from tests.launch.conftest import finish, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's data and its warmed-up model."""
    folder = tmp_path_factory.mktemp("demo")
    prepare(folder)
    return folder


def run(demo, run_dir, steps, *overrides):
    """(metrics before the first step, metrics of all steps)."""
    files = [f"model.path={demo / 'model'}", f"data.train={demo / 'train.jsonl'}", f"data.eval={demo / 'eval.jsonl'}"]
    schedule = [f"trainer.steps={steps}", f"evaluation.every={steps}", f"checkpoint.every={steps}"]
    code, output, _ = finish(
        start("launch/recipes/demo.yaml", f"run_dir={run_dir}", *files, *schedule, *overrides), timeout=600
    )
    assert code == 0, output
    before, *steps = read_metrics(RunFolder(run_dir))
    return before, steps


def test_it_learns(demo, tmp_path):
    before, steps = run(demo, tmp_path / "run", 20)
    assert 0.20 <= before["eval/accuracy"] <= 0.45
    assert sum(s["groups/all_right"] for s in steps) > 0 and sum(s["groups/all_wrong"] for s in steps) > 0
    assert steps[-1]["eval/accuracy"] >= before["eval/accuracy"] + 0.25
    assert steps[-1]["eval/greedy_accuracy"] >= 0.75
    assert all(s["sync/logprob_difference"] <= 1e-4 and s["optimizer/grad_norm_min"] > 0 for s in steps)


def test_it_does_not_learn_from_shuffled_rewards(demo, tmp_path):
    before, steps = run(demo, tmp_path / "run", 10, "algorithm.shuffle_rewards=true")
    assert steps[-1]["eval/accuracy"] <= before["eval/accuracy"] + 0.05
