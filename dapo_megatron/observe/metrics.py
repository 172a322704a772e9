"""The metrics of a run: one flat record a step, in metrics.jsonl, TensorBoard and Weights & Biases.

A record is {"step": int, "time": unix seconds, "version": int, "section/name": float, ...} (see catalog): the
report draws those it knows by topic and the rest one by one. A record without training metrics (an evaluation
before the first step) is as good as any other. What becomes known of a step after its record is a record of the same
step, before the next one's: readers see one record.
"""

import importlib
import math
from collections.abc import Mapping
from typing import Any

from dapo_megatron.errors import ConfigError
from dapo_megatron.observe.jsonl import append_lines, cut_after, read_lines
from dapo_megatron.run_folder import RunFolder

Record = dict[str, float]


class MetricsWriter:
    """Writes the records of one run; one process of the run owns it."""

    def __init__(self, folder: RunFolder, *, tensorboard: bool, wandb_project: str | None, resume_step: int | None):
        """Open the run's history at `resume_step`: what lies beyond it is dropped, to be written anew.

        Args:
            tensorboard: also write event files into the run folder.
            wandb_project: also log to this Weights & Biases project; None is off.
            resume_step: step of the checkpoint the run goes on from; None starts a new history.

        Raises:
            ConfigError: `wandb_project` is given and the package is missing.
        """
        self._path = folder.metrics
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._wandb = _start_wandb(folder, wandb_project, resume_step) if wandb_project else None
        cut_after(self._path, resume_step)
        self._tensorboard = _start_tensorboard(folder, resume_step) if tensorboard else None

    def write(self, record: Mapping[str, float]) -> None:
        """Append one step's record; numbers of numpy and torch (one element) are accepted."""
        record = {name: _plain(value) for name, value in record.items()}
        step = int(record["step"])
        # JSON has no NaN or infinity: null is what every other reader of the file understands.
        append_lines(self._path, [{k: v if math.isfinite(v) else None for k, v in record.items()}], sync=True)
        if self._tensorboard is not None:
            for name, value in record.items():
                if name not in ("step", "time"):
                    self._tensorboard.add_scalar(name, value, step, record.get("time"))
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(record, step=step)

    def close(self) -> None:
        """End the TensorBoard file and the W&B run."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(folder: RunFolder) -> list[Record]:
    """One record a step, in order; NaN where a value was not finite. Empty for a run without metrics."""
    records: list[Record] = []
    for row in read_lines(folder.metrics):
        record = {name: math.nan if value is None else value for name, value in row.items()}
        if records and records[-1]["step"] == record["step"]:
            record = records.pop() | record
        records.append(record)
    return records


def _plain(value: Any) -> float:
    return value if isinstance(value, int) else float(value)


def _start_tensorboard(folder: RunFolder, resume_step: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # TensorBoard hides the events of abandoned history from the purge step on.
    return SummaryWriter(str(folder.tensorboard), purge_step=0 if resume_step is None else resume_step + 1)


def _start_wandb(folder: RunFolder, project: str, resume_step: int | None) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise ConfigError(
            f"observe.wandb_project={project} needs the package wandb: pip install wandb, or set it to null"
        ) from None
    # W&B cannot take back logged steps, so each resume is a run of its own in the group.
    name = folder.name
    suffix = "" if resume_step is None else f"-from-{resume_step}"
    return wandb.init(project=project, group=name, name=name + suffix, dir=str(folder.path))
