"""Every path of a run, once."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run. Nothing is created by asking for a path."""

    path: Path

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.resolve().name

    @property
    def config(self) -> Path:
        """The resolved configuration that the run began with."""
        return self.path / "config.yaml"

    def resumed_config(self, number: int) -> Path:
        """The configuration since a resume that changed something, counted from 1."""
        return self.path / f"config.resume_{number:03d}.yaml"

    @property
    def last_config(self) -> Path:
        """The configuration that holds now."""
        number = 0
        while self.resumed_config(number + 1).exists():
            number += 1
        return self.resumed_config(number) if number else self.config

    @property
    def begun_with(self) -> Path:
        """Path of the checkpoint whose weights the run began with, if it did."""
        return self.path / "begun_with.txt"

    @property
    def stop_request(self) -> Path:
        """Whoever makes this file asks the run to finish its step, save and end."""
        return self.path / "stop"

    @property
    def save_request(self) -> Path:
        """Whoever makes this file asks the run for a checkpoint after its step; it goes when that is begun."""
        return self.path / "save"

    @property
    def lock(self) -> Path:
        """Held by the launcher of the run: host and pid."""
        return self.path / "launcher.lock"

    @property
    def attempts(self) -> Path:
        """One line a start of the run."""
        return self.path / "attempts.jsonl"

    @property
    def bad_nodes(self) -> Path:
        """Nodes of a cluster on which the run failed, and when."""
        return self.path / "bad_nodes.json"

    def snapshot(self, job: int) -> Path:
        """What a job of a cluster runs: code, configuration, batch script."""
        return self.path / "snapshots" / f"job_{job}"

    def requeues(self, job: int) -> Path:
        """What a job of a cluster remembers of how it went back into the queue."""
        return self.snapshot(job) / "requeues.json"

    @property
    def metrics(self) -> Path:
        """One line a step."""
        return self.path / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        """The fate of every prompt that was issued, one line each."""
        return self.path / "ledger.jsonl"

    @property
    def samples(self) -> Path:
        """Sampled responses, one group a line."""
        return self.path / "samples.jsonl"

    @property
    def report(self) -> Path:
        """The report, one page."""
        return self.path / "report.html"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's files."""
        return self.path / "tensorboard"

    @property
    def logs(self) -> Path:
        """Folder of the output of the processes of the last start: a link."""
        return self.path / "logs" / "latest"

    def attempt_logs(self, number: int) -> Path:
        """The same of one start, counted from 1."""
        return self.path / "logs" / f"attempt_{number:03d}"

    @property
    def journal(self) -> Path:
        """What the launcher decided, and why, over all starts."""
        return self.path / "logs" / "launcher.log"

    @property
    def keys(self) -> Path:
        """What the run's processes know each other by, readable by their owner alone."""
        return self.path / "keys.json"

    @property
    def engine_options(self) -> Path:
        """Options of the engines that no command line must show, readable by their owner alone."""
        return self.path / "engine_options.yaml"

    @property
    def engine_set(self) -> Path:
        """Who serves now."""
        return self.path / "engines.json"

    @property
    def statuses(self) -> Path:
        """Folder of what each process does now."""
        return self.path / "status"

    @property
    def exits(self) -> Path:
        """Folder of how each process ended."""
        return self.path / "exits"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def banks(self) -> Path:
        """Folder of finished groups of the step in progress."""
        return self.path / "bank"

    def bank(self, step: int) -> Path:
        """Finished groups of one step."""
        return self.banks / f"step_{step:06d}.bank"

    @property
    def weights(self) -> Path:
        """Folder of the weights that engines load from the disk."""
        return self.path / "weights"

    def pushed_weights(self, version: int) -> Path:
        """Those of one version, all of them."""
        return self.weights / str(version)

    def partial_weights(self, version: int) -> Path:
        """Where they are written before they are published."""
        return self.weights / f"{version}.partial"

    def step(self, name: str) -> Path:
        """What a step of a SLURM job starts."""
        return self.path / "steps" / f"{name}.json"

    def log(self, process: str) -> Path:
        """Output of one process of the last start."""
        return self.logs / f"{process}.log"

    def status(self, process: str) -> Path:
        """What one process does now."""
        return self.statuses / f"{process}.json"

    def exit(self, process: str) -> Path:
        """How one process ended."""
        return self.exits / f"{process}.json"

    def batch(self, step: int) -> Path:
        """The dumped training batch of a step."""
        return self.path / "batches" / f"step_{step:06d}.msgpack"

    def dump(self, step: int, number: int = 1) -> Path:
        """What was kept of a step that ended the run, for the first time or again."""
        return self.path / "dumps" / (f"step_{step:06d}" if number == 1 else f"step_{step:06d}_{number}")

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after a step."""
        return self.checkpoints / f"step_{step:06d}"

    def partial_checkpoint(self, step: int) -> Path:
        """Where the checkpoint after a step is written before it is published."""
        return self.checkpoints / f".step_{step:06d}.partial"

    def replaced_checkpoint(self, step: int) -> Path:
        """Where a checkpoint waits while one of the same step takes its place."""
        return self.checkpoints / f".step_{step:06d}.replaced"
