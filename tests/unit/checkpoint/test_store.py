"""Published, found, retained; the manifest as a file."""

import time

import msgspec
import pytest

from dapo_megatron.checkpoint import store
from dapo_megatron.checkpoint.background import BackgroundCall
from dapo_megatron.checkpoint.manifest import MANIFEST, Manifest, encode_manifest, read_manifest
from dapo_megatron.config import CheckpointConfig
from dapo_megatron.errors import ConfigError, StorageError
from dapo_megatron.run_folder import RunFolder


def write(run_dir, step, metrics=None):
    folder, path = RunFolder(run_dir), store.open_partial(RunFolder(run_dir), step)
    manifest = Manifest(format="dp_reshardable", model={}, dtype="float32", step=step, metrics=metrics or {})
    hf = run_dir / "hf"
    hf.mkdir(exist_ok=True)
    store.seal(path, manifest, {}, hf, b"{}")
    return store.publish(folder, step)


def names(run_dir):
    return sorted(p.name for p in (run_dir / "checkpoints").iterdir())


def test_a_half_written_checkpoint_is_never_latest(tmp_path):
    write(tmp_path, 3)
    store.open_partial(RunFolder(tmp_path), 6)  # the program is killed here
    assert store.latest(RunFolder(tmp_path)).name == "step_000003"
    write(tmp_path, 6)
    assert store.latest(RunFolder(tmp_path)).name == "step_000006"


def test_a_step_that_is_done_again_takes_the_others_place(tmp_path):
    old = write(tmp_path, 3, {"eval/accuracy": 0.1})
    new = write(tmp_path, 3, {"eval/accuracy": 0.2})
    assert old == new and read_manifest(new).metrics == {"eval/accuracy": 0.2}
    assert names(tmp_path) == ["step_000003"]


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (999_999, 1_000_000, 2):
        write(tmp_path, step)
    assert [p.name for p in store.published(RunFolder(tmp_path))] == ["step_000002", "step_999999", "step_1000000"]


def test_a_damaged_checkpoint_is_not_removed(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "checkpoints/step_000001" / MANIFEST).write_text("{")
    store.retain(RunFolder(tmp_path), CheckpointConfig(keep_last=1))
    assert names(tmp_path) == ["step_000001", "step_000003"]


def test_without_any_it_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        store.latest(RunFolder(tmp_path))


def test_the_manifest_comes_back(tmp_path):
    manifest = Manifest(format="weights", model={"layers": 2}, dtype="bfloat16", step=7, layout={"tp": 2})
    (tmp_path / MANIFEST).write_bytes(encode_manifest(manifest))
    got = read_manifest(tmp_path)
    assert msgspec.structs.replace(got, digest="") == manifest and len(got.digest) == 32


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "3"}', '{"schema": 3}', '{"schema": 99}'])
def test_what_is_no_manifest_is_one_line(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(StorageError) as e:
        read_manifest(tmp_path)
    assert MANIFEST in str(e.value) and "\n" not in str(e.value)


def test_a_background_call_gives_its_result_or_its_error():
    def fails(error):
        raise error

    assert BackgroundCall("adding", lambda: 1 + 1).result(5) == 2
    with pytest.raises(ConfigError, match="own"):
        BackgroundCall("x", lambda: fails(ConfigError("own"))).result(5)
    for error in (OSError(28, "No space left on device"), KeyError("x"), RuntimeError("y")):
        with pytest.raises(type(error)):
            BackgroundCall("x", lambda error=error: fails(error)).result(5)
    with pytest.raises(StorageError, match="writing takes more than checkpoint.timeout_s=0.1 s"):
        BackgroundCall("writing", lambda: time.sleep(2)).result(0.1)
