"""The plan of a push from the command line: from a model's config.json alone, and from a recipe."""

import json
import math

import pytest
from typer.testing import CliRunner

from dapo_megatron.errors import ConfigError, DapoError
from tests.tiny import hf_folder
from tests.unit.weights.real_configs import CONFIGS
from tools.plan_resharding import app

ON_128_GPUS = (
    "actor.tensor_model_parallel_size=8",
    "actor.pipeline_model_parallel_size=2",
    "actor.data_parallel_size=4",
    "engine.tensor_parallel_size=4",
    "engine.replicas=16",
)


@pytest.fixture
def qwen_32b(tmp_path):
    """config.json alone."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS["Qwen/Qwen2.5-32B, with YaRN as its README says"]))
    return path


def shown(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_32b_on_128_gpus(qwen_32b):
    text = shown(qwen_32b, *ON_128_GPUS, "--explain", "--network-gbs", 50, "--gather-gbs", 100)
    # Qwen2.5-32B by hand: 64 layers, hidden 5120, 40 heads and 8 key-value heads of 128, ffn 27648, vocabulary 152064.
    layer = 5120 * (2 * 5120 + 2 * 1024) + 3 * 5120 * 27648 + 2 * 5120 + 5120 + 2 * 1024
    parameters = 64 * layer + 2 * 152064 * 5120 + 5120
    size = 2 * parameters / 1e9
    norms = (64 * 2 + 1) * 5120 * 2
    gathered = 7 / 8 * (2 * parameters - norms) / 1e9 + 7 * norms / 1e9
    for part in (
        f"{parameters / 1e9:.3g} B parameters, bfloat16 in the trainer",
        "TP 8 x PP 2 x CP 1 x DP 4, EP 1: 64 ranks, of which 2 send",
        "16 x TP 4: 64 ranks",
        f"{size:.4g} GB in 194 buckets, the largest of 1485 MiB; each of the 64 ranks receives all",
        "keeps 16.38 GB",
        f"{gathered:.4g} GB from other ranks to the senders",
        # In the sender: the embedding, of seven others, whole, and flat; a down projection, which is on its way.
        f"sender {((2 + 7 / 8) * 152064 * 5120 + 5120 * 27648) * 2 / 2**30:.3g} GiB",
        f"at least {max(size / 50, gathered / 100):.3g} s: {size / 50:.3g} s at 50 GB/s",
        "model.embed_tokens.weight",
        "lm_head.weight",
        "61 .. 64",
    ):
        assert part in text, part
    assert math.isclose(size, 65.53, rel_tol=1e-3)


def test_through_the_disk(qwen_32b):
    text = shown(qwen_32b, *ON_128_GPUS, "resharding.transport=disk", "--explain")
    assert "65.53 GB in 194 files" in text and "131.1 GB in the run folder" in text and "time      not known" in text
    assert "to all engines" not in text and "over each link" not in text and "rank of an engine" not in text


def test_a_recipe(tmp_path):
    path = hf_folder(tmp_path / "model", "qwen3", tied=True)
    recipe = tmp_path / "my.yaml"
    recipe.write_text(
        f"model: {{path: {path}, dtype: float32}}\ndata: {{train: none, max_prompt_tokens: 8}}\n"
        "rollout: {max_response_tokens: 8}\nalgorithm: {overlong_cache: 2}\n"
        "engine: {context_length: 64, dtype: bfloat16}\n"
    )
    text = shown(recipe, "actor.tensor_model_parallel_size=2")
    assert "float32 in the trainer, bfloat16 in the engines" in text and "TP 2 x PP 1" in text


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("engine.tensor_parallel_size=3", "engine.tensor_parallel_size=3 does not divide"),
        ("actor.tensor_model_parallel_size=3", "actor.tensor_model_parallel_size=3 does not divide"),
        ("engine.replica=3", "did you mean 'engine.replicas'"),
    ],
)
def test_what_cannot_be_is_refused(qwen_32b, override, says):
    with pytest.raises((ConfigError, DapoError), match=says):
        shown(qwen_32b, override)
