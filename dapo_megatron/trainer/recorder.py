"""What is written down of a run while it trains: the phase, the seconds of each, and one record a step."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from dapo_megatron.config import RunConfig
from dapo_megatron.distributed.layout import Layout
from dapo_megatron.observe import catalog as m
from dapo_megatron.observe.metrics import MetricsWriter
from dapo_megatron.process import Reporter


class Recorder:
    """Every rank holds one and reports its own phase; rank 0 writes the records."""

    def __init__(self, config: RunConfig, layout: Layout, reporter: Reporter):
        self._config, self._layout, self._reporter = config, layout, reporter
        self._seconds = defaultdict[str, float](float)
        self._writer: MetricsWriter | None = None

    def open(self, resume_step: int | None) -> None:
        """Open the run's history at the step of the checkpoint that the run goes on from; None begins a new one."""
        if self._layout.rank == 0:
            observe = self._config.observe
            self._writer = MetricsWriter(
                self._reporter.folder,
                tensorboard=observe.tensorboard,
                wandb_project=observe.wandb_project,
                resume_step=resume_step,
            )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Report a phase while it lasts, and add up its seconds."""
        self._reporter.phase(name)
        began = time.monotonic()
        yield
        self._seconds[name] += time.monotonic() - began

    @contextmanager
    def detail(self, text: str) -> Iterator[None]:
        """Report what is done within the phase that goes on, while it lasts."""
        self._reporter.detail(text)
        yield
        self._reporter.detail("")

    def record(self, metrics: dict[str, float]) -> None:
        """Write one step's metrics, with the seconds of its phases (and of the checkpoint before it)."""
        seconds, self._seconds = self._seconds, defaultdict(float)
        timed = {m.time_of(phase): s for phase, s in seconds.items() if m.time_of(phase) in m.CATALOG}
        record = timed | metrics  # what the controller timed of its own phases counts
        if m.STEP_SECONDS in timed:
            step = timed[m.STEP_SECONDS]
            record[m.GENERATED_PER_SECOND] = metrics[m.RESPONSE_TOKENS] / step
            record[m.TRAINED_PER_SECOND] = metrics[m.BATCH_TOKENS] / step
        m.check_names(record)
        if self._writer is not None:
            self._writer.write({m.TIME: time.time()} | record)

    def record_late(self, metrics: dict[str, float]) -> None:
        """Write what has become known of a step that is recorded, and that no later one follows yet."""
        m.check_names(metrics)
        if self._writer is not None:
            self._writer.write({m.TIME: time.time()} | metrics)

    def close(self) -> None:
        """End the files."""
        if self._writer is not None:
            self._writer.close()
