"""Which checkpoints of a run are kept. Pure."""

from collections.abc import Sequence

from dapo_megatron.checkpoint.manifest import Manifest
from dapo_megatron.config import CheckpointConfig


def kept_steps(manifests: Sequence[Manifest], config: CheckpointConfig) -> set[int]:
    """Steps of the checkpoints that stay.

    They are the newest, the newest that any layout can resume, those of every n-th step, and the best by the evaluation
    (of equally good ones the newest).
    """
    newest = sorted(m.step for m in manifests)[-config.keep_last :]
    every = [m.step for m in manifests if config.keep_every and m.step % config.keep_every == 0]
    name = config.best_metric
    ranked = sorted((m.metrics[name], m.step) for m in manifests if name in m.metrics)
    best = [step for _, step in ranked[-config.keep_best :]] if config.keep_best else []
    anywhere = sorted(m.step for m in manifests if m.format == "fully_reshardable")[-1:]
    return {*newest, *anywhere, *every, *best}
