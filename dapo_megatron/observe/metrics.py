"""The metrics of a run: one flat record a step, in metrics.jsonl, TensorBoard and Weights & Biases.

A record is {"step": int, "time": unix seconds, "version": int, "section/name": float, ...}. Names are free: the
report draws those it knows by topic and the rest one by one. A record without training metrics (an evaluation
before the first step) is as good as any other.
"""

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dapo_megatron.errors import DapoError
from dapo_megatron.observe.jsonl import append_line, cut_after, read_lines

FILE = "metrics.jsonl"
Record = dict[str, float]


class MetricsWriter:
    """Writes the records of one run; one process of the run owns it."""

    def __init__(self, run_dir: str | Path, *, tensorboard: bool, wandb_project: str | None, resume_step: int | None):
        """Open the run's history at `resume_step`: what lies beyond it is dropped, to be written anew.

        Args:
            tensorboard: also write event files into run_dir/tensorboard.
            wandb_project: also log to this Weights & Biases project; None is off.
            resume_step: step of the checkpoint the run goes on from; None starts a new history.

        Raises:
            DapoError: `wandb_project` is given and the package is missing.
        """
        self._path = Path(run_dir) / FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._wandb = _start_wandb(self._path.parent, wandb_project, resume_step) if wandb_project else None
        cut_after(self._path, resume_step)
        self._tensorboard = _start_tensorboard(self._path.parent, resume_step) if tensorboard else None

    def write(self, record: Mapping[str, float]) -> None:
        """Append one step's record; numbers of numpy and torch (one element) are accepted."""
        record = {name: _plain(value) for name, value in record.items()}
        step = int(record["step"])
        # JSON has no NaN or infinity: null is what every other reader of the file understands.
        append_line(self._path, {k: v if math.isfinite(v) else None for k, v in record.items()})
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


def read_metrics(run_dir: str | Path) -> list[Record]:
    """All records of a run, in order; NaN where a value was not finite. Empty for a run without metrics."""
    rows = read_lines(Path(run_dir) / FILE)
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


def _plain(value: Any) -> float:
    return value if isinstance(value, int) else float(value)


def _start_tensorboard(run_dir: Path, resume_step: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # TensorBoard hides the events of abandoned history from the purge step on.
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=0 if resume_step is None else resume_step + 1)


def _start_wandb(run_dir: Path, project: str, resume_step: int | None) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise DapoError(
            f"observe.wandb_project={project} needs the package wandb: pip install wandb, or set it to null"
        ) from None
    # W&B cannot take back logged steps, so each resume is a run of its own in the group.
    name = run_dir.resolve().name
    suffix = "" if resume_step is None else f"-from-{resume_step}"
    return wandb.init(project=project, group=name, name=name + suffix, dir=str(run_dir))
