"""Recipes for whole jobs on an untrained tiny model, and what to do with the processes of one."""

import random
import subprocess
import sys
import time

import pytest
import yaml

from launch.demo import write_data, write_model


def recipe(folder, **sections):
    """Path of a recipe that runs in seconds; keyword arguments add to its sections.

    Every group of an untrained model is wrong, so dynamic sampling is off.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder, random.Random(0))
    write_model(folder / "model")
    tree = yaml.safe_load(open("launch/recipes/demo.yaml"))
    tree["model"]["path"] = str(folder / "model")
    tree["data"] |= {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "eval_limit": 4}
    tree["engine"]["extra_args"] = []  # with SGLang's prefix cache, which every push must empty
    tree["algorithm"]["dynamic_sampling"] = False
    # At another temperature than 1, trainer and engine must divide by the same one.
    tree["rollout"] |= {"prompts_per_step": 4, "group_size": 4, "temperature": 0.8}
    tree["trainer"] |= {"mini_batch_prompts": 2, "steps": 2}
    tree["checkpoint"] = {"every": 1}
    tree["optimizer"] = {"lr": 1e-3, "warmup_steps": 4}
    tree["launch"] = {"max_restarts": 0}
    tree["run_dir"] = str(folder / "run")
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(recipe, *arguments):
    """A job in a process of its own."""
    command = [sys.executable, "-m", "dapo_megatron.cli", "run", str(recipe), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, timeout=300):
    """(exit code, output, seconds until it ended)."""
    began = time.monotonic()
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output, time.monotonic() - began


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(recipe, run folder) of a plain job."""
    folder = tmp_path_factory.mktemp("job")
    return recipe(folder), folder / "run"
