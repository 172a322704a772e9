"""Starting and watching the processes of a run."""

from typing import Literal

from pydantic import Field

from dapo_megatron.config.base import Section


class ContainerConfig(Section):
    runtime: Literal["pyxis", "apptainer"]
    """What starts the container: the nodes' pyxis (srun --container-image), or apptainer."""
    image: str = Field(min_length=1)
    """As that takes it: a .sqsh file or a registry's image; a .sif file."""
    mounts: list[str] = []
    """FROM:TO, beside the working folder and the run folder, which are always there: model, data, caches."""
    python: str = "python3"
    """The container's Python, which has what requirements/ list."""


class LaunchConfig(Section):
    heartbeat_timeout_s: float | None = Field(None, ge=5)
    """Seconds without a sign of life after which a process is taken for hung; null is the smaller of 60 and
    trainer.collective_timeout_s."""
    engine_timeout_s: float | None = Field(None, ge=5)
    """Seconds without an answer after which an engine is taken for hung; null is the larger of heartbeat_timeout_s and
    engine.call_timeout_s; never less than that, for as long may it be busy with one call. One that loads its model has
    engine.start_timeout_s."""
    stop_grace_s: float = Field(15.0, ge=0)
    """Seconds that SIGTERM or Ctrl-C leave for the step in progress to be finished and saved; a second one ends all."""
    max_restarts: int = Field(3, ge=0)
    """How often controller and trainer are started again after a failure, in one start of the run; the same for each
    engine."""
    max_requeues: int = Field(10, ge=0)
    """How often a SLURM job puts itself back into the queue after a failure, or at a time limit before which it saved
    no further step. 0: never, nor at any time limit."""
    forget_bad_nodes_s: float = Field(21600.0, ge=0)
    """Seconds for which a SLURM job that puts itself back excludes a node on which it failed."""
    save_before_end_s: float = Field(600.0, ge=0)
    """Seconds before a SLURM job's time limit at which it saves and goes back into the queue, if no signal came; more
    than stop_grace_s. 0: only a signal tells."""
    engine_nodes: int | None = Field(None, ge=1)
    """Nodes of a job that run engines alone, its last ones; the others train. null: engines and trainer share the
    nodes, but never a GPU."""
    base_port: int = Field(20000, ge=1024, le=32768 - 64)
    """First port of those that jobs on a cluster listen on, 64 each, below 32768 (launch/port_map.py)."""
    interface: str | None = Field(None, min_length=1)
    """Network interface of gloo and NCCL, such as ib0; null: the one that the route to the head node takes, and on one
    machine what they choose."""
    container: ContainerConfig | None = None
    """Run every process of a SLURM job in a container; the launcher itself runs outside."""
