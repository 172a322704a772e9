"""Every process of a job: its name, command line and environment, from the placement. Pure."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from dapo_megatron.config import RunConfig
from dapo_megatron.engines.command import engine_command
from dapo_megatron.run_folder import RunFolder
from launch.environment import environment_of_controller, environment_of_engine, environment_of_rank
from launch.job import Job
from launch.topology import EnginePlace, Placement


@dataclass(frozen=True)
class Command:
    """A process to start."""

    name: str
    arguments: list[str]
    environment: dict[str, str]
    devices: tuple[int, ...] | None
    """Of the GPUs that the job sees on its node; None: no node has any."""


def command_of_engine(config: RunConfig, folder: RunFolder, place: EnginePlace, shared: Mapping[str, str]) -> Command:
    """An SGLang server, called engine-<replica>; `shared` is its node's shared environment."""
    arguments = engine_command(
        config,
        place.node.address,
        place.port,
        cpu=not place.devices,
        replica=place.replica,
        nccl_port=place.nccl_port,
        options_file=folder.engine_options,
    )
    return Command(place.name, arguments, environment_of_engine(shared, place), place.devices or None)


def command_of_controller(job: Job, placement: Placement, shared: Mapping[str, str]) -> Command:
    """The controller."""
    arguments = [sys.executable, "-m", "dapo_megatron.rollout", *_links(job, placement)]
    environment = environment_of_controller(shared, placement.controller, cpu=placement.cpu)
    return Command("controller", arguments, environment, None if placement.cpu else ())


def command_of_rank(job: Job, placement: Placement, rank: int, shared: Mapping[str, str]) -> Command:
    """A trainer rank, called trainer-<rank>; all have the same arguments."""
    pushes = ["--push-ports", *map(str, placement.push_ports)]
    arguments = [sys.executable, "-m", "dapo_megatron.trainer", *_links(job, placement), *pushes]
    environment = environment_of_rank(shared, placement.ranks, rank, placement.meeting_port)
    devices = placement.ranks[rank].devices or None
    return Command(f"trainer-{rank}", arguments + job.trainer_arguments, environment, devices)


def _links(job: Job, placement: Placement) -> list[str]:
    return ["--config", str(job.config), "--link", placement.controller.link]
