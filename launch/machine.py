"""This machine, as the local launcher sees it: what it has, and what it lets a process open."""

import os
import resource
import socket

import torch

from dapo_megatron.errors import ConfigError
from launch.ports import LOCALHOST
from launch.topology import Node

OTHER_FILES = 256
"""That a process has open beside its requests: libraries, logs, data, workers."""


def this_machine() -> Node:
    """Its GPUs (those that CUDA_VISIBLE_DEVICES shows) and cores; its servers are reached from itself alone."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Node(socket.gethostname(), LOCALHOST, gpus, len(os.sched_getaffinity(0)))


def raise_open_files_limit(concurrency: int) -> None:
    """As far as it may be raised, for this process and all that it starts.

    Args:
        concurrency: responses in flight at once, each of which may be a request of its own.

    Raises:
        ConfigError: so many connections cannot be open.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = concurrency + OTHER_FILES
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"a process may open {hard} files here, {concurrency} responses in flight need {needed}: raise the hard "
            "limit (ulimit -Hn), or set rollout.concurrency lower"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
