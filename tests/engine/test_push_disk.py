"""Weights through the run folder into a real server: what is in the folder when, and who is named when it fails."""

from pathlib import Path

import pytest
import torch

from tests.distributed.harness import actor_on_rank, run_ranks  # first: patches megatron-core on machines without CUDA
from tests.engine.conftest import ENGINE
from tests.tiny import hf_folder, run_config

from dapo_megatron.engines.control import EngineControl
from dapo_megatron.engines.engine_set import of_urls
from dapo_megatron.errors import DapoError
from dapo_megatron.resharding import plan, push
from dapo_megatron.resharding.verify import Verifier
from dapo_megatron.run_folder import RunFolder
from dapo_megatron.weights.exporter import export_stage
from dapo_megatron.weights.hf_folder import HfFolder

PROMPTS = [[5, 9, 33, 2, 60, 17, 8], [3, 4]]


def pusher_of(config, url):
    """(actor, pusher whose buckets are small: several files of a tiny model)."""
    cut = plan.plan_buckets
    plan.plan_buckets = push.plan_buckets = lambda tensors, dtype, _: cut(tensors, dtype, 40_000)
    actor = actor_on_rank(config)
    return actor, push.Pusher(config, actor, lambda: of_urls([url]))


def config_of(tmp_path, seed):
    model = hf_folder(tmp_path / "model", "qwen3", tied=True, seed=seed)
    config = run_config(model, engine=ENGINE, resharding={"transport": "disk"})
    return config.model_copy(update={"run_dir": str(tmp_path / "run")})


def two_pushes(config, url):
    """(names in the folder of weights, as time goes; number of files; whether they hold the trainer's tensors)."""
    folder, seen = RunFolder(Path(config.run_dir)).weights, []

    def look():
        seen.append(sorted(path.name for path in folder.iterdir()) if folder.exists() else None)

    for left in ("9", "10.partial"):
        (folder / left).mkdir(parents=True)
        (folder / left / "model.safetensors").touch()
    actor, pusher = pusher_of(config, url)
    pusher.connect()
    look()
    for version in (601, 602):
        pusher.push(version)
        look()
    found = HfFolder(folder / "602")
    ours = dict(export_stage(actor.modules, actor.shape))
    same = found.files.keys() == ours.keys() and all(torch.equal(found.tensor(n), t) for n, t in ours.items())
    Verifier(config, actor, pusher, PROMPTS).verify(602)
    pusher.close()
    look()
    return seen, len(set(found.files.values())), same


def test_a_version_replaces_the_one_before(tmp_path, engine_url):
    ((seen, files, same),) = run_ranks(1, two_pushes, config_of(tmp_path, 61), engine_url)
    assert seen == [None, ["601"], ["602"], None]
    assert files > 2 and same


def spoilt_push(config, url, spoil):
    """The error of a push whose folder is not as the engines need it, what the engine serves then and in the end."""
    _, pusher = pusher_of(config, url)
    pusher.connect()
    pusher.push(611)
    publish, versions = pusher._transport._publish, []
    pusher._transport._publish = lambda version: spoil(publish(version))
    with pytest.raises(DapoError) as e:
        pusher.push(612)
    versions.append(EngineControl(url, 10).version())
    pusher._transport._publish = publish
    pusher.connect()
    pusher.push(613)
    versions.append(EngineControl(url, 10).version())
    pusher.close()
    return str(e.value), e.value.kind, versions


def seen_elsewhere(folder):
    return folder.with_name("elsewhere")


def one_file_short(folder):
    sorted(folder.glob("*.safetensors"))[0].unlink()
    return folder


@pytest.mark.parametrize("spoil", [seen_elsewhere, one_file_short])
def test_an_engine_that_cannot_read_the_folder_is_named(tmp_path, engine_url, spoil):
    ((message, kind, versions),) = run_ranks(1, spoilt_push, config_of(tmp_path, 62), engine_url, spoil)
    named = tmp_path / "run" / "weights" / ("elsewhere" if spoil is seen_elsewhere else "612")
    assert f"{named} was not loaded (do all engines see it there?): engine {engine_url} refused" in message
    assert "Failed to get weights iterator" in message and "\n" not in message and kind == "engine"
    assert versions == ["611", "613"]
