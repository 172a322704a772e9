"""This machine, as the local launcher sees it: what it has, and what it lets a process open."""

import os
import resource
import socket

import torch

from launch.ports import LOCALHOST
from launch.topology import Node


def this_machine() -> Node:
    """Its GPUs (those that CUDA_VISIBLE_DEVICES shows) and cores; its servers are reached from itself alone."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Node(socket.gethostname(), LOCALHOST, gpus, len(os.sched_getaffinity(0)))


def raise_open_files_limit() -> None:
    """As far as it may be raised, for this process and all that it starts: thousands of requests are open at once."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
