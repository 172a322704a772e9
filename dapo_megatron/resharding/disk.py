"""Buckets through the run folder, for engines that cannot join a group with the trainer.

weights/7.partial/    each stage's sender writes one safetensors file a bucket, through to the disk
weights/7/            the same folder, with an index, when all stages are written: every engine loads it; it stays
                      until every engine has loaded the next one

Whatever else is in weights/ stays there.
"""

import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dapo_megatron.actor.model import DTYPES
from dapo_megatron.checkpoint.store import sync_folder, write_synced
from dapo_megatron.config import RunConfig
from dapo_megatron.distributed.layout import Layout
from dapo_megatron.engines.all_engines import AllEngines
from dapo_megatron.errors import EngineError, StorageError
from dapo_megatron.resharding.plan import Bucket, plan_stages
from dapo_megatron.run_folder import RunFolder
from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.hf_folder import INDEX
from dapo_megatron.weights.hf_writer import index_text, make_header

_VERSION = re.compile(r"\d+(\.partial)?")
"""Names of the folders that are made here."""


class DiskTransport:
    """A folder of safetensors files for each version; a WeightTransport."""

    def __init__(self, config: RunConfig, shape: ModelShape, layout: Layout):
        self._config, self._shape, self._is_first = config, shape, layout.rank == 0
        self._timeout_s = config.deadlines.engine_call
        self._folder = RunFolder(Path(config.run_dir).absolute())
        self._engines = AllEngines()
        self._writer = ThreadPoolExecutor(max_workers=1)

    def connect(self, engines: AllEngines) -> None:
        """Nothing is opened."""
        self._engines = engines

    def begin(self) -> None:
        """Nothing: an engine loads a folder outside of a weight-update session."""

    def send(self, bucket: Bucket, flat: torch.Tensor, *, version: int, is_last: bool) -> "Writing":
        """Write a bucket's file."""
        path = self._folder.partial_weights(version) / file_name(bucket)
        return Writing(path, self._writer.submit(write_bucket, path, bucket, flat), self._timeout_s)

    def commit(self, version: int) -> None:
        """Publish the version's folder, have every engine load it, then remove the older ones.

        Raises:
            EngineError: names the folder, and says what each engine that has not loaded it says.
            StorageError, OSError: the folder cannot be published.
        """
        folder = self._publish(version)
        loads = self._engines.start(lambda e: e.load_folder(folder, flush_cache=not self._config.keeps_kv))
        failures = []
        for _, load in loads:
            try:
                load.result()
            except EngineError as e:
                failures.append(str(e))
        if failures:
            raise EngineError(f"{folder} was not loaded (do all engines see it there?): {'; '.join(failures)}")
        remove_versions(self._folder.weights, but=folder)

    def close(self) -> None:
        """Remove all folders, those of a killed run too: nobody loads them any more."""
        if self._is_first and self._folder.weights.exists():
            remove_versions(self._folder.weights)
            if not any(self._folder.weights.iterdir()):
                self._folder.weights.rmdir()

    def _publish(self, version: int) -> Path:
        partial, final = self._folder.partial_weights(version), self._folder.pushed_weights(version)
        # By plan, not by what the folder shows: a network file system may show this node an old list of its files, and
        # engines leave out what the index does not have, but refuse a folder that lacks a file of it.
        write_synced(partial / INDEX, index_text(self._planned_files()).encode())
        sync_folder(partial)
        partial.rename(final)
        sync_folder(final.parent)
        return final

    def _planned_files(self) -> dict[str, str]:
        """{file: header} of all stages."""
        c = self._config
        stages = plan_stages(
            self._shape,
            c.actor,
            dtype=c.model.dtype,
            engine_dtype=c.engine_dtype,
            bucket_bytes=c.resharding.bucket_mib << 20,
        )
        return {file_name(b): _header(b) for stage in stages for b in stage.buckets}


class Writing:
    """A bucket on its way into its file."""

    def __init__(self, path: Path, written: Future[None], timeout_s: float):
        self._path, self._written, self._timeout_s = path, written, timeout_s

    def wait(self) -> None:
        """Wait until it is on the disk.

        Raises:
            StorageError, OSError: it cannot be written, or not within the deadline.
        """
        try:
            self._written.result(self._timeout_s)
        except TimeoutError:
            raise StorageError(
                f"{self._path} was not written within {self._timeout_s:.0f} s: look after the disk of the run folder"
            ) from None


def remove_versions(weights: Path, but: Path | None = None) -> None:
    """Remove the folders of versions, whole or partial, from the folder `weights`.

    What a file system holds on to (NFS, a file that an engine has mapped) goes after the next push.
    """
    for path in weights.iterdir():
        if path != but and _VERSION.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def file_name(bucket: Bucket) -> str:
    """No two buckets of a model have the same first tensor."""
    return f"{bucket.names[0]}.safetensors"


def write_bucket(path: Path, bucket: Bucket, flat: torch.Tensor) -> None:
    """Write a safetensors file, through to the disk.

    Args:
        flat: the bucket's tensors, [bucket.bytes] uint8 on any device.

    Raises:
        StorageError, OSError: the disk is full or gone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    values = flat.cpu().view(DTYPES[bucket.dtype]).split([prod(s) for s in bucket.shapes])
    tensors = {n: v.view(s) for n, v, s in zip(bucket.names, values, bucket.shapes, strict=True)}
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as e:
        raise StorageError(f"{path} cannot be written ({e}): make room on the disk of the run folder") from None
    with path.open("rb") as f:
        os.fsync(f.fileno())


def _header(bucket: Bucket) -> str:
    dtype = DTYPES[bucket.dtype]
    return make_header({n: (dtype, s) for n, s in zip(bucket.names, bucket.shapes, strict=True)}, {})
